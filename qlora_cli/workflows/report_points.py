"""Values over the steps of a run: read, told whether they are numbers, smoothed, and thinned for drawing.

Knows numbers; nothing of files or pages. Invariant: whatever is left out, the first and the last point, the extremes
of every stretch and a gap where there is no number stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from qlora_cli.workflows.run_files import number, whole

Point = tuple[int, float | None]
"""A step, and the value there; None where it is no finite number."""
MOST = 1000
"""Points of a line."""
SMOOTH_FROM, SMOOTH_SHARE = 60, 40
"""Points from which on a noisy line gets a mean beside it, over one of so many parts of it."""
NAMED = 5


@dataclass(frozen=True)
class Series:
    """Points in the order of the steps, one for each."""

    points: tuple[Point, ...]

    @property
    def numbers(self) -> list[tuple[int, float]]:
        """Those that are numbers."""
        return [(step, value) for step, value in self.points if value is not None]

    @property
    def last(self) -> tuple[int, float] | None:
        """The newest that is a number."""
        return self.numbers[-1] if self.numbers else None

    @property
    def lowest(self) -> tuple[int, float] | None:
        """The lowest that is a number."""
        return min(self.numbers, key=lambda point: point[1], default=None)

    @property
    def gaps(self) -> str:
        """Where there is no number, in words; empty where there is one everywhere."""
        steps = [str(step) for step, value in self.points if value is None]
        if not steps:
            return ""
        more = f" and {len(steps) - NAMED:,} more" if len(steps) > NAMED else ""
        is_a, at = ("value is", "step") if len(steps) == 1 else ("values are", "steps")
        return f"{len(steps):,} {is_a} not finite ({at} {', '.join(steps[:NAMED])}{more}): a gap in the line"


def series(lines: Iterable[Mapping[str, Any]], value: str | Callable[[Mapping[str, Any]], object]) -> Series:
    """The values by the name `value`, or what it makes of each line, over the steps; lines without one do not count,
    and of those with the same step only the last."""
    found: dict[int, float | None] = {}
    for line in lines:
        step = whole(line.get("step"))
        if isinstance(value, str):
            has, got = value in line, line.get(value)
        else:
            has, got = (made := value(line)) is not None, made
        if step is not None and has:
            found[step] = number(got)
    return Series(tuple(sorted(found.items())))


def thin(points: Sequence[Point], most: int = MOST) -> tuple[Point, ...]:
    """At most `most` (at least 5) points: of each stretch the lowest, the highest and a gap."""
    if len(points) <= most:
        return tuple(points)
    stretches, inner = (most - 2) // 3, len(points) - 2
    kept = {0, len(points) - 1}
    for i in range(stretches):
        inside = range(1 + i * inner // stretches, 1 + (i + 1) * inner // stretches)
        kept |= _extremes(points, inside)
    return tuple(points[i] for i in sorted(kept))


def _extremes(points: Sequence[Point], inside: range) -> set[int]:
    known = [(value, i) for i in inside if (value := points[i][1]) is not None]
    gaps = [i for i in inside if points[i][1] is None]
    return {*([min(known)[1], max(known)[1]] if known else []), *gaps[:1]}


def smoothed(points: Sequence[Point]) -> tuple[Point, ...]:
    """The mean of the numbers around each point; nothing where there are too few."""
    if len(points) < SMOOTH_FROM:
        return ()
    half = max(2, len(points) // SMOOTH_SHARE // 2)
    sums = [0.0, *accumulate(value or 0.0 for _, value in points)]
    counts = [0, *accumulate(value is not None for _, value in points)]
    made: list[Point] = []
    for i, (step, value) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        mean = (sums[high] - sums[low]) / max(1, counts[high] - counts[low])
        made.append((step, None if value is None else mean))
    return tuple(made)
