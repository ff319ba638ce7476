"""A run is resumed at every one of its steps, in every way that its rows, draws and optimizer can go.

Knows recipes and bytes. Invariant: a resumed run ends with the losses, the adapter and the optimizer state of the run
that was never interrupted, byte for byte; one that has finished is left as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from battery import common
from battery.common import Failures, Tiny

TITLE = "resume at every step"
MODES: dict[str, dict[str, Any]] = {
    "packed": {"train.packing": True},
    "grouped": {"train.packing": False, "train.group_by_length": True},
    "padded": {"train.packing": False},
}
EVALUATION: tuple[dict[str, Any], ...] = (
    {},
    {"eval.every": 4, "eval.keep_best": True},
    {"eval.every": 2, "eval.keep_best": True, "eval.patience": 3, "train.schedule": "constant", "train.lr": 0.03},
)
"""Each case takes one: none, evaluation in between with keep-best, and with early stopping too."""
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_32bit")
STEPS = 24


@dataclass(frozen=True)
class Case:
    """One way to train."""

    dropout: float
    mode: str
    micro: int
    optimizer: str
    evaluation: int

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.optimizer}-{self.mode}-m{self.micro}-d{self.dropout}-e{self.evaluation}"

    def recipe(self, tiny: Tiny, path: Path, every: int) -> Path:
        """Its recipe, with a checkpoint every so many steps."""
        changes = {
            "lora.dropout": self.dropout,
            "train.steps": STEPS,
            "train.micro_batch_size": self.micro,
            "train.optimizer": self.optimizer,
            "data.eval_split": 4,
            "save.every": every,
            "save.keep_last": STEPS + 1,
        }
        return tiny.recipe(path, {**changes, **MODES[self.mode], **EVALUATION[self.evaluation]})


def cases(full: bool) -> list[Case]:
    """36 in full; else one of each optimizer and mode."""
    if not full:
        return [
            Case(0.1, "packed", 1, "adamw_8bit", 2),
            Case(0.1, "grouped", 2, "adamw", 1),
            Case(0.0, "padded", 2, "paged_adamw_32bit", 0),
        ]
    every = product((0.0, 0.1), MODES, (1, 2), OPTIMIZERS)
    turns = (i + i // len(OPTIMIZERS) for i in range(36))  # so that each optimizer meets each way to evaluate
    return [
        Case(dropout, mode, micro, optimizer, turn % len(EVALUATION))
        for (dropout, mode, micro, optimizer), turn in zip(every, turns, strict=True)
    ]


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """Every step of every case in full, else three steps of three cases; and each once more when it has finished."""
    tiny = common.build(work)
    rng = common.draws(seed, "resumes")
    failures: Failures = []
    count = ended_early = 0
    for case in cases(full):
        folder = work / case.name
        reference = common.finished(case.recipe(tiny, folder / "every.yaml", 1), folder / "whole", "-q")
        last = common.newest(reference)
        ended_early += last < STEPS
        chosen = range(1, last + 1) if full else sorted({*rng.sample(range(1, last), 2), last})
        recipe = case.recipe(tiny, folder / "seldom.yaml", STEPS)  # a changed cadence is allowed
        common.in_turn([job(recipe, reference, step, failures) for step in chosen])
        failures += changed_when_finished(case.recipe(tiny, folder / "every.yaml", 1), reference)
        count += len(chosen) + 1
        if not failures:
            shutil.rmtree(folder)
    figure = f"{count - len(failures)} of {count} resumes equal in {len(cases(full))} cases ({ended_early} ended early)"
    return common.result(count, figure, failures)


def changed_when_finished(recipe: Path, run: Path) -> Failures:
    """What a resume does to a run that has nothing left to do."""
    before = {path: common.sha256(path) for path in sorted(run.rglob("*")) if path.is_file()}
    life = common.train(recipe, run, "--resume", "-q")
    code = life.wait()
    after = {path: common.sha256(path) for path in sorted(run.rglob("*")) if path.is_file()}
    changed = [path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    wrong = [] if code == 0 else [f"{run.parent.name}, finished: exit {code}: {life.said()[-300:]}"]
    return wrong + ([f"{run.parent.name}, finished: a resume changed {sorted(changed)}"] if changed else [])


def job(recipe: Path, reference: Path, step: int, failures: Failures) -> Callable[[], Iterator[None]]:
    """Resumes a copy of the run that was cut back to `step`, and compares."""

    def go() -> Iterator[None]:
        copy = common.cut_back(reference, step, reference.with_name(f"from-{step:02d}"))
        life = common.train(recipe, copy, "--resume", "-q")
        yield from common.until_done(life)
        wrong = compare(copy, reference) if life.poll() == 0 else [f"exit {life.poll()}: {life.said()[-500:]}"]
        failures.extend([f"{reference.parent.name} from step {step}: {'; '.join(wrong)}"] if wrong else [])
        shutil.rmtree(copy)

    return go


def compare(run: Path, reference: Path) -> Failures:
    """How a resumed run differs: losses, adapter, the state of the optimizer, the kept best, the steps taken."""
    wrong = common.differences(run, reference)
    last = common.steps(reference)[-1]
    for name in ("optimizer.safetensors", "adapter_model.safetensors", "best.safetensors"):
        there, here = last / name, run / "checkpoints" / last.name / name
        if there.exists() != here.exists() or (there.exists() and common.sha256(there) != common.sha256(here)):
            wrong.append(f"{last.name}/{name} differs")
    return wrong
