"""The largest micro-batch of a run, tried before the first step.

Knows a job and memory. Invariant: a rehearsal leaves nothing behind: no gradient, no random draw, no changed weight. It
makes the optimizer's state, which the first step would make too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qlora_cli.data.batches import Batching
from qlora_cli.data.encode import Encoded
from qlora_cli.errors import DeviceMemoryError
from qlora_cli.model.loss import TargetLosses
from qlora_cli.model.ranks import Ranks
from qlora_cli.training.guard import memory_guard
from qlora_cli.training.loop import Job, backward, release
from qlora_cli.training.optim import allocate_state


@dataclass(frozen=True)
class Rehearsed:
    """The largest micro-batch: how many rows, and how many positions the model computes for it."""

    rows: int
    positions: int

    def line(self) -> str:
        """One line of text."""
        return f"the largest micro-batch ({self.rows} rows, {self.positions:,} positions) and its optimizer fit"


def rehearse(job: Job, ranks: Ranks) -> Rehearsed:
    """Forward and backward pass of the largest micro-batch that the run will draw, beside the optimizer's state.
    Raises `DeviceMemoryError` with the values of the recipe that do suffice, tried out one after the other."""
    try:
        with memory_guard("rehearsing the largest micro-batch"):
            allocate_state(job.optimizer)
        return _try(job, ranks)
    except DeviceMemoryError as error:
        problem = error.problems[0]
        raise DeviceMemoryError(problem.what, why=_why(job), fix=_what_fits(job, ranks)) from error


@torch.no_grad()
def rehearse_evaluation(
    model: Any, losses: TargetLosses, batches: Sequence[Sequence[Encoded]], batching: Batching, ranks: Ranks
) -> None:
    """One forward pass over the largest micro-batch of an evaluation."""
    biggest = max(batches, key=batching.positions)
    was_training = model.training
    model.eval()
    moved = batching.collate(biggest).to(ranks.device)
    with memory_guard("rehearsing the largest micro-batch of an evaluation"), ranks.autocast():
        losses(moved.inputs, moved.targets, moved.labels)
    model.train(was_training)


def _try(job: Job, ranks: Ranks) -> Rehearsed:
    rows = largest(job)
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    failed: DeviceMemoryError | None = None
    try:
        with torch.random.fork_rng(devices), memory_guard("rehearsing the largest micro-batch"):
            job.model.train()
            backward(job, job.batching, rows, ranks)
    except DeviceMemoryError as error:
        failed = error.with_traceback(None)
        failed.__cause__ = failed.__context__ = None  # their frames hold all that the pass computed
    release(job)
    if ranks.any(failed is not None):
        raise failed or DeviceMemoryError("out of memory in the rehearsal of another process of this run")
    return Rehearsed(len(rows), job.batching.positions(rows))


def largest(job: Job) -> Sequence[Encoded]:
    """The rows of the first among the run's largest micro-batches."""
    best: Sequence[Encoded] = ()
    most = 0
    for step in range(job.total_steps):  # those done too: a resumed run compiles and allocates as the first did
        places = job.order.step_rows(step, job.total_rows)
        if job.batching.bound([job.order.lengths[i] for i in places]) <= most:
            continue
        for batch in job.batching.split([job.rows[i] for i in places]):
            if job.batching.positions(batch) > most:
                best, most = batch, job.batching.positions(batch)
    return best


def _why(job: Job) -> str:
    rows = largest(job)
    return (
        f"the run's largest micro-batch has {len(rows)} rows on {job.batching.positions(rows):,} positions; it was "
        "tried before the first step, and nothing was trained"
    )


def _what_fits(job: Job, ranks: Ranks) -> str:
    """Values of the recipe with which the rehearsal passes, found by trying ever smaller micro-batches."""
    batching = job.batching.halved()
    while batching is not None:
        rows = job.rows if batching.rows > 1 else [_cut(row, batching.length) for row in job.rows]
        try:
            _try(replace(job, batching=batching, rows=rows), ranks)
        except DeviceMemoryError:
            batching = batching.halved()
            continue
        return f"set {_as_recipe(batching, job.batching)}, with which the rehearsal passed; or {GENERAL}"
    return GENERAL


def _cut(row: Encoded, length: int) -> Encoded:
    return replace(row, ids=row.ids[:length], loss=np.ones(min(length, len(row)), np.bool_))


def _as_recipe(batching: Batching, instead_of: Batching) -> str:
    values = [f"train.micro_batch_size to {batching.rows}"] if batching.rows != instead_of.rows else []
    values += [f"data.max_length to {batching.length}"] if batching.length != instead_of.length else []
    return " and ".join(values)


GENERAL = "set train.gradient_checkpointing to on or offload, lower data.max_length, lora.r or eval.batch_size"
