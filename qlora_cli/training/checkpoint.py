"""Checkpoints: all that a run needs to go on, bit for bit.

Knows folders. Invariant: a folder `step-NNNNNN` under its final name is complete, on the disk, and was read back; an
older one goes only after a newer one was; a damaged one is never counted, and never removed.

    adapter (or model), tokenizer ...   what `Trained.save` writes
    optimizer.safetensors               the optimizer's states by parameter
    rng.safetensors                     the random generators
    best.safetensors                    the trained values of the best evaluation, where those are to be kept
    state.json                          the step, and all that is a number
    manifest.json                       size and SHA-256 of every file
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files import MANIFEST, check_space, disk_errors, manifest_problems, write_json
from qlora_cli.model.trained import Beside, Trained

FORMAT = 1
STATE, OPTIMIZER, RANDOM, BEST = "state.json", "optimizer.safetensors", "rng.safetensors", "best.safetensors"
NAME = re.compile(r"step-(\d{6,})")
TEMPORARY, TRASH, BROKEN = ".tmp-", ".trash-", ".broken"
BESIDE_BYTES = 32_000_000
"""Room for the tokenizer and the small files of a checkpoint."""


@dataclass(frozen=True)
class State:
    """What a checkpoint holds beside the trained values; `values` are plain and go to state.json."""

    values: Mapping[str, Any]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    best: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for part in (self.optimizer, self.random, self.best) for tensor in part.values())


@dataclass(frozen=True)
class Checkpoint:
    """A folder under a final name; `problem` says what is wrong with it, empty when nothing is."""

    path: Path
    step: int
    problem: str


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Every checkpoint in `folder`, oldest first, each compared with its manifest."""
    found = [(int(name[1]), path) for path in _children(folder) if (name := NAME.fullmatch(path.name))]
    return [Checkpoint(path, step, problem_of(path)) for step, path in sorted(found)]


def problem_of(folder: Path) -> str:
    """What is wrong with a checkpoint; empty when nothing is."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        lacking = [name for name in (STATE, OPTIMIZER, RANDOM) if "sha256" not in listed[name]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} is not that of a checkpoint: {error}"
    return "; ".join([*(f"{MANIFEST} knows nothing of {name}" for name in lacking), *manifest_problems(folder)])


def load_state(folder: Path) -> State:
    """The state of a valid checkpoint. Raises `ModelError` for one of another format, or that cannot be read."""
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ModelError(
                f"{folder} has format {values['format']}, this version reads {FORMAT}",
                fix="go on with the version of qlora that wrote it",
            )
        best = load_file(folder / BEST) if (folder / BEST).is_file() else {}
        return State(values, load_file(folder / OPTIMIZER), load_file(folder / RANDOM), best)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be read: {error}", fix="go on from another checkpoint") from error


class Checkpoints:
    """Those of one run, of which the newest `keep_last` are kept. No other process may write there."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self._folder, self._keep_last = folder, keep_last
        self._good: list[Path] = []

    def newest(self) -> tuple[Checkpoint | None, list[Checkpoint]]:
        """(the newest valid checkpoint, those that are broken). What a killed process left half-done is removed."""
        for path in _children(self._folder):
            if path.name.startswith((TEMPORARY, TRASH)):
                shutil.rmtree(path, ignore_errors=True)
        found = checkpoints(self._folder)
        valid = [each for each in found if not each.problem]
        self._good = [each.path for each in valid]
        return (valid[-1] if valid else None), [each for each in found if each.problem]

    def save(self, step: int, trained: Trained, beside: Beside, state: State) -> Path:
        """Writes `step-NNNNNN`, reads it back, and then removes the oldest that are too many. Raises `DiskError` where
        there is no room, `ModelError` where what was read back differs; then all is as before."""
        final = self._folder / f"step-{step:06d}"
        if final in self._good:
            return final
        check_space(final, state.bytes + sum(p.nbytes for p in trained.named().values()) + BESIDE_BYTES, "a checkpoint")

        def with_state(staging: Path) -> None:
            beside(staging)
            with disk_errors(staging):
                for name, tensors in ((OPTIMIZER, state.optimizer), (RANDOM, state.random), (BEST, state.best)):
                    if tensors or name != BEST:
                        save_file(dict(tensors), staging / name)
            write_json(staging / STATE, {"format": FORMAT, "step": step, **state.values})

        self._set_aside(final)
        trained.save(final, with_state, result=False)
        if problem := problem_of(final):
            self._set_aside(final)
            raise ModelError(f"{final} is not as it was written: {problem}", fix="check the disk")
        self._good.append(final)
        self._rotate()
        return final

    def _set_aside(self, path: Path) -> None:
        """Gives a broken folder another name."""
        if path.exists():
            taken = {child.name for child in _children(self._folder)}
            names = (f"{path.name}{BROKEN}{number or ''}" for number in range(len(taken) + 1))
            with disk_errors(path):
                path.rename(path.with_name(next(name for name in names if name not in taken)))

    def _rotate(self) -> None:
        """Renames before deleting, so that a crash in between leaves no half checkpoint under a final name."""
        while len(self._good) > self._keep_last:
            old = self._good.pop(0)
            trash = old.with_name(f"{TRASH}{old.name}")
            with disk_errors(old):
                old.rename(trash)
                shutil.rmtree(trash)


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
