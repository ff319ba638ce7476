"""Where a run goes on that was begun before.

Sees the whole recipe and a run directory. Invariant: it goes on from the newest checkpoint that is whole, as the run
that wrote it would have; what differs is refused or written down, and nothing in the directory changes before that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.data.batches import Batching
from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.model.trained import Trained
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.snapshot import read_resolved
from qlora_cli.secrets import redacted
from qlora_cli.training.checkpoint import Checkpoint, Checkpoints, State, checkpoints, load_state
from qlora_cli.training.loop import Job
from qlora_cli.training.optim import lr_at
from qlora_cli.training.state import restore_optimizer, restore_random
from qlora_cli.workflows.changes import Change, check_allowed, check_changes, lock_changes, recipe_changes
from qlora_cli.workflows.events import Emit, Notice
from qlora_cli.workflows.plan import Plan
from qlora_cli.workflows.rundir import RESOLVED
from qlora_cli.workflows.standing import Standing

LOCK = "lock.json"


@dataclass(frozen=True)
class Resumed:
    """A checkpoint, and what of the run is otherwise now. `raised` and `first_total`: see `Job`."""

    checkpoint: Checkpoint
    state: State
    changes: tuple[Change, ...]
    first_total: int
    raised: tuple[tuple[int, int], ...]

    def as_json(self) -> dict[str, Any]:
        """A line of resumes.jsonl."""
        values = {"time": time.time(), "step": self.checkpoint.step, "checkpoint": self.checkpoint.path.name}
        return {**values, "changes": [change.as_json() for change in self.changes]}

    def standing(self, patience: int | None) -> Standing:
        """How far the run had come."""
        return Standing.read(self.state.values, patience, self.state.best)

    def restore(self, job: Job, trained: Trained, standing: Standing) -> Job:
        """Puts trained values, optimizer and generators back; returns the job from there on."""
        trained.load(self.checkpoint.path)
        restore_optimizer(job.optimizer, trained.named(), self.state.optimizer)
        restore_random(self.state.random)
        micro = standing.micro_batch
        batching = Batching(*micro, job.batching.packed) if micro else job.batching
        return replace(
            job,
            batching=batching,
            done=standing.step,
            skipped=standing.skipped,
            first_total=self.first_total,
            raised=self.raised,
        )


def find_changes(path: Path, recipe: Recipe, lock: dict[str, Any], allowed: Sequence[str]) -> tuple[Change, ...] | None:
    """What differs between the run in `path` and a run of `recipe` under `lock`; None where that run ended before it
    had written down what it is. Raises a `QloraError` for differences that are not allowed."""
    check_allowed(allowed, recipe)
    if not (path / RESOLVED).is_file() or not (path / LOCK).is_file():
        return None
    try:
        before = json.loads((path / LOCK).read_text(encoding="utf-8"))
        lock = redacted(json.loads(json.dumps(lock)))  # as it would be read
        changes = [*recipe_changes(read_resolved(path / RESOLVED), recipe), *lock_changes(before, lock)]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        fix = "take it from a copy, or train again in another directory"
        raise ModelError(f"{path / LOCK} cannot be read: {error}", fix=fix) from error
    check_changes(changes, allowed, str(path))
    return tuple(changes)


def find_checkpoint(folder: Path, kept: Checkpoints | None, tell: Emit) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, or None where there is none at all. Broken ones are named. `kept` where
    this process may write there. Raises `ModelError` where all are broken."""
    if kept is not None:
        newest, broken = kept.newest()
    else:
        found = checkpoints(folder)
        newest, broken = next((each for each in reversed(found) if not each.problem), None), list[Checkpoint]()
    for each in broken:
        tell(Notice(f"{each.path} is broken and passed over: {each.problem}"))
    if newest is None and broken:
        what = f"no checkpoint in {folder} is whole"
        raise ModelError(what, why=broken[-1].problem, fix="take one from a copy, or train again with -o DIR")
    return newest


def resumed(checkpoint: Checkpoint, changes: tuple[Change, ...], recipe: Recipe, plan: Plan) -> Resumed:
    """The state of a checkpoint for a run of `plan`. Raises `RecipeError` where its steps cannot follow."""
    state = load_state(checkpoint.path)
    try:
        total, first = int(state.values["total_steps"]), int(state.values["first_total"])
        raised = tuple((int(at), int(later)) for at, later in state.values["raised"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{checkpoint.path} is not complete: {error!r}", fix="go on from another one") from error
    if plan.steps < checkpoint.step:
        raise RecipeError(
            f"the run is to have {plan.steps} steps, but its checkpoint has done {checkpoint.step}",
            fix=f"set train.steps (or train.epochs) to {checkpoint.step} steps or more",
        )
    if plan.steps != total:
        raised = (*raised, (checkpoint.step, plan.steps))
    if checkpoint.step < plan.steps and lr_at(checkpoint.step, first, recipe.train, raised) == 0:
        raise RecipeError(
            f"the run is to go on from step {checkpoint.step} to {plan.steps}, but its learning rate had fallen to 0 "
            f"there ({recipe.train.schedule} schedule)",
            why="with a learning rate of 0 the added steps would learn nothing, and it never jumps",
            fix="train anew with more steps; or go on at a constant rate: -s train.schedule=constant "
            "--allow-change train.schedule",
        )
    return Resumed(checkpoint, state, changes, first, raised)
