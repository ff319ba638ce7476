"""`qlora elo`: models rated by judgments of pairs of their answers, or their scores as percent of a baseline.

Sees files of judgments; no recipe and no model. Invariant: whatever was left out of the figures is in the result too,
with its place and number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_cli.errors import DataError, Problem
from qlora_cli.evaluation.bradley_terry import Intervals, Strengths, bradley_terry, points_table, question_intervals
from qlora_cli.evaluation.elo import EloRule, Games, PositionBias, Rating, elo, position_bias, summary, win_tables
from qlora_cli.evaluation.judgments import (
    Judgments,
    Percent,
    both_orders,
    check_bad,
    percent_of_baseline,
    read_scores,
    read_verdicts,
)
from qlora_cli.files import disk_errors

MOST_NAMED = 10
"""Bad rows that a result names; it counts all of them."""


@dataclass(frozen=True)
class EloOptions:
    """How to rate; `skip_bad` leaves rows out that cannot be used, and counts them."""

    orders: int = 10_000
    seed: int = 0
    k: float = 32.0
    start: float = 1000.0
    plot: Path | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Read:
    """What the figures are made of. `repeated` rows say the same as an earlier one, and count again."""

    files: tuple[str, ...]
    rows: int
    questions: int
    judges: dict[str, int]
    repeated: int
    bad: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values; the first bad rows by place."""
        named = [{"where": each.where, "what": each.what} for each in self.bad[:MOST_NAMED]]
        return asdict(self) | {"files": list(self.files), "bad": len(self.bad), "bad_rows": named}


@dataclass(frozen=True)
class Standing:
    """A model: its Elo rating over the orders, its Bradley-Terry rating with the interval over questions (where there
    is one), its games."""

    model: str
    elo: Rating
    strength: float
    interval: tuple[float, float] | None
    won: int
    lost: int
    tied: int

    @property
    def bound(self) -> str | None:
        """Why the Bradley-Terry rating is no number: it is above or below all others without bound, or apart."""
        if math.isfinite(self.strength):
            return None
        return "apart" if math.isnan(self.strength) else "above" if self.strength > 0 else "below"

    def as_json(self) -> dict[str, Any]:
        """Plain values, null for what is no finite number."""
        low, high = self.interval or (math.nan, math.nan)
        fitted = {"rating": self.strength, "low": low, "high": high}
        return {
            "model": self.model,
            "games": self.won + self.lost + self.tied,
            **{"won": self.won, "lost": self.lost, "tied": self.tied},
            "elo": _finite(asdict(self.elo)),
            "bradley_terry": _finite(fitted) | {"bound": self.bound},
        }


@dataclass(frozen=True)
class EloResult:
    """Ratings, best first; `won` and `tied` are tables of games, rows and columns in that order."""

    read: Read
    options: EloOptions
    standings: tuple[Standing, ...]
    won: tuple[tuple[int, ...], ...]
    tied: tuple[tuple[int, ...], ...]
    position: PositionBias
    resamples: int
    split: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        how = self.options
        return {
            "event": "result",
            **{"orders": how.orders, "seed": how.seed, "k": how.k, "start": how.start},
            **self.read.as_json(),
            "models": [each.as_json() for each in self.standings],
            "pairs": self._pairs(),
            "position": _finite(asdict(self.position)),
            "bootstrap": {"resamples": self.resamples, "without_maximum": self.split},
            "plot": str(self.options.plot) if self.options.plot else None,
        }

    def _pairs(self) -> list[dict[str, Any]]:
        names = [each.model for each in self.standings]
        return [
            {
                **{"model": names[i], "opponent": names[j]},
                **{"won": self.won[i][j], "lost": self.won[j][i], "tied": self.tied[i][j]},
            }
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ]


