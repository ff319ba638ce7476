"""Tasks of lm-evaluation-harness (the extra `lm-eval`): found and loaded before any weight is.

Knows lm_eval's task manager and its files; no model. Invariant: what a task lacks is found here, and named.

Tasks are lm_eval's YAML files. What a file names with `!function` is Python code beside it, and runs: a task directory
is as trusted as a program. Files of rows (`dataset_path: json`, `data_files`) are looked up from the current directory
where they are not absolute, as `datasets` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml

from qlora_cli.errors import DataError, MachineError, QloraError
from qlora_cli.evaluation.undisturbed import Hushed, Remarks, same_surroundings, seeded

SEED = 1234
"""lm_eval's own, for few-shot examples and tasks that sample."""
MOST_NAMED, LONGEST_REASON = 20, 400
REFUSED = {"UNSAFE_CODE": "it runs code that the model wrote", "MULTIMODAL": "it needs more than text"}
"""By the attribute of a task."""
FIRST_ROW = "it tries a task's first row when it loads the task"


@dataclass(frozen=True)
class Tasks:
    """Tasks whose rows are loaded, as lm_eval holds them. They run once."""

    names: tuple[str, ...]
    loaded: Mapping[str, Any]
    remarks: tuple[str, ...] = ()


def check_harness() -> None:
    """Raises `MachineError` where lm_eval, or what it imports, is not there. Takes a second or two."""
    try:
        with Hushed(), same_surroundings():
            import lm_eval.evaluator
            import lm_eval.models.huggingface
            import lm_eval.tasks.manager  # noqa: F401
    except ImportError as error:
        raise MachineError(
            f"--lm-eval needs the package lm-eval, which cannot be imported: {error}",
            fix="run pip install 'qlora-cli[lm-eval]', or leave --lm-eval out",
        ) from error


def check_tasks(names: Sequence[str], task_dir: Path | None) -> Tasks:
    """Loads the tasks and their rows. Raises `DataError` where one is unknown, unfit or has no rows; `MachineError`
    where it needs a network or a package that is not there. With `task_dir` its tasks alone are known; without, all
    that come with lm_eval, whose index takes some ten seconds."""
    wanted = list(dict.fromkeys(names))
    if not wanted or not all(wanted):
        raise DataError("--lm-eval names no task", fix="name tasks with commas between them, e.g. --lm-eval arc_easy")
    if task_dir is not None:
        _check_directory(task_dir)
    check_harness()
    remarks = Remarks("lm_eval")
    with Hushed(), same_surroundings(), seeded(SEED, torch.device("cpu")), remarks.collected():
        loaded = _load(_manager(wanted, task_dir), wanted)
        _prepare(loaded["tasks"])
    return Tasks(tuple(wanted), loaded, remarks.texts())


def _check_directory(task_dir: Path) -> None:
    if not task_dir.is_dir():
        what = "is not a directory" if task_dir.exists() else "does not exist"
        raise DataError(f"--task-dir {task_dir} {what}", fix="name the directory that holds the tasks' .yaml files")
    files = sorted(task_dir.rglob("*.yaml"))
    if not files:
        raise DataError(f"--task-dir {task_dir} holds no .yaml file", fix="name the directory that holds the tasks")
    for file in files:
        _check_file(file)


def _check_file(file: Path) -> None:
    """lm_eval passes over files that it cannot read."""
    try:
        yaml.compose(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{file} is no YAML: {_reason(error)}", fix="mend it, or move it out of --task-dir") from error


def _manager(wanted: Sequence[str], task_dir: Path | None) -> Any:
    """lm_eval's task manager, which knows every one of `wanted`: of the directory alone, where there is one."""
    from lm_eval.tasks.manager import TaskManager

    manager = TaskManager(include_path=None if task_dir is None else str(task_dir), include_defaults=task_dir is None)
    if unknown := [missing for name in wanted for missing in _missing(manager, name)]:
        raise _unknown(unknown, manager.all_tasks, task_dir)
    return manager


def _missing(manager: Any, name: str) -> list[str]:
    """The task itself, where it is not known; of a group, those of its tasks that are not."""
    if name not in manager.task_index:
        return [name]
    group = manager.task_index[name].cfg if name in manager.all_groups else {}
    held = [each for each in group.get("task") or () if isinstance(each, str) and each != name]
    return [missing for each in held for missing in _missing(manager, each)]


def _unknown(unknown: Sequence[str], known: Sequence[str], task_dir: Path | None) -> DataError:
    near = {name: get_close_matches(name, known) for name in unknown}
    hints = [f"{name}: did you mean {' or '.join(found)}?" for name, found in near.items() if found]
    if task_dir is None:
        what, why = "lm-eval knows no task", f"it comes with {len(known):,} tasks and groups of tasks"
        fix = "name the directory of your own tasks with --task-dir"
    else:
        more = f" and {len(known) - MOST_NAMED:,} more" if len(known) > MOST_NAMED else ""
        what, why = f"{task_dir} has no task", f"it holds {', '.join(known[:MOST_NAMED]) or 'none'}{more}"
        fix = "leave --task-dir out for the tasks that come with lm-eval"
    return DataError(f"{what} {', '.join(unknown)}", why, "; ".join([*hints, fix]))


def _load(manager: Any, wanted: Sequence[str]) -> dict[str, Any]:
    items: list[Any] = []
    for name in wanted:
        with failures(name, "load"):
            found = manager.load([name])
            groups = found.get("groups", {})
            items += [groups[name]] if name in groups else found["tasks"].values()
    with failures(", ".join(wanted), "load"):
        loaded: dict[str, Any] = manager.load(items)
    return loaded


def _prepare(tasks: Mapping[str, Any]) -> None:
    """Few-shot examples are drawn as lm_eval's own command draws them; what it would not run is refused here."""
    for name, task in tasks.items():
        if why := next((why for attribute, why in REFUSED.items() if getattr(task, attribute, False)), None):
            raise DataError(f"lm-eval task {name} cannot be run here", why=why, fix="leave it out")
        task.set_fewshot_seed(seed=SEED)


@contextmanager
def failures(tasks: str, doing: str) -> Iterator[None]:
    """Tasks hold code and data of anyone: whatever they raise is a problem of theirs, but for running out of memory."""
    try:
        yield
    except (QloraError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise MachineError(f"lm-eval task {tasks} needs a package: {_reason(error)}", fix="install it") from error
    except ConnectionError as error:
        raise MachineError(
            f"lm-eval cannot fetch what task {tasks} needs: {_reason(error)}",
            fix="connect to the network, or keep task and rows on this machine (--task-dir, dataset_path: json)",
        ) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        where = f"files of rows are looked up from {Path.cwd()}" if isinstance(error, FileNotFoundError) else ""
        why = where or (FIRST_ROW if doing == "load" else "")
        raise DataError(
            f"lm-eval cannot {doing} {tasks}: {_reason(error)}", why, "check the task and its rows"
        ) from error


def _reason(error: BaseException) -> str:
    """What it says, and what its first cause said."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    texts = [" ".join(f"{type(each).__name__}: {each}".split()) for each in dict.fromkeys((error, first))]
    return "; ".join(texts)[:LONGEST_REASON].removesuffix(":")
