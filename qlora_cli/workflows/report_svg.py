"""Charts, intervals and bars as SVG, drawn before anybody looks.

Knows blocks and SVG. Invariant: all positions are shares of the room that there is, so that a picture is as wide as
its place while its text and strokes stay as they are; the script of the page only adds values under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from qlora_cli.workflows.report_blocks import Bars, Chart, Line, Spans, figure
from qlora_cli.workflows.report_points import Point

COLOURS, DASHES = 7, 2
"""Colours of the palette (see report.css); further runs take them again, with other dashes."""
WIDE = 1000
"""Units of a drawing's inner width and height."""
MOST_DOTS = 60
"""Points of a line up to which each is marked."""
TICKS = 5
CROSS = "\N{MULTIPLICATION SIGN}"

Range = tuple[float, float]


def colour_class(colour: int) -> str:
    """The class of a run's colour, and of its dashes where the colours came round."""
    return f"c{colour % COLOURS}" + (f" d{min(DASHES, colour // COLOURS)}" if colour >= COLOURS else "")


def ranges(chart: Chart) -> tuple[Range, Range]:
    """What the axes of a chart show: (steps, values)."""
    steps = [step for line in chart.lines for step, _ in line.points]
    first, last = min(steps), max(steps)
    return (first, last if last > first else first + 1), _value_range(chart.values)


def _value_range(values: Sequence[float]) -> Range:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    bottom = 0.0 if 0 <= low < 0.4 * high else low - margin
    return bottom, high + margin


def nice_ticks(low: float, high: float, most: int = TICKS) -> list[float]:
    """Round numbers within the range, at most about `most`."""
    raw = (high - low) / most
    if not raw > 0 or not math.isfinite(raw):
        return [low]
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * base for factor in (1, 2, 5, 10) if factor * base >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [
        round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, math.floor(high / step + 1e-9) + 1)
    ]


def chart_svg(chart: Chart, hint: str) -> str:
    """The chart; `hint` is its text for those who do not see it."""
    steps, values = ranges(chart)
    inner = "".join(_path(line, steps, values) for line in chart.lines)
    return (
        f'<svg class="plot" role="img" aria-label="{escape(hint)}">'
        f"{''.join(_grid(steps, values))}"
        f'<svg class="lines" viewBox="0 0 {WIDE} {WIDE}" preserveAspectRatio="none" width="100%" height="100%">'
        f"{inner}</svg>{''.join(_marks(chart, steps, values))}</svg>"
    )


def _grid(steps: Range, values: Range) -> Iterator[str]:
    for tick in nice_ticks(*values):
        at = _share(100 - 100 * _within(tick, values))
        yield f'<line class="grid" x1="0" x2="100%" y1="{at}%" y2="{at}%"/>'
        yield f'<text class="tick" x="-8" y="{at}%" dy="0.32em" text-anchor="end">{escape(_tick(tick))}</text>'
    for tick in nice_ticks(*steps):
        if tick != int(tick):
            continue
        share = 100 * _within(tick, steps)
        anchor = "end" if share > 97 else "start" if share < 3 else "middle"
        place = f'x="{_share(share)}%" y="100%" dy="1.6em" text-anchor="{anchor}"'
        yield f'<text class="tick" {place}>{_step(int(tick))}</text>'
    yield '<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>'


def _tick(value: float) -> str:
    return f"{value:,.4g}" if not value or 1e-3 <= abs(value) < 1000 else _thousands(value)


def _step(value: int) -> str:
    return _short(value) if value >= 100_000 else f"{value:,}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e4 else _short(value)


