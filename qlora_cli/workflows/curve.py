"""A loss curve in plain text.

Knows numbers; nothing of files or terminals. Invariant: whatever the numbers, no line is wider than asked for, every
finite mean lies within the axes, and a value that is not finite is marked instead of being left out in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Point = tuple[int, float]
"""A step, and the loss there."""
HEIGHT = 10
LABEL = 9
"""Columns of a number beside the axis."""
NARROWEST = LABEL + 3
UPPER, LOWER, HELD_OUT, NOT_FINITE = "'", ".", "o", "!"
"""The training loss in the upper or the lower half of a cell, and what stands for the others in any half."""
LEGEND = {"'.": "training", HELD_OUT: "held out", NOT_FINITE: "not finite"}


def curve(training: Sequence[Point], held_out: Sequence[Point], width: int, height: int = HEIGHT) -> list[str]:
    """Lines of at most `width` columns (at least `NARROWEST`): both losses over the steps, the mean where several steps
    share a column; below them the axis and what the signs mean. Nothing where there is no point."""
    steps = [step for step, _ in (*training, *held_out)]
    if not steps:
        return []
    first, last, columns = min(steps), max(steps), max(1, width - LABEL - 2)
    drawn = [_binned(points, first, last, columns) for points in (training, held_out)]
    means = [mean for series in drawn for mean in series.values() if math.isfinite(mean)]
    low, high = (min(means), max(means)) if means else (math.nan, math.nan)
    cells = _cells(drawn[0], drawn[1], (low, high), height)
    labels = _labels(low, high, height)
    rows = [
        f"{labels.get(row, ''):>{LABEL}} |" + "".join(cells.get((row, column), " ") for column in range(columns))
        for row in range(height)
    ]
    return [row.rstrip() for row in rows] + _axis(first, last, columns) + _legend(set(cells.values()), width)


def _binned(points: Sequence[Point], first: int, last: int, columns: int) -> dict[int, float]:
    """The mean of each column; one that is not finite makes its column's mean so."""
    found: dict[int, list[float]] = {}
    for step, value in points:
        found.setdefault((step - first) * (columns - 1) // max(1, last - first), []).append(value)
    return {column: _mean(values) for column, values in found.items()}


def _mean(values: Sequence[float]) -> float:
    """Divided before it is added up, and kept within the values, or the largest numbers would overflow."""
    return max(min(sum(value / len(values) for value in values), max(values)), min(values))


def _cells(
    training: Mapping[int, float], held_out: Mapping[int, float], ends: tuple[float, float], height: int
) -> dict[tuple[int, int], str]:
    """(row, column) to the character there. The held-out loss hides the training loss, and what is not finite both."""
    cells = {}
    for column, mean in training.items():
        half = _half(mean, *ends, height)
        cells[half // 2, column] = LOWER if half % 2 else UPPER
    for column, mean in held_out.items():
        cells[_half(mean, *ends, height) // 2, column] = HELD_OUT
    for column, mean in (*training.items(), *held_out.items()):
        if not math.isfinite(mean):
            cells[0, column] = NOT_FINITE
    return cells


def _half(mean: float, low: float, high: float, height: int) -> int:
    """The half row, counted from the top, in which a mean lies; 0 for one that is not finite."""
    span = high / 2 - low / 2  # halved, or the largest numbers would overflow
    if not math.isfinite(mean):
        return 0
    return round((high / 2 - mean / 2) / span * (2 * height - 1)) if span > 0 else height // 2 * 2


def _labels(low: float, high: float, height: int) -> dict[int, str]:
    """Row to the number beside it."""
    if not math.isfinite(low):
        return {}
    if not high / 2 - low / 2 > 0:
        return {height // 2: _number(low)}
    return {0: _number(high), height - 1: _number(low)}


def _number(value: float) -> str:
    """In at most `LABEL` columns."""
    text = f"{value:.4g}"
    return text if len(text) <= LABEL else f"{value:.2g}"


def _axis(first: int, last: int, columns: int) -> list[str]:
    ends = f"{first}{f'{last} steps' if last > first else '':>{max(0, columns - len(str(first)))}}"
    if len(ends) > columns:
        ends = str(last)[:columns]
    return [f"{'':>{LABEL}} +{'-' * columns}", f"{'':>{LABEL + 2}}{ends}".rstrip()]


def _legend(signs: set[str], width: int) -> list[str]:
    """What the signs mean that were drawn, as far as there is room to say it."""
    text = "   ".join(f"{sign} {name}" for sign, name in LEGEND.items() if signs & set(sign))
    line = f"{'':>{LABEL + 2}}{text}"
    return [line] if len(line) <= width else []
