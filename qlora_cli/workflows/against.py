"""Two models on the same rows: how far apart, and how sure that is.

Sees what was measured of each. Invariant: only rows that both were measured on are compared, and how many were not is
said; where the models do not share their tokens, the unit is one that does not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qlora_cli.errors import DataError
from qlora_cli.evaluation.matching import Compared, Score, compare
from qlora_cli.evaluation.paired import Interval, Ratio, RowLosses, difference
from qlora_cli.evaluation.perplexity import HeldOut
from qlora_cli.workflows.sides import Side

Unit = Literal["nats per token", "bits per byte"]


@dataclass(frozen=True)
class LossGap:
    """By how much the loss of the first model is above the second's, over `rows` rows that both were measured on;
    `unpaired` were measured on one alone."""

    interval: Interval
    unit: Unit
    rows: int
    unpaired: int

    def line(self) -> str:
        """A few words."""
        i = self.interval
        alone = f"; {self.unpaired:,} rows only one of them has" if self.unpaired else ""
        return f"loss {i.mean:+.4f} [{i.low:+.4f}, {i.high:+.4f}] {self.unit}, over {self.rows:,} rows{alone}"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        i = self.interval
        counts = {"unit": self.unit, "rows": self.rows, "unpaired": self.unpaired}
        return {"mean": i.mean, "low": i.low, "high": i.high, **counts}


@dataclass(frozen=True)
class Against:
    """The first model compared with the second."""

    loss: LossGap | None
    scores: tuple[Compared, ...]
    choices: Compared | None


def against(first: Side, second: Side) -> Against:
    """`first` minus `second`, in every respect that both were measured in."""
    pairs: tuple[Compared, ...] = ()
    if first.answers is not None and second.answers is not None:
        asked = [[question.where for question in side.questions] for side in (first.answers, second.answers)]
        both = zip(first.answers.scores, second.answers.scores, strict=True)
        pairs = tuple(_compared(one, other, asked[0], asked[1]) for one, other in both)
    chosen = None
    if first.choices is not None and second.choices is not None:
        right = [np.array([row.right for row in side.outcomes], np.bool_) for side in (first.choices, second.choices)]
        chosen = compare(Score("multiple choice", right[0]), Score("multiple choice", right[1]))
    return Against(_loss_gap(first, second), pairs, chosen)


def _loss_gap(first: Side, second: Side) -> LossGap | None:
    one, other = first.losses, second.losses
    if one is None or other is None or first.held is None or second.held is None:
        return None
    mine, theirs = _paired(one.where, other.where)
    unpaired = len(one.where) + len(other.where) - 2 * len(mine)
    unit: Unit = "nats per token"
    if not _same_tokens(first.held, second.held, set(one.where) & set(other.where)):
        unit = "bits per byte"
        sized = [(a, b) for a, b in zip(mine, theirs, strict=True) if one.bytes[a] and other.bytes[b]]
        if not sized:  # answers of special tokens alone
            return None
        mine, theirs = [a for a, _ in sized], [b for _, b in sized]
    gap = difference(_ratio(other, theirs, unit), _ratio(one, mine, unit))
    return LossGap(gap, unit, len(mine), unpaired)


def _ratio(losses: RowLosses, chosen: Sequence[int], unit: Unit) -> Ratio:
    if unit == "nats per token":
        return Ratio(losses.sums[chosen], losses.targets[chosen])
    return Ratio(losses.sums[chosen] / math.log(2), losses.bytes[chosen])


def _paired(one: Sequence[str], other: Sequence[str]) -> tuple[list[int], list[int]]:
    """Places of the rows that both have. `DataError` where there are none."""
    places = {where: place for place, where in enumerate(other)}
    both = [(place, places[where]) for place, where in enumerate(one) if where in places]
    if not both:
        raise DataError(
            "no row was measured on both models",
            why="each drops the rows that are too long in its own tokens",
            fix="raise data.max_length, or compare with --data on shorter rows",
        )
    return [mine for mine, _ in both], [theirs for _, theirs in both]


def _same_tokens(first: HeldOut, second: HeldOut, both: Collection[str]) -> bool:
    """Whether both models read the very same tokens of the rows that both have, with the same targets."""
    mine, theirs = ([row for row in held.listed if row.where in both] for held in (first, second))
    return len(mine) == len(theirs) and all(
        a.where == b.where and np.array_equal(a.ids, b.ids) and np.array_equal(a.loss, b.loss)
        for a, b in zip(mine, theirs, strict=True)
    )


def _compared(first: Score, second: Score, mine: Sequence[str], theirs: Sequence[str]) -> Compared:
    places, others = _paired(mine, theirs)
    return compare(Score(first.metric, first.right[places]), Score(second.metric, second.right[others]))
