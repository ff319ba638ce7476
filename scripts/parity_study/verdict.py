"""Verdicts in words, each a function of an interval.

Knows measures and what the paper says. Invariant: no verdict is written by hand, and none says "equal": an interval
that holds 0 shows no difference, and how large a one it could have missed.
"""

from __future__ import annotations

from dataclasses import dataclass

from parity_study.figures import Interval


@dataclass(frozen=True)
class Measure:
    """How a value is told: lower or higher is better, digits, and what it is multiplied by."""

    name: str
    title: str
    unit: str
    digits: int
    scale: float
    lower_is_better: bool

    def told(self, of: Interval) -> str:
        """Mean and bounds."""
        return of.text(self.digits, self.scale)


LOSS = Measure("loss", "held-out loss", "nats per token", 5, 1, True)
ACCURACY = Measure("accuracy", "exact match", "%", 1, 100, False)


def outcome(of: Interval, measure: Measure) -> str:
    """`same`, `better` or `worse`: what a difference, first less second, says of the first."""
    if of.holds_zero:
        return "same"
    return "better" if (of.mean < 0) == measure.lower_is_better else "worse"


def sentence(of: Interval, measure: Measure) -> str:
    """What the interval says, in words."""
    found = outcome(of, measure)
    if found == "same":
        return "no difference seen: the interval holds 0"
    size = Interval(of.mean, of.low, of.high) if of.mean > 0 else Interval(-of.mean, -of.high, -of.low)
    return f"{found} by {measure.told(size)}"


def agreement(of: Interval, measure: Measure, expected: str) -> str:
    """Whether that is what the paper says (`same` or `better`)."""
    found = outcome(of, measure)
    if found == expected:
        return "as claimed" if expected == "better" else "no contradiction"
    return "not seen" if found == "same" else "otherwise than claimed"


def summary(agreements: list[str]) -> str:
    """How many of them came out which way."""
    kinds = dict.fromkeys(agreements)
    return ", ".join(f"{kind} in {agreements.count(kind)} of {len(agreements)}" for kind in kinds)
