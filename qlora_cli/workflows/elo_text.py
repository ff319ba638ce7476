"""What `qlora elo` says in words: tables of ratings, wins, the first position, percents.

Knows figures; nothing of terminals. Invariant: each interval stands with what it is an interval over.
"""

from __future__ import annotations

import math

from qlora_cli.evaluation.elo import PositionBias, Share
from qlora_cli.workflows.elo import MOST_NAMED, EloResult, PercentResult, Read, Standing
from qlora_cli.workflows.tables import table

_UNKNOWN = "-"


def elo_text(result: EloResult) -> str:
    """Tables for the terminal."""
    parts = [_head(result), _ratings(result), _notes(result), _wins(result), position_text(result.position)]
    return "\n\n".join([*parts, *_bad(result.read), *_plot(result)])


def percent_text(result: PercentResult) -> str:
    """The table of percents for the terminal."""
    head = ["model", "baseline first", "baseline second", "mean", "95% over questions", "questions"]
    rows = [
        [
            each.model,
            *(f"{value:.1f}%" for value in (each.baseline_first, each.baseline_second, each.mean)),
            _bounds(each.low, each.high, 1),
            f"{each.questions:,}",
        ]
        for each in result.models
    ]
    title = f"total score as percent of {result.baseline}: {_counts(result.read, 'rows')}"
    return "\n\n".join([title, table([head, *rows]), *_bad(result.read), *_plot(result)])


def _head(result: EloResult) -> str:
    options = result.options
    orders = "1 random order" if options.orders == 1 else f"{options.orders:,} random orders"
    how = f"{orders} (seed {options.seed}), K {options.k:g}, from {options.start:,g}"
    repeated = result.read.repeated
    said = f"\n{repeated:,} of the games repeat an earlier row word for word, and count again" if repeated else ""
    return f"{_counts(result.read, 'games')}\n{how}{said}"


def _counts(read: Read, rows: str) -> str:
    judges = ", ".join(f"{name or 'not named'} ({count:,})" for name, count in read.judges.items())
    questions = "1 question" if read.questions == 1 else f"{read.questions:,} questions"
    return f"{read.rows:,} {rows if read.rows != 1 else rows[:-1]} on {questions}; judge: {judges}"


def _ratings(result: EloResult) -> str:
    head = ["model", "Elo", "95% of the mean", "orders: sd", "95% of orders", "Bradley-Terry", "95% over questions"]
    return table([[*head, "games", "won", "lost", "tied"], *map(_row, result.standings)])


def _row(each: Standing) -> list[str]:
    rating, interval = each.elo, each.interval or (math.nan, math.nan)
    strength = f"{each.strength:.1f}" if each.bound is None else each.bound
    deviation = f"{rating.deviation:.1f}" if math.isfinite(rating.deviation) else _UNKNOWN
    counts = (each.won + each.lost + each.tied, each.won, each.lost, each.tied)
    return [
        each.model,
        f"{rating.mean:.1f}",
        _bounds(rating.low, rating.high, 1),
        deviation,
        _bounds(rating.spread_low, rating.spread_high, 0),
        strength,
        _bounds(*interval, 0),
        *(f"{count:,}" for count in counts),
    ]


def _bounds(low: float, high: float, digits: int) -> str:
    known = math.isfinite(low) and math.isfinite(high)
    return f"{low:.{digits}f} to {high:.{digits}f}" if known else _UNKNOWN


def _notes(result: EloResult) -> str:
    notes = [
        "95% of the mean: how well the mean over random orders is known; more orders narrow it, more games do not.",
        "95% of orders: where single orders of these very games end.",
        "95% over questions: how far the rating would move with other questions (bootstrap). Compare models by this.",
    ]
    said = {
        "above": "above: its wins lead to all others and no game leads back, so that no finite rating is most likely.",
        "below": "below: all others' wins lead to it and none of its own leads back; no finite rating is most likely.",
        "apart": "apart: no chain of games says whether it is above or below the rated models.",
    }
    notes += [text for bound, text in said.items() if any(each.bound == bound for each in result.standings)]
    if result.resamples and all(each.interval is None for each in result.standings):
        lost = f"{result.split:,} of {result.resamples:,} resamples of the questions"
        notes.append(f"No interval over questions: {lost} have no most likely rating; more games are needed.")
    return "\n".join(notes)


def _wins(result: EloResult) -> str:
    count = len(result.standings)
    head = ["games that row won + tied", *(f"({i + 1})" for i in range(count))]
    rows = [
        [
            f"({i + 1}) {each.model}",
            *("" if i == j else f"{result.won[i][j]}+{result.tied[i][j]}" for j in range(count)),
        ]
        for i, each in enumerate(result.standings)
    ]
    return table([head, *rows])


def position_text(bias: PositionBias) -> str:
    """What the first position is worth, in words."""
    lines = [
        f"first answer: won {bias.first:,}, lost {bias.second:,}, tied {bias.tied:,}; "
        f"{_share(bias.all)} points per game, where 0.500 is no bias (models not balanced)"
    ]
    if bias.paired is None:
        return f"{lines[0]}\nno question was judged in both orders, so that bias and strength cannot be told apart"
    lines.append(
        f"judged in both orders: {bias.pairs:,} pairs, {_share(bias.paired)} points for the first answer; "
        f"same verdict {bias.same:,}, first both times {bias.first_twice:,}, "
        f"second both times {bias.second_twice:,}, tied once {bias.one_tied:,}"
    )
    return "\n".join(lines)


def _share(share: Share) -> str:
    known = math.isfinite(share.low)
    return f"{share.mean:.3f} ({share.low:.3f} to {share.high:.3f})" if known else f"{share.mean:.3f}"


def _bad(read: Read) -> list[str]:
    if not read.bad:
        return []
    named = [f"  {each.where}: {each.what}" for each in read.bad[:MOST_NAMED]]
    more = [f"  and {len(read.bad) - MOST_NAMED:,} more"] if len(read.bad) > MOST_NAMED else []
    return ["\n".join([f"left out, since they cannot be used: {len(read.bad):,}", *named, *more])]


def _plot(result: EloResult | PercentResult) -> list[str]:
    return [str(result.options.plot)] if result.options.plot else []
