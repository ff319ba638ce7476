"""Means with 95% t intervals.

Knows numbers only. Invariant: of one value there is a mean and no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev


@dataclass(frozen=True)
class Interval:
    """A mean and the 95% interval around it; the bounds are not numbers where one value was all there was."""

    mean: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether no difference is compatible with it; so it is without bounds."""
        return not (self.low > 0 or self.high < 0)

    def text(self, digits: int, scale: float = 1.0) -> str:
        """`mean [low, high]`."""
        mean, low, high = (f"{value * scale:.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def interval(values: Sequence[float]) -> Interval:
    """The mean with its t interval (Student 1908): mean +- t(n - 1) s / sqrt(n)."""
    mean, count = fmean(values), len(values)
    half = quantile(count - 1) * stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return Interval(mean, mean - half, mean + half)


@lru_cache
def quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t distribution, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, freedom) < 0.475 else (low, middle)
    return (low + high) / 2


def _below(bound: float, freedom: int, parts: int = 2000) -> float:
    """P(0 < t < bound), by Simpson's rule."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi * freedom)
    values = [(1 + (bound * i / parts) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(parts + 1)]
    total = values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])
    return scale * total * bound / parts / 3