@dataclass(frozen=True)
class PercentResult:
    """Scores as percent of a baseline's, best model first."""

    read: Read
    options: EloOptions
    baseline: str
    models: tuple[Percent, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, null for what is no finite number."""
        return {
            "event": "result",
            **{"baseline": self.baseline, "seed": self.options.seed},
            **self.read.as_json(),
            "models": [_finite(asdict(each)) for each in self.models],
            "plot": str(self.options.plot) if self.options.plot else None,
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no word for a number that is not finite."""
    return {key: _finite(value) if isinstance(value, dict) else _number(value) for key, value in values.items()}


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_elo(paths: Sequence[str], options: EloOptions | None = None) -> EloResult:
    """Rates the models of all verdicts in `paths`.

    Raises `DataError` for rows that are no verdicts, `MachineError` or `DiskError` for a plot that cannot be drawn.
    """
    options = options or EloOptions()
    _check_plot(options.plot)
    found = read_verdicts(paths, options.skip_bad)
    games = Games.of(found.rows)
    ratings = summary(elo(games, options.orders, options.seed, EloRule(options.k, options.start)))
    strengths = bradley_terry(points_table(games), options.start)
    questions = [each.question for each in found.rows]
    intervals = question_intervals(games, questions, options.start, options.seed)
    standings = _standings(games, ratings, strengths, intervals)
    order = [games.models.index(each.model) for each in standings]
    won, tied = (tuple(tuple(map(int, row[order])) for row in table[order]) for table in win_tables(games))
    read = _of_read(found, [(r.question, r.first, r.second, r.judge, r.points) for r in found.rows])
    position = position_bias(found.rows)
    result = EloResult(read, options, standings, won, tied, position, intervals.resamples, intervals.split)
    if options.plot is not None:
        _draw(options.plot, len(standings), lambda axes: _ratings_panel(axes, result))
    return result


def _standings(games: Games, ratings: Sequence[Rating], fit: Strengths, bounds: Intervals) -> tuple[Standing, ...]:
    won, tied = win_tables(games)
    found = [
        Standing(
            model=model,
            elo=ratings[i],
            strength=fit.ratings[i],
            interval=bounds.bounds[i] if bounds.bounds else None,
            **{"won": int(won[i].sum()), "lost": int(won[:, i].sum()), "tied": int(tied[i].sum())},
        )
        for i, model in enumerate(games.models)
    ]
    return tuple(sorted(found, key=lambda each: (-each.elo.mean, each.model)))


def _of_read(found: Judgments[Any], keys: Sequence[Any], bad: Sequence[Problem] = ()) -> Read:
    judges = dict(sorted(Counter(row.judge for row in found.rows).items()))
    questions, repeated = len({row.question for row in found.rows}), len(keys) - len(set(keys))
    return Read(found.files, len(found.rows), questions, judges, repeated, (*found.bad, *bad))


def run_percent(paths: Sequence[str], baseline: str, options: EloOptions | None = None) -> PercentResult:
    """The ten-point scores in `paths` as percent of those of `baseline`.

    Raises `DataError` for rows that are no scores or that have no partner in the other order, and as `run_elo` does.
    """
    options = options or EloOptions()
    _check_plot(options.plot)
    found = read_scores(paths, options.skip_bad)
    _check_baseline(found, baseline)
    pairs, unpaired = both_orders(found.rows, baseline)
    check_bad(unpaired, options.skip_bad)
    if not pairs:
        check_bad(unpaired, skip_bad=False)
    used = [row for pair in pairs for row in (pair.baseline_first, pair.baseline_second)]
    read = _of_read(Judgments(tuple(used), found.files, found.bad), [], unpaired)
    result = PercentResult(read, options, baseline, tuple(percent_of_baseline(pairs, options.seed)))
    if options.plot is not None:
        _draw(options.plot, len(result.models), lambda axes: _percent_panel(axes, result))
    return result


def _check_baseline(found: Judgments[Any], baseline: str) -> None:
    names = sorted({name for row in found.rows for name in (row.first, row.second)})
    if baseline not in names:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        fix = f"choose --baseline from {', '.join(names[:MOST_NAMED])}{more}"
        raise DataError(f"no row has the baseline {baseline}", fix=fix, where=found.rows[0].where)


def _check_plot(path: Path | None) -> None:
    if path is not None:
        from qlora_cli.workflows.plot import check_plot  # loads torch, which nothing else here needs

        check_plot(path)


def _draw(path: Path, models: int, panel: Callable[[Any], None]) -> None:
    """Writes a PNG of one panel, a line for each model, the best at the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2 + 0.45 * models), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    panel(axes)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def _ratings_panel(axes: Any, result: EloResult) -> None:
    for i, each in enumerate(result.standings):
        rating, known = each.elo, math.isfinite(each.elo.low)
        if known:
            axes.plot([rating.spread_low, rating.spread_high], [i - 0.15] * 2, color="C0", alpha=0.35, linewidth=5)
            axes.plot([rating.low, rating.high], [i - 0.15] * 2, color="C0", linewidth=1.5)
        axes.plot([rating.mean], [i - 0.15], "o", color="C0", markersize=5)
        if each.interval is not None:
            axes.plot(each.interval, [i + 0.15] * 2, color="C1", linewidth=1.5)
        if each.bound is None:
            axes.plot([each.strength], [i + 0.15], "s", color="C1", markersize=5)
    axes.plot([], [], color="C0", alpha=0.35, linewidth=5, label="95% of single orders")
    axes.plot([], [], "o-", color="C0", label="Elo, 95% interval of the mean over orders")
    axes.plot([], [], "s-", color="C1", label="Bradley-Terry, 95% interval over questions")
    axes.set_xlabel("rating")
    _name(axes, [each.model for each in result.standings])


def _percent_panel(axes: Any, result: PercentResult) -> None:
    for i, each in enumerate(result.models):
        axes.plot([each.baseline_first], [i], "<", color="C2", markersize=5)
        axes.plot([each.baseline_second], [i], ">", color="C1", markersize=5)
        if math.isfinite(each.low) and math.isfinite(each.high):
            axes.plot([each.low, each.high], [i] * 2, color="C0", linewidth=1.5)
        axes.plot([each.mean], [i], "o", color="C0", markersize=5)
    axes.plot([], [], "o-", color="C0", label="mean of both orders, 95% interval over questions")
    axes.plot([], [], "<", color="C2", label="baseline first")
    axes.plot([], [], ">", color="C1", label="baseline second")
    axes.axvline(100, color="grey", linewidth=1)
    axes.set_xlabel("percent of the baseline's score")
    _name(axes, [each.model for each in result.models])


def _name(axes: Any, models: Sequence[str]) -> None:
    axes.set_yticks(range(len(models)), labels=models)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name may hold `$`
