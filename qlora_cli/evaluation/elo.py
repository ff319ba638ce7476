"""Elo ratings over many random orders of the same games, the win table, and what the first position is worth.

Knows games as arrays, nothing of files. Invariant: each game moves as many points from one model to the other, so that
the sum of all ratings stays what it was; the result is a function of the games and the seed, not of the order of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qlora_cli.evaluation.intervals import NORMAL_95
from qlora_cli.evaluation.judgments import Verdict

Floats = NDArray[np.float64]
AT_ONCE = 1 << 24
"""Games shuffled at once, over all orders: bounds the memory."""


@dataclass(frozen=True, eq=False)
class Games:
    """Per game: the model whose answer stood first, the other one (as indexes of `models`), the points of the first
    (1, 0.5 or 0)."""

    models: tuple[str, ...]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    points: Floats

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Games:
        """The games of `verdicts`; models by name."""
        models = tuple(sorted({name for each in verdicts for name in (each.first, each.second)}))
        place = {name: i for i, name in enumerate(models)}
        first = np.array([place[each.first] for each in verdicts], np.int64)
        second = np.array([place[each.second] for each in verdicts], np.int64)
        return cls(models, first, second, np.array([each.points for each in verdicts], np.float64))

    def __len__(self) -> int:
        return len(self.points)

    def kinds(self) -> tuple[Games, NDArray[np.unsignedinteger]]:
        """(each different game once, the index in it of every game, sorted)."""
        count = len(self.models)
        keys = (self.first * count + self.second) * 3 + np.rint(2 * self.points).astype(np.int64)
        kinds, index = np.unique(keys, return_inverse=True)
        first, second = np.divmod(kinds // 3, count)
        return Games(self.models, first, second, (kinds % 3) / 2), np.sort(index.astype(np.min_scalar_type(len(kinds))))


@dataclass(frozen=True)
class EloRule:
    """A win against an equal gives `k / 2` points; all start at `start`."""

    k: float = 32.0
    start: float = 1000.0


@dataclass(frozen=True)
class Rating:
    """Over the orders: the mean rating, the 95% interval of that mean (normal; it shrinks with more orders), the
    standard deviation and the 2.5% and 97.5% quantiles of single orders. All but the mean are not numbers for one
    order. None of them says how sure the games are: that takes other games."""

    mean: float
    low: float
    high: float
    deviation: float
    spread_low: float
    spread_high: float


def elo(games: Games, orders: int, seed: int = 0, rule: EloRule | None = None) -> Floats:
    """The ratings after all games, for each of `orders` random orders: (orders, models)."""
    rule = rule or EloRule()
    kinds, index = games.kinds()
    generator, found = np.random.default_rng(seed), np.empty((orders, len(games.models)))
    at_once = max(1, AT_ONCE // len(games))
    for start in range(0, orders, at_once):
        rows = np.broadcast_to(index, (min(at_once, orders - start), len(index)))
        shuffled = np.ascontiguousarray(generator.permuted(rows, axis=1).T)
        found[start : start + len(rows)] = play(kinds, shuffled, rule)
    return found


def play(games: Games, order: NDArray[np.integer], rule: EloRule) -> Floats:
    """The ratings, (orders, models), after the games that `order`, (games, orders), names by index have been played one
    after the other: R += K (S - E) with E = 1 / (1 + 10^((R_other - R) / 400)) (Elo 1978)."""
    orders = order.shape[1]
    column, scale = np.arange(orders), math.log(10) / 400
    rows_first, rows_second = games.first * orders, games.second * orders
    ratings = np.zeros(len(games.models) * orders)  # above the start; row by row, a model's ratings of all orders
    for names in order:
        first, second = rows_first.take(names) + column, rows_second.take(names) + column
        gap = (ratings.take(second) - ratings.take(first)) * scale
        with np.errstate(over="ignore"):  # exp of a gap of 100,000 points is infinite, and 1 / (1 + inf) is right
            expected = 1 / (1 + np.exp(gap))
        won = rule.k * (games.points.take(names) - expected)
        ratings[first] += won
        ratings[second] -= won
    return ratings.reshape(len(games.models), orders).T + rule.start


def summary(ratings: Floats) -> list[Rating]:
    """What `elo` found, model by model."""
    orders = len(ratings)
    means = ratings.mean(0)
    if orders == 1:
        return [Rating(float(mean), *[math.nan] * 5) for mean in means]
    deviations, quantiles = ratings.std(0, ddof=1), np.quantile(ratings, [0.025, 0.975], axis=0)
    half = NORMAL_95 * deviations / math.sqrt(orders)
    columns = (means, means - half, means + half, deviations, *quantiles)
    return [Rating(*map(float, values)) for values in zip(*columns, strict=True)]


def win_tables(games: Games) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(games that the row's model won against the column's, games that they tied), each (models, models)."""
    count = len(games.models)
    won, tied = np.zeros((count, count), np.int64), np.zeros((count, count), np.int64)
    for winners, losers, points in ((games.first, games.second, 1.0), (games.second, games.first, 0.0)):
        np.add.at(won, (winners[games.points == points], losers[games.points == points]), 1)
        np.add.at(tied, (winners[games.points == 0.5], losers[games.points == 0.5]), 1)
    return won, tied


@dataclass(frozen=True)
class Share:
    """Mean points of the answer that stood first (0.5: no bias), with a normal 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PositionBias:
    """Games won by the first answer, by the second, and tied; then the pairs of games in which one judge saw the same
    two answers in both orders. In those the strength of the models cancels out; `paired` is None without any."""

    first: int
    second: int
    tied: int
    all: Share
    pairs: int
    same: int
    first_twice: int
    second_twice: int
    one_tied: int
    paired: Share | None


def position_bias(verdicts: Sequence[Verdict]) -> PositionBias:
    """What the first position is worth; a row that sums up both orders counts as the two judgments that it holds."""
    seen = [each for verdict in verdicts for each in _as_seen(verdict)]
    points, pairs = [each.points for each in seen], _pairs(seen)
    return PositionBias(
        first=points.count(1.0),
        second=points.count(0.0),
        tied=points.count(0.5),
        all=_share(points),
        pairs=len(pairs),
        same=sum(one + other == 1 for one, other in pairs),
        first_twice=pairs.count((1.0, 1.0)),
        second_twice=pairs.count((0.0, 0.0)),
        one_tied=sum((one == 0.5) != (other == 0.5) for one, other in pairs),
        paired=_share([(one + other) / 2 for one, other in pairs]) if pairs else None,
    )


def _as_seen(verdict: Verdict) -> list[Verdict]:
    if verdict.orders is None:
        return [verdict]
    shown_first, shown_second = verdict.orders
    turned = replace(verdict, first=verdict.second, second=verdict.first, points=1 - shown_second, orders=None)
    return [replace(verdict, points=shown_first, orders=None), turned]


def _pairs(verdicts: Sequence[Verdict]) -> list[tuple[float, float]]:
    """The points of the first answer in both orders of a pair of models, a question and a judge; where there are
    several such games, the first with the first."""
    seen: dict[tuple[str, str, str, str], tuple[list[float], list[float]]] = {}
    for each in verdicts:
        low, high = sorted((each.first, each.second))
        seen.setdefault((low, high, each.question, each.judge), ([], []))[each.first == high].append(each.points)
    return [pair for forward, back in seen.values() for pair in zip(forward, back, strict=False)]


def _share(points: Sequence[float]) -> Share:
    values = np.array(points)
    mean = float(values.mean())
    half = NORMAL_95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Share(mean, mean - half, mean + half)