def _short(value: float) -> str:
    """`250k`, `1.5M`, or with an exponent."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1000 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace(".0e", "e")


def _within(value: float, ends: Range) -> float:
    return (value - ends[0]) / (ends[1] - ends[0])


def _share(value: float) -> str:
    """With one place at most."""
    return f"{value:.1f}".removesuffix(".0")


def _path(line: Line, steps: Range, values: Range) -> str:
    """A polyline with a gap wherever there is no number; a single point is a dot of it."""
    drawn = "".join(map(_run_path, _runs(_places(line.points, steps, values))))
    kind = f"line {colour_class(line.colour)}" + (" pale" if line.pale else "") + (" dash" if line.dashed else "")
    return f'<path class="{kind}" vector-effect="non-scaling-stroke" d="{drawn}"/>' if drawn else ""


def _places(points: Sequence[Point], steps: Range, values: Range) -> Iterator[tuple[float, float] | None]:
    for step, value in points:
        yield None if value is None else (WIDE * _within(step, steps), WIDE - WIDE * _within(value, values))


def _runs(places: Iterator[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """Cut at the gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for place in places:
        if place is None:
            runs.append([])
        else:
            runs[-1].append(place)
    return [run for run in runs if run]


def _run_path(run: list[tuple[float, float]]) -> str:
    (x, y), rest = run[0], run[1:]
    return f"M{_share(x)} {_share(y)}" + ("L" + " ".join(f"{_share(x)} {_share(y)}" for x, y in rest) if rest else "h0")


def _marks(chart: Chart, steps: Range, values: Range) -> Iterator[str]:
    """A dot for each of few points, and a cross where there is no number."""
    for line in chart.lines:
        kind = colour_class(line.colour).split()[0]
        few = sum(value is not None for _, value in line.points) <= MOST_DOTS
        for step, value in line.points:
            x = _share(100 * _within(step, steps))
            if value is None:
                yield f'<text class="gap {kind}" x="{x}%" y="100%" dy="-4" text-anchor="middle">{CROSS}</text>'
            elif few and not line.pale:
                y = _share(100 - 100 * _within(value, values))
                yield f'<circle class="dot {kind}" cx="{x}%" cy="{y}%" r="3"/>'


def chart_words(chart: Chart) -> str:
    """The chart in words: each line from its first to its last value."""
    said = [words for line in chart.lines if not line.pale and (words := _words(line))]
    return f"{chart.title} over the steps. {' '.join(said)}".strip()


def _words(line: Line) -> str:
    numbers = [(step, value) for step, value in line.points if value is not None]
    if not numbers:
        return f"{line.name}: no number."
    (first, start), (last, end) = numbers[0], numbers[-1]
    low = min(value for _, value in numbers)
    return (
        f"{line.name}: from {figure(start)} at step {first:,} to {figure(end)} at step {last:,}, lowest {figure(low)}."
    )


def spans_svg(spans: Spans, place: int) -> str:
    """One figure with its interval."""
    each, ends = spans.items[place], spans.ends
    low, value, high = (_share(100 * _within(at, ends)) for at in (each.low, each.value, each.high))
    kind = colour_class(each.colour).split()[0]
    return (
        f'<svg class="span" role="img" aria-label="{escape(f"{each.label}: {each.text}")}">'
        f'<line class="axis" x1="0" x2="100%" y1="50%" y2="50%"/>'
        f'<line class="whisker {kind}" x1="{low}%" x2="{high}%" y1="50%" y2="50%"/>'
        f'<circle class="dot {kind}" cx="{value}%" cy="50%" r="5"/></svg>'
    )


def bar_svg(bars: Bars, place: int) -> str:
    """One amount, its parts side by side."""
    most, each = max(bar.total for bar in bars.items) or 1.0, bars.items[place]
    kind = colour_class(each.colour).split()[0] + (" pale" if each.pale else "")
    at, drawn = 0.0, []
    for name, amount in each.parts:
        width = 100 * amount / most
        title = f"<title>{escape(name)}</title>" if name else ""
        drawn.append(f'<rect class="bar {kind}" x="{at:.2f}%" width="{width:.2f}%" height="100%">{title}</rect>')
        at += width
    return f'<svg class="amount" role="img" aria-label="{escape(f"{each.label}: {each.text}")}">{"".join(drawn)}</svg>'
