"""Whether a generated answer is right, by rules that need no judge.

Knows texts. Invariant: a score is a count of rows that were right, each of which can be read in its own record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.evaluation.intervals import mcnemar, wilson
from qlora_cli.evaluation.paired import Interval, Ratio, difference

Match = Callable[[str, str], bool]
"""(answer, what was wanted) -> whether it is right."""


def exact(answer: str, wanted: str) -> bool:
    """The very text, but for white space at its ends."""
    return answer.strip() == wanted.strip()


def contains(answer: str, wanted: str) -> bool:
    """The wanted text stands somewhere in the answer, whatever their case."""
    return wanted.strip().casefold() in answer.casefold()


def is_json(answer: str, wanted: str = "") -> bool:
    """The whole answer is one JSON value by the standard (RFC 8259), which has no NaN and no infinity."""
    try:
        json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


PLAIN: Mapping[str, Match] = {"exact": exact, "contains": contains, "json": is_json}
"""By the names that a recipe's `eval.metrics` takes."""
REGEX = "regex:"
"""What a metric begins with that is a regular expression, to be found anywhere in the answer."""


def match_of(metric: str) -> Match:
    """The rule that a metric names, as the recipe's `eval.metrics` has checked it."""
    if metric in PLAIN:
        return PLAIN[metric]
    pattern = re.compile(metric.removeprefix(REGEX))
    return lambda answer, wanted: pattern.search(answer) is not None


@dataclass(frozen=True, eq=False)
class Score:
    """Which rows a metric found right."""

    metric: str
    right: NDArray[np.bool_]

    @property
    def share(self) -> float:
        """Of all rows."""
        return float(self.right.mean())

    def line(self) -> str:
        """A few words."""
        low, high = wilson(int(self.right.sum()), len(self.right))
        count = f"{int(self.right.sum()):,} of {len(self.right):,}"
        return f"{self.metric} {self.share:.1%} [{low:.1%}, {high:.1%}] ({count})"

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the 95% interval of the share."""
        right, rows = int(self.right.sum()), len(self.right)
        low, high = wilson(right, rows)
        return {"metric": self.metric, "right": right, "rows": rows, "share": self.share, "low": low, "high": high}


def scores(metrics: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> tuple[Score, ...]:
    """A score for each metric, over the same rows."""
    found = []
    for metric in metrics:
        match = match_of(metric)
        right = [match(answer, want) for answer, want in zip(answers, wanted, strict=True)]
        found.append(Score(metric, np.array(right, np.bool_)))
    return tuple(found)


@dataclass(frozen=True)
class Compared:
    """Two models by one metric on the same rows: by how much the share of the first is above the second's, rows that
    only one of them has right, and McNemar's p-value of no difference."""

    metric: str
    difference: Interval
    only_first: int
    only_second: int
    p: float

    def line(self) -> str:
        """A few words."""
        d = self.difference
        apart = f"right here alone {self.only_first:,}, there alone {self.only_second:,}"
        return f"{self.metric} {d.mean:+.1%} [{d.low:+.1%}, {d.high:+.1%}]; {apart}; McNemar p {self.p:.2g}"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        d = self.difference
        apart = {"only_first": self.only_first, "only_second": self.only_second, "p": self.p}
        return {"difference": {"mean": d.mean, "low": d.low, "high": d.high}, "mcnemar": apart}


def compare(first: Score, second: Score) -> Compared:
    """`first` against `second`, row by row."""
    assert first.metric == second.metric and len(first.right) == len(second.right), "scores of other rows"
    one, other = int((first.right & ~second.right).sum()), int((second.right & ~first.right).sum())
    ones = np.ones(len(first.right))
    apart = difference(Ratio(second.right, ones), Ratio(first.right, ones))
    return Compared(first.metric, apart, one, other, mcnemar(one, other))
