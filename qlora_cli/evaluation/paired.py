"""Two models on the same rows: how far apart they are, and how sure that is.

Knows sums and counts of rows. Invariant: a mean is a sum over rows divided by a sum over the same rows (of target
tokens, of bytes, of rows), and both models are compared on the very same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.batches import Batching
from qlora_cli.data.encode import Encoded
from qlora_cli.evaluation.perplexity import Counts, Floats, perplexity_of, sequence_losses
from qlora_cli.model.loss import plain_losses
from qlora_cli.model.ranks import Ranks

RESAMPLED_AT_ONCE = 1 << 22
"""Rows drawn at once, over all resamples: bounds the memory."""


@dataclass(frozen=True, eq=False)
class RowLosses:
    """Per row of the data: where it came from, the summed cross-entropy of its targets in nats, their number, and that
    of the bytes of their text (zeros where those were not counted)."""

    where: tuple[str, ...]
    sums: Floats
    targets: Counts
    bytes: Counts

    @classmethod
    def of(cls, rows: Sequence[Encoded], sums: Floats, sizes: Counts | None = None) -> RowLosses:
        """From the sums of sequences. A row of the data that was encoded as several counts as one, since they are not
        independent."""
        places = {where: i for i, where in enumerate(dict.fromkeys(row.where for row in rows))}
        owners = np.array([places[row.where] for row in rows], np.int64)

        def added(values: NDArray[Any]) -> Floats:
            return np.bincount(owners, values, len(places)).astype(np.float64)

        targets = added(np.array([row.targets for row in rows])).astype(np.int64)
        sizes = np.zeros(len(rows), np.int64) if sizes is None else sizes
        return cls(tuple(places), added(sums), targets, added(sizes).astype(np.int64))

    @property
    def loss(self) -> float:
        """Mean per target token."""
        return float(self.sums.sum() / self.targets.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return perplexity_of(self.loss)


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds between which it lies with 95% confidence."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Ratio:
    """What a mean is made of: of each row, what is added up [n], and what the sum is divided by."""

    sums: NDArray[Any]
    weights: NDArray[Any]


def row_losses(model: Any, rows: Sequence[Encoded], batch_size: int) -> RowLosses:
    """The losses of `rows` by the model's own forward, on its device."""
    batching = Batching(batch_size, 0, packed=False)
    return RowLosses.of(rows, sequence_losses(model, partial(plain_losses, model), rows, batching, Ranks(model.device)))


def paired_difference(a: RowLosses, b: RowLosses, resamples: int = 10_000, seed: int = 0) -> Interval:
    """By how much the loss of `b` is above that of `a`, a target token."""
    assert a.where == b.where and np.array_equal(a.targets, b.targets), "the losses are not of the same rows"
    return difference(Ratio(a.sums, a.targets), Ratio(b.sums, b.targets), resamples, seed)


def difference(a: Ratio, b: Ratio, resamples: int = 10_000, seed: int = 0) -> Interval:
    """By how much the mean of `b` is above that of `a`, with the 95% interval of a paired bootstrap over rows (Efron
    and Tibshirani 1993, percentile method): the same rows are drawn for both, with replacement."""
    values = np.stack([a.sums, a.weights, b.sums, b.weights], 1).astype(np.float64)
    return _bootstrap(values, lambda sums: sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1], resamples, seed)


def interval(ratio: Ratio, resamples: int = 10_000, seed: int = 0) -> Interval:
    """A mean with the 95% interval of a bootstrap over rows."""
    values = np.stack([ratio.sums, ratio.weights], 1).astype(np.float64)
    return _bootstrap(values, lambda sums: sums[..., 0] / sums[..., 1], resamples, seed)


def _bootstrap(values: Floats, statistic: Any, resamples: int, seed: int) -> Interval:
    """Of a statistic of the sums [..., k] over rows of `values` [n, k]."""
    generator, count = np.random.default_rng(seed), len(values)
    found, at_once = np.empty(resamples), max(1, RESAMPLED_AT_ONCE // count)
    for start in range(0, resamples, at_once):
        drawn = generator.integers(0, count, (min(at_once, resamples - start), count))
        sums = np.stack([column[drawn].sum(1) for column in values.T], -1)
        found[start : start + len(drawn)] = statistic(sums)
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(statistic(values.sum(0))), float(low), float(high))
