"""The training loop.

Knows a model, rows and an optimizer; no file and no console. Invariant: a step's gradient is the mean over all target
tokens of the whole step, however its rows are split into micro-batches and processes, and every draw within a step is
seeded by (seed, step, micro-batch).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_cli.data.batches import WIDTH_MULTIPLE, Order, collate, micro_batches
from qlora_cli.data.encode import Encoded
from qlora_cli.model.loss import loss_sum
from qlora_cli.model.ranks import Ranks
from qlora_cli.recipe.schema import TrainSection
from qlora_cli.training.guard import check_finite, memory_guard
from qlora_cli.training.optim import lr_at


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: `step` counts from 1; `loss` is the mean over its target tokens, before the update."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    rows: int
    tokens: int
    targets: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """What the loop works on."""

    model: Any
    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    rows: Sequence[Encoded]
    order: Order
    total_steps: int
    total_rows: int


def train_steps(job: Job, train: TrainSection, ranks: Ranks) -> Iterator[StepReport]:
    """Runs every step and reports each. `NonFiniteError` before a bad update, `DeviceMemoryError` when memory ends."""
    job.model.train()
    for step in range(job.total_steps):
        started = time.perf_counter()
        rows = [job.rows[i] for i in job.order.step_rows(step, job.total_rows)]
        batches = micro_batches(rows, train.micro_batch_size)
        targets = sum(row.targets for row in rows)
        with memory_guard(f"training, step {step + 1}"):
            loss = _accumulate(job, batches, (train.seed, step), ranks) / targets
            norm = _clip(job.parameters, targets, train.max_grad_norm)
            check_finite(step + 1, loss, norm, [row.where for row in rows])
            lr = lr_at(step, job.total_steps, train)
            _update(job.optimizer, lr)
        seconds = time.perf_counter() - started
        yield StepReport(step + 1, loss, lr, norm, len(rows), sum(map(len, rows)), targets, seconds)


def _accumulate(job: Job, batches: list[Sequence[Encoded]], draw: tuple[int, int], ranks: Ranks) -> float:
    """Adds up this step's gradients over its micro-batches and all processes; returns the summed loss. `draw` is
    (seed, step)."""
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for index, rows in ranks.mine(batches):
        torch.manual_seed(draw_seed(*draw, index))
        moved = collate(rows, WIDTH_MULTIPLE).to(ranks.device)
        with ranks.autocast():
            loss = loss_sum(job.model, moved.ids, moved.attention, moved.targets, moved.labels)
        loss.backward()
        total += loss.detach()
    ranks.sum_gradients(job.parameters)
    return float(ranks.sum(total))


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


def _update(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
