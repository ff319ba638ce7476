"""Loss and perplexity on held-out rows.

Knows a model and rows. Invariant: means are over target tokens, never over rows or batches, and evaluating leaves the
model in the mode and with the weights that it had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_cli.data.batches import Batching
from qlora_cli.data.encode import Encoded
from qlora_cli.model.loss import LossSum
from qlora_cli.model.ranks import Ranks


@dataclass(frozen=True)
class EvalResult:
    """Mean cross-entropy per target token in nats, and over how much it was taken."""

    loss: float
    rows: int
    tokens: int
    targets: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(model: Any, loss: LossSum, rows: Sequence[Encoded], batching: Batching, ranks: Ranks) -> EvalResult:
    """Token-weighted `loss` of `model` on `rows`, shared among the processes."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for _, batch in ranks.mine(batching.split(rows)):
        moved = batching.collate(batch).to(ranks.device)
        with ranks.autocast():
            total += loss(moved.inputs, moved.targets, moved.labels)
    model.train(was_training)
    targets = sum(row.targets for row in rows)
    return EvalResult(float(ranks.sum(total)) / targets, len(rows), sum(map(len, rows)), targets)
