"""`qlora chat`: a conversation with a base model, or with the adapters on it.

Sees what the command line names. Invariant: several adapters speak over one base only if all were trained on that base
in that quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from qlora_cli.data.sources import raise_all
from qlora_cli.errors import ModelError, Problem, QloraError
from qlora_cli.generation.sampling import Decoding
from qlora_cli.model.base import load_config
from qlora_cli.model.folder import is_folder
from qlora_cli.training.guard import memory_guard
from qlora_cli.workflows.card import RECIPE_FILE
from qlora_cli.workflows.events import Emit, Stage
from qlora_cli.workflows.locate import Found, base_folder, find, is_model, tokenizer_of, trained_base
from qlora_cli.workflows.prompts import Prompt, read_prompts
from qlora_cli.workflows.talk import Answer, Talk, encode, instructed
from qlora_cli.workflows.voice import Voice, room
from qlora_cli.workflows.voices import load_voices, voice_of

__all__ = ["BASE", "Answer", "Decoding", "Prompt", "Talk", "check_prompts", "open_talk", "read_prompts"]

BASE = "base"
"""What the bare base is called among the adapters."""


def open_talk(
    target: str | None,
    adapters: Sequence[Path] | None,
    emit: Emit,
    quantization: str = "auto",
    allow_changed_base: bool = False,
) -> Talk:
    """A conversation with what `target` (a run, an adapter folder or a model) and `adapters` name; of several adapters
    the first one speaks."""
    found = find_all(target, adapters or (), quantization)
    _check_same(found, base=not allow_changed_base)
    names = ", ".join(name for name in found if name is not None)
    base = next(iter(found.values())).recipe.model.base
    emit(Stage(f"loading {base} with {names}" if names else f"loading {base}"))
    with memory_guard("loading the model"):
        return Talk(load_voices(found, emit, allow_changed_base))


def check_prompts(
    rows: Sequence[Prompt | Problem], target: str | None, adapters: Sequence[Path] | None, system: str | None
) -> list[Prompt]:
    """The prompts. Raises one `DataError` that names the rows that are none, and with them those that are too long,
    before any weight is loaded; the latter as far as there is a tokenizer to count with."""
    if any(isinstance(row, Problem) for row in rows):
        told = list(rows)
        with suppress(QloraError):
            first = next(iter(find_all(target, adapters or ()).values()))
            space = partial(room, load_config(base_folder(first)))
            voice = voice_of(first, tokenizer_of(first))
            told = [_measured(row, voice, space, system) for row in rows]
        raise_all([row for row in told if isinstance(row, Problem)])
    return [row for row in rows if isinstance(row, Prompt)]


def _measured(row: Prompt | Problem, voice: Voice, space: Callable[[int], int], system: str | None) -> Prompt | Problem:
    if isinstance(row, Problem):
        return row
    outcome = encode(voice, space, row.where, instructed(row.messages, system))
    return outcome if isinstance(outcome, Problem) else row


def find_all(target: str | None, adapters: Sequence[Path], quantization: str = "auto") -> dict[str | None, Found]:
    """What is to be loaded, each adapter under a name of its own; None stands for a model as it is."""
    if target is not None and adapters and _is_run_of_adapter(Path(target)):
        adapters, target = (Path(target), *adapters), None
    found = [find(target, path, quantization) for path in adapters] or [find(target, None, quantization)]
    folders = list(dict.fromkeys(each.adapter.resolve() for each in found if each.adapter is not None))
    if not folders:
        return {None: found[0]}
    by_folder = {each.adapter.resolve(): each for each in reversed(found) if each.adapter is not None}
    return {name: by_folder[folder] for name, folder in adapter_names(folders).items()}


def _is_run_of_adapter(path: Path) -> bool:
    return is_folder(path) and not is_model(path) and not (path / "model" / RECIPE_FILE).is_file()


def adapter_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Short names: a run's, a checkpoint's, a folder's; with what lies above where two would be the same, or one the
    base's."""
    for parts in range(1, 1 + max(len(folder.parts) for folder in folders)):
        names = ["/".join(_named_parts(folder)[-parts:]) for folder in folders]
        if len({*names, BASE}) > len(names):
            break
    return dict(zip(names, folders, strict=True))


def _named_parts(folder: Path) -> tuple[str, ...]:
    return folder.parts[:-1] if folder.name == "adapter" and len(folder.parts) > 2 else folder.parts


def _check_same(found: Mapping[str | None, Found], base: bool) -> None:
    """Raises one `ModelError` that names what differs between the adapters: their quantization and, where `base` is
    True, the base they were trained on."""
    (first, by), *others = found.items()
    assert by.adapter is not None or not others, "a model as it is comes alone"
    differences = {name: _quantizations(by, other) + (_bases(by, other) if base else []) for name, other in others}
    told = [f"{name} differs from {first} in {', '.join(what)}" for name, what in differences.items() if what]
    if told:
        raise ModelError(
            f"these adapters cannot share one base: {'; '.join(told)}",
            why="they are switched over one base, and on another an adapter computes what nobody has trained",
            fix="talk to them one by one",
        )


def _quantizations(first: Found, other: Found) -> list[str]:
    one, two = (each.recipe.quantization.model_dump(exclude={"storage_dtype"}) for each in (first, other))
    return [f"quantization.{key} ({one[key]} and {two[key]})" for key in one if one[key] != two[key]]


def _bases(first: Found, other: Found) -> list[str]:
    """Differing files of the bases; their names where an adapter has no record of the files."""
    assert first.adapter is not None and other.adapter is not None, "checked by the caller"
    one, two = trained_base(first.adapter), trained_base(other.adapter)
    names = f"its base ({first.recipe.model.base} and {other.recipe.model.base}"
    if not one or not two:
        return [f"{names})"] if first.recipe.model.base != other.recipe.model.base else []
    files = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return [f"{names}: {', '.join(files)})"] if files else []
