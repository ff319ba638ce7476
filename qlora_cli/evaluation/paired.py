"""Two models on the same rows: the difference of their losses, and how sure it is.

Knows models and rows. Invariant: losses are sums with their counts, row by row, so that every mean is over target
tokens, and both models are compared on the very same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from qlora_cli.data.batches import WIDTH_MULTIPLE, collate, micro_batches
from qlora_cli.data.encode import Encoded
from qlora_cli.model.loss import target_logits

RESAMPLED_AT_ONCE = 1 << 22
"""Rows drawn at once, over all resamples: bounds the memory."""


@dataclass(frozen=True, eq=False)
class RowLosses:
    """Per row of the data: where it came from, the summed cross-entropy of its targets in nats, and their number."""

    where: tuple[str, ...]
    sums: NDArray[np.float64]
    targets: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Mean per target token."""
        return float(self.sums.sum() / self.targets.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds between which it lies with 95% confidence."""

    mean: float
    low: float
    high: float


@torch.inference_mode()
def row_losses(model: Any, rows: Sequence[Encoded], batch_size: int) -> RowLosses:
    """The losses of `rows` on the model's device, in the mode that the model is in. A row of the data that was encoded
    as several sequences counts as one, since they are not independent."""
    places = {where: i for i, where in enumerate(dict.fromkeys(row.where for row in rows))}
    sums, targets = np.zeros(len(places)), np.zeros(len(places), np.int64)
    for batch in micro_batches(rows, batch_size):
        moved = collate(batch, WIDTH_MULTIPLE).to(model.device)
        logits = target_logits(model, moved.ids, moved.attention, moved.targets)
        losses = cross_entropy(logits, moved.labels, reduction="none").double().cpu().numpy()
        owners = np.repeat([places[row.where] for row in batch], [row.targets for row in batch])
        np.add.at(sums, owners, losses)
        np.add.at(targets, owners, 1)
    return RowLosses(tuple(places), sums, targets)


def paired_difference(a: RowLosses, b: RowLosses, resamples: int = 10_000, seed: int = 0) -> Interval:
    """By how much the loss of `b` is above that of `a`, with the 95% interval of a paired bootstrap over rows (Efron
    and Tibshirani 1993, percentile method): rows are drawn with replacement, each mean is over target tokens."""
    assert a.where == b.where and np.array_equal(a.targets, b.targets), "the losses are not of the same rows"
    difference, targets, count = b.sums - a.sums, a.targets.astype(np.float64), len(a.where)
    generator = np.random.default_rng(seed)
    means, at_once = np.empty(resamples), max(1, RESAMPLED_AT_ONCE // count)
    for start in range(0, resamples, at_once):
        drawn = generator.integers(0, count, (min(at_once, resamples - start), count))
        means[start : start + len(drawn)] = difference[drawn].sum(1) / targets[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(difference.sum() / targets.sum()), float(low), float(high))
