"""What the checks share: a tiny NF4 base, recipes, and lives of `qlora train`.

A life is one process that runs `qlora train`, forked from this one after everything heavy was imported, so that it
costs its work and not its imports. Knows forks, files and the layout of a run directory; judges a checkpoint by its
manifest alone, not by the program's own reader. Invariant: no life outlives the process that started it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.conftest import save_base, write_jsonl

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = (
    "qlora_cli.cli.app",
    "qlora_cli.cli.console",
    "qlora_cli.recipe.load",
    "qlora_cli.workflows.quiet",
    "qlora_cli.workflows.train",  # before the next one, which it quiets
    "bitsandbytes.optim",
    "transformers.models.llama.modeling_llama",
)
PATIENCE = 120.0
"""Seconds after which a life hangs."""
STARTED_BADLY = 70
"""Exit code of a life that failed outside of the command."""
SAVED = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json")
"""Files that every checkpoint has."""
FINAL = re.compile(r"step-\d{6,}")
PASSING = re.compile(r"\.(tmp|trash)-.*")
_PR_SET_PDEATHSIG = 1
_FILE_EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open")

Before = Callable[[], None]
Failures = list[str]


def warm() -> None:
    """Imports what a run needs, and keeps this process free of threads, which a fork would not take along."""
    torch.set_num_threads(1)
    for name in HEAVY:
        importlib.import_module(name)
    importlib.import_module("qlora_cli.workflows.quiet").quiet_libraries()


@dataclass(frozen=True)
class Tiny:
    """A base model and rows to train it on."""

    base: Path
    rows: Path

    def recipe(self, path: Path, changes: Mapping[str, Any] | None = None) -> Path:
        """Writes a recipe of 24 steps, each saved and logged; `changes` are by dotted key."""
        tree: dict[str, Any] = {
            "model": {"base": str(self.base), "device": "cpu"},
            "quantization": {"compute_dtype": "float32", "cache": False},
            "lora": {"r": 4, "alpha": 8},
            "data": {"train": str(self.rows), "max_length": 64, "cache": False},
            "train": {"steps": 24, "batch_size": 4, "micro_batch_size": 2, "optimizer": "adamw", "lr": 0.01},
            "save": {"every": 1, "minutes": None},
            "log": {"every": 1},
        }
        tree["train"]["gradient_checkpointing"] = "off"
        for key, value in (changes or {}).items():
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path


def build(folder: Path, count: int = 40, **changes: Any) -> Tiny:
    """A tiny random Llama and `count` conversations of unequal length; `changes` are of its configuration."""
    warm()
    folder.mkdir(parents=True, exist_ok=True)
    return Tiny(save_base(folder / "base", **changes), write_jsonl(folder / "rows.jsonl", rows(count)))


def rows(count: int) -> list[dict[str, Any]]:
    """Questions of 2 to 30 characters with an answer of one letter."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"q{i}" * (1 + i % 7)},
                {"role": "assistant", "content": "ab"[i % 2]},
            ]
        }
        for i in range(count)
    ]


class Life:
    """A process that runs a command."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self.output = pid, output
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, minus the signal that killed it; None while it lives."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code; one that hangs is killed, and a `TimeoutError` says so."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"a life hung: {self.said()[-800:]}")
            time.sleep(0.002)
        return code

    def signal(self, number: int, group: bool = False) -> None:
        """Sends a signal to it, or to its process group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def said(self) -> str:
        """What it has printed."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""


def start(arguments: Sequence[object], output: Path, before: Before | None = None) -> Life:
    """A life that runs `qlora ARGUMENTS` in a session of its own, prints to `output`, and begins with `before`."""
    from qlora_cli.cli.app import main

    def live() -> int:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for stream in (1, 2):
            os.dup2(handle, stream)
        if before is not None:
            before()
        return main([str(argument) for argument in arguments])

    output.parent.mkdir(parents=True, exist_ok=True)
    return Life(fork(live), output)


def fork(work: Callable[[], int]) -> int:
    """The id of a child that does `work` and exits with what it returns; it ends when this process ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = STARTED_BADLY
    try:
        os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def train(recipe: Path, run: Path, *more: str, before: Before | None = None) -> Life:
    """A life that trains."""
    return start(["train", recipe, "-o", run, *more], run.parent / f"{run.name}.out", before)


def finished(recipe: Path, run: Path, *more: str) -> Path:
    """The run directory of a life that was left alone; `RuntimeError` with its output unless it ended well."""
    life = train(recipe, run, *more)
    if code := life.wait():
        raise RuntimeError(f"exit {code} of an undisturbed run: {life.said()[-2000:]}")
    return run


def on_files(tell: Callable[[str, str], None]) -> Before:
    """A `before` that calls `tell(event, path)` ahead of every file operation of Python's own: os.mkdir, os.rename
    (with the new name), os.remove, os.rmdir, open."""

    def install() -> None:
        telling = False

        def hook(event: str, values: tuple[Any, ...]) -> None:
            nonlocal telling
            if event in _FILE_EVENTS and not telling:
                telling = True
                tell(event, str(values[1] if event == "os.rename" else values[0]))
                telling = False

        sys.addaudithook(hook)

    return install


