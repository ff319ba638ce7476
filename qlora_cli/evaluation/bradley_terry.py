"""Bradley-Terry strengths by maximum likelihood, on the scale of Elo, with an interval over questions.

Knows a table of wins and games as arrays. Invariant: a rating that is a number is the maximum of the likelihood; where
there is none, because the games do not connect the models both ways, the rating says so instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_cli.evaluation.elo import Games

Floats = NDArray[np.float64]
SCALE = 400 / math.log(10)
RESAMPLES = 1000
MOST_SPLIT = 0.01
"""Share of resamples that may have no maximum before no interval is given."""
MOST_STEPS, SMALLEST_STEP = 200, 1e-9
SAFE_STEP = 1e-3
"""Below it the likelihood is as good as quadratic, and its rounding says more than its rise."""


@dataclass(frozen=True)
class Strengths:
    """Ratings whose mean over the connected models is the start. Infinite: above (below) all connected models without
    bound. Not a number: no game, of whatever others, compares it with them."""

    ratings: tuple[float, ...]

    @property
    def separated(self) -> bool:
        """Whether some rating has no finite maximum."""
        return not all(map(math.isfinite, self.ratings))


@dataclass(frozen=True)
class Intervals:
    """95% bounds of each rating over resampled questions, None where they cannot be given; and how many of the
    resamples had no finite maximum and were left out."""

    bounds: tuple[tuple[float, float], ...] | None
    resamples: int
    split: int


def points_table(games: Games, weights: Floats | None = None) -> Floats:
    """Points of the row's model against the column's: a win is 1, a tie half a point for each; every game counts
    `weights` times."""
    count = len(games.models)
    times = np.ones(len(games)) if weights is None else weights
    forward = np.bincount(games.first * count + games.second, times * games.points, count * count)
    back = np.bincount(games.second * count + games.first, times * (1 - games.points), count * count)
    return np.asarray(forward + back, np.float64).reshape(count, count)


def bradley_terry(points: Floats, start: float = 1000.0) -> Strengths:
    """The maximum of the likelihood of P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400)) for a table of points.

    It is finite and unique where every model can be reached from every other one along wins (Ford 1957; assumption 1
    of Hunter 2004, "MM algorithms for generalized Bradley-Terry models", Annals of Statistics 32). Otherwise the
    largest group of models of which that holds is rated, and the others are above it, below it, or not compared.
    """
    reach = _reach(points > 0)
    both = reach & reach.T
    group = both[np.argmax(both.sum(1))]
    member = int(np.argmax(group))
    ratings = np.full(len(points), np.nan)
    ratings[reach[:, member]], ratings[reach[member]] = math.inf, -math.inf
    ratings[group] = start + SCALE * _maximum(points[np.ix_(group, group)])
    return Strengths(tuple(map(float, ratings)))


def _reach(wins: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the column's model can be reached from the row's along wins; every model reaches itself."""
    reach = wins | np.eye(len(wins), dtype=bool)
    for _ in range(max(1, len(wins).bit_length())):
        reach = reach @ reach
    return reach


def _maximum(points: Floats) -> Floats:
    """Natural logarithms of the strengths, mean 0, for models that are connected. Newton's method on the concave
    log-likelihood; a long step that does not raise it is halved, so that it ends."""
    games, theta, last = points + points.T, np.zeros(len(points)), math.inf
    for _ in range(MOST_STEPS if len(points) > 1 else 0):
        step = _newton_step(points, games, theta)
        size = float(np.abs(step).max())
        if size <= SMALLEST_STEP or (last / 2 < size and max(last, size) < SAFE_STEP):  # all that is left is rounding
            return theta - theta.mean()
        while np.abs(step).max() > SAFE_STEP and _likelihood(points, theta + step) < _likelihood(points, theta):
            step /= 2
        theta, last = theta + step, size
    assert len(points) == 1, "the likelihood of connected models is strictly concave and has a maximum"
    return theta


def _newton_step(points: Floats, games: Floats, theta: Floats) -> Floats:
    expected = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
    gradient = points.sum(1) - (games * expected).sum(1)
    curvature = games * expected * (1 - expected)
    laplacian = np.diag(curvature.sum(1)) - curvature
    ones = np.full_like(laplacian, curvature.sum() / len(theta) ** 2)  # fixes the mean, which the games leave open
    return np.linalg.solve(laplacian + ones, gradient)


def _likelihood(points: Floats, theta: Floats) -> float:
    return -float((points * np.logaddexp(0, theta[None, :] - theta[:, None])).sum())


def question_intervals(games: Games, questions: Sequence[str], start: float = 1000.0, seed: int = 0) -> Intervals:
    """A bootstrap over questions (Efron and Tibshirani 1993, percentile method): a question is drawn with all of its
    games, since those are not independent. None for fewer than two questions, for models that the games do not connect,
    and where more than 1% of the resamples do not connect them."""
    names = {name: i for i, name in enumerate(sorted(set(questions)))}
    if len(names) < 2 or bradley_terry(points_table(games), start).separated:
        return Intervals(None, 0, 0)
    of_game = np.array([names[name] for name in questions])
    generator, found = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = np.bincount(generator.integers(0, len(names), len(names)), minlength=len(names)).astype(np.float64)
        each = bradley_terry(points_table(games, drawn[of_game]), start)
        if not each.separated:
            found.append(each.ratings)
    split = RESAMPLES - len(found)
    if split > MOST_SPLIT * RESAMPLES:
        return Intervals(None, RESAMPLES, split)
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    return Intervals(tuple(zip(map(float, low), map(float, high), strict=True)), RESAMPLES, split)
