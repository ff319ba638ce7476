"""The training loop.

Knows a model, rows and an optimizer; no file and no console. Invariant: a step's gradient is the mean over all target
tokens of the whole step, however its rows are split into micro-batches and processes, and every draw within a step is
seeded by (seed, step, micro-batch).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_cli.data.batches import Batching, Order
from qlora_cli.data.encode import Encoded
from qlora_cli.errors import DeviceMemoryError, NonFiniteError
from qlora_cli.model.loss import LossSum
from qlora_cli.model.ranks import Ranks
from qlora_cli.recipe.schema import TrainSection
from qlora_cli.training.guard import memory_guard, nonfinite
from qlora_cli.training.optim import lr_at


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: `step` counts from 1; `loss` is the mean over its target tokens, before the update;
    `positions` are those that the model computed, padding included. `shrunk` says to which micro-batches the loop went
    over because memory ran out in this step; None: it did not. `skipped` says why the step changed nothing; empty where
    it did what a step does."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    rows: int
    tokens: int
    targets: int
    positions: int
    seconds: float
    shrunk: Batching | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Job:
    """What the loop works on. `loss` is the model's, as its engine computes it."""

    model: Any
    loss: LossSum
    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    rows: Sequence[Encoded]
    order: Order
    batching: Batching
    total_steps: int
    total_rows: int
    done: int = 0
    """Steps that an earlier process did."""
    skipped: int = 0
    """Of those, how many were passed over because a number was not finite."""
    first_total: int | None = None
    """Steps that the run was to have when it began, where it has been given more since."""
    raised: tuple[tuple[int, int], ...] = ()
    """See `lr_at`."""

    def step_rows(self, step: int) -> list[Encoded]:
        """The rows of 0-based `step`."""
        return [self.rows[i] for i in self.order.step_rows(step, self.total_rows)]


def train_steps(job: Job, train: TrainSection, ranks: Ranks) -> Iterator[StepReport]:
    """Runs every step that is not done and reports each. `NonFiniteError` before a bad update that may not be passed
    over, `DeviceMemoryError` when memory ends even with the smallest micro-batches."""
    job.model.train()
    batching, budget = job.batching, train.nonfinite_budget - job.skipped
    for step in range(job.done, job.total_steps):
        started = time.perf_counter()
        rows = job.step_rows(step)
        targets = sum(row.targets for row in rows)
        total, used = _gradients(job, batching, rows, (train.seed, step), ranks)
        norm = _clip(job.parameters, targets, train.max_grad_norm)
        loss = total / targets
        lr = lr_at(step, job.first_total or job.total_steps, train, job.raised)
        finite = math.isfinite(loss) and math.isfinite(norm)
        skipped = "" if finite else nonfinite(step + 1, loss, norm, *_named(job, rows, ranks))
        if skipped and (train.on_nonfinite == "stop" or budget == 0):
            raise NonFiniteError(skipped, *_what_then(train))
        budget -= bool(skipped)
        with memory_guard(f"training, step {step + 1}"):
            _update(job.optimizer, None if skipped else lr)
        seconds = time.perf_counter() - started
        shrunk, batching = used if used != batching else None, used
        positions = sum(map(batching.positions, batching.split(rows)))
        counts = (len(rows), sum(map(len, rows)), targets, positions)
        yield StepReport(step + 1, loss, lr, norm, *counts, seconds, shrunk, skipped)


@torch.no_grad()
def _named(job: Job, rows: Sequence[Encoded], ranks: Ranks) -> tuple[list[str], list[str]]:
    """(places of the rows whose loss is not finite by itself, of all)."""
    bad = []
    for row in rows:
        moved = job.batching.collate([row]).to(ranks.device)
        with ranks.autocast():
            loss = job.loss(moved.inputs, moved.targets, moved.labels)
        bad += [] if bool(loss.isfinite()) else [row.where]
    return bad, [row.where for row in rows]


def _what_then(train: TrainSection) -> tuple[str, str]:
    spent = f"{train.nonfinite_budget} steps were passed over already (train.nonfinite_budget); " * (
        train.on_nonfinite == "skip"
    )
    fix = "look at those rows; else lower train.lr, add a warm-up, or set quantization.compute_dtype to float32"
    return f"{spent}no weight was updated with it", fix


def _gradients(
    job: Job, batching: Batching, rows: Sequence[Encoded], draw: tuple[int, int], ranks: Ranks
) -> tuple[float, Batching]:
    """(the step's summed loss, with its gradients in place; the batching that memory sufficed for). When memory ends,
    the same step is done again from the same draws in micro-batches of half the size."""
    while True:
        failure: DeviceMemoryError | None = None
        try:
            with memory_guard(f"training, step {draw[1] + 1}"):
                total = _accumulate(job, batching, rows, draw, ranks)
        except DeviceMemoryError as error:
            failure = error
        if not ranks.any(failure is not None):
            ranks.sum_gradients(job.parameters)
            return float(ranks.sum(total)), batching
        smaller = batching.halved()
        if smaller is None or smaller.split(rows) == batching.split(rows):
            raise failure or DeviceMemoryError("out of memory in another process of this run")
        batching = smaller
        release(job)


def release(job: Job) -> None:
    """Gives up the gradients, and on CUDA the memory that torch keeps for later."""
    job.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _accumulate(
    job: Job, batching: Batching, rows: Sequence[Encoded], draw: tuple[int, int], ranks: Ranks
) -> torch.Tensor:
    """Adds up the gradients of this process' micro-batches of a step; returns their summed loss. `draw` is
    (seed, step)."""
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for index, batch in ranks.mine(batching.split(rows)):
        torch.manual_seed(draw_seed(*draw, index))
        total += backward(job, batching, batch, ranks)
    return total


def backward(job: Job, batching: Batching, rows: Sequence[Encoded], ranks: Ranks) -> torch.Tensor:
    """One micro-batch, forward and backward; returns its summed loss."""
    moved = batching.collate(rows).to(ranks.device)
    with ranks.autocast():
        loss = job.loss(moved.inputs, moved.targets, moved.labels)
    loss.backward()
    return loss.detach()


def draw_seed(seed: int, step: int, index: int) -> int:
    """Seed of dropout in one micro-batch: the same whichever process computes it."""
    return (seed * 0x9E3779B1 + step * 0x85EBCA77 + index * 0xC2B2AE3D + 1) % 2**63


def _clip(parameters: Sequence[torch.nn.Parameter], targets: int, max_norm: float | None) -> float:
    """Divides the summed gradients by the number of target tokens, clips them, returns their norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, 1.0 / targets)
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def _update(optimizer: torch.optim.Optimizer, lr: float | None) -> None:
    """The optimizer's step (none without `lr`), after which no gradient is left."""
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