def sha256(path: Path) -> str:
    """In hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def adapter(run: Path) -> str:
    """SHA-256 of the final adapter; what is missing instead, where it is not there."""
    path = run / "adapter" / "adapter_model.safetensors"
    return sha256(path) if path.is_file() else f"no {path.name} in {run.name}/adapter"


def steps(run: Path) -> list[Path]:
    """Folders under the final name of a checkpoint, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if FINAL.fullmatch(path.name))


def step_of(folder: Path) -> int:
    """Of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def newest(run: Path) -> int:
    """Step of the newest checkpoint; 0 where there is none."""
    return max(map(step_of, steps(run)), default=0)


def leftovers(run: Path) -> set[str]:
    """Names of what was being written or deleted."""
    folders = (run, run / "checkpoints")
    return {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if PASSING.match(path.name)}


def invalid(run: Path) -> Failures:
    """What is wrong with folders under a final name, and names that should not be there."""
    from qlora_cli.training.checkpoint import checkpoints

    folder = run / "checkpoints"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [f"{run.name}: unexpected {name}" for name in names if not (FINAL.fullmatch(name) or PASSING.match(name))]
    found += [problem for step in steps(run) for problem in damage(step)]
    read = checkpoints(folder) if folder.is_dir() else []
    found += [f"{each.path}: {each.problem}" for each in read if each.problem]
    if [each.path.name for each in read] != [step.name for step in steps(run)]:
        found.append(f"{run.name}: the program lists {[each.path.name for each in read]}")
    return found + (damage(run / "adapter", ()) if (run / "adapter").is_dir() else [])


def damage(folder: Path, wanted: Sequence[str] = SAVED) -> Failures:
    """How a folder differs from its manifest, or lacks a file of those `wanted`."""
    try:
        entries = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{folder}: manifest: {error}"]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    wrong = [f"{folder}: {name} is missing" for name in wanted if name not in files]
    wrong += [f"{folder}: {name} is in one of folder and manifest only" for name in sorted(files ^ set(entries))]
    same = files & set(entries)
    return wrong + [f"{folder}: {name} differs" for name in same if sha256(folder / name) != entries[name]["sha256"]]


def measured(run: Path) -> list[tuple[str, int, float]]:
    """(kind, step, loss) of every line of metrics.jsonl; a line that is no JSON is of no kind."""
    path = run / "metrics.jsonl"
    lines = [_line(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [(line["kind"], line["step"], line["loss"]) for line in lines if "loss" in line]


def _line(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except ValueError:
        return {"kind": "", "step": 0, "loss": 0.0}


def last_measured(run: Path) -> int:
    """The last step that metrics.jsonl holds; a line that is being written does not count."""
    path = run / "metrics.jsonl"
    whole = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line)["step"] for line in whole if line.endswith("\n")]
    return max(found, default=0)


def differences(run: Path, reference: Path) -> Failures:
    """How a finished run differs from the one that nobody disturbed."""
    wrong = invalid(run)
    if adapter(run) != adapter(reference):
        wrong.append(f"{run.name}: the adapter differs from the uninterrupted one: {adapter(run)[:16]}")
    if measured(run) != measured(reference):
        wrong.append(f"{run.name}: metrics.jsonl differs from the uninterrupted one")
    state = json.loads((run / "status.json").read_text(encoding="utf-8"))["state"]
    return wrong + ([] if state == "finished" else [f"{run.name}: status.json says {state}"])


def cut_back(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run that finished, as it would be had it been killed after `step`: later checkpoints and the result
    are gone, metrics.jsonl goes on for a while and ends within a line."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("adapter", ".lock"))
    for folder in steps(copy):
        if step_of(folder) > step:
            shutil.rmtree(folder)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [json.dumps(line) for line in lines if line["step"] <= step + 2]
    (copy / "metrics.jsonl").write_text("\n".join([*kept, '{"kind": "st']), encoding="utf-8")
    status = json.loads((copy / "status.json").read_text(encoding="utf-8"))
    status |= {"state": "running", "step": step, "pid": 2**22 + 1, "reason": ""}
    (copy / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return copy


def in_turn(jobs: Sequence[Callable[[], Iterator[None]]], workers: int | None = None) -> None:
    """Runs `jobs` to their end, as many at once as there are cores. A job yields while it waits for its lives."""
    waiting, running = list(jobs), list[Iterator[None]]()
    most = workers or len(os.sched_getaffinity(0))
    while waiting or running:
        while waiting and len(running) < most:
            running.append(waiting.pop(0)())
        running = [job for job in running if next(job, running) is not running]
        time.sleep(0.005)


def until_done(life: Life, seconds: float = PATIENCE) -> Iterator[None]:
    """Yields until a life ends; one that hangs is killed, and a `TimeoutError` says so."""
    end = time.monotonic() + seconds
    while life.poll() is None:
        if time.monotonic() > end:
            life.wait(0)
        yield


def result(count: int, figure: str, failures: Sequence[str], **more: Any) -> dict[str, Any]:
    """What a check returns."""
    return {"count": count, "passed": not failures, "figure": figure, "failures": list(failures)[:50], **more}


def draws(seed: int, name: str) -> random.Random:
    """The random numbers of one check."""
    return random.Random(f"{seed} {name}")
