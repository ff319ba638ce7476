"""What a report is made of, before it is a page: sections of tables, charts, figures and text.

Knows shapes and how numbers are written; nothing of runs, HTML or Markdown. Invariant: all text in it is as it was
read, so that whatever writes it out must escape it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qlora_cli.workflows.report_points import Point

UNKNOWN = "\N{EM DASH}"
"""Stands where nothing was recorded."""


@dataclass(frozen=True)
class Table:
    """`text` first columns are words, the others numbers. `colours`: of the run that a row is about, where it is about
    one. `folded`: long, and closed at first."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    text: int = 1
    colours: tuple[int, ...] = ()
    folded: bool = False


def by_run(
    title: str, head: Sequence[str], rows: Sequence[tuple[str, int, tuple[str, ...]]], text: int, several: bool
) -> Table | None:
    """A table of (name and colour of a run, cells); None where it has no row. `head` and `text` are of the cells: the
    run has a column before them where the report is about several."""
    if not rows:
        return None
    if not several:
        return Table(tuple(head), tuple(cells for *_, cells in rows), title, text)
    colours = tuple(colour for _, colour, _ in rows)
    return Table(("run", *head), tuple((name, *cells) for name, _, cells in rows), title, text + 1, colours)


@dataclass(frozen=True)
class Tile:
    """A key figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Key figures of a single run."""

    items: tuple[Tile, ...]


@dataclass(frozen=True)
class Line:
    """A line of a chart, thinned; `pale` where another one is drawn on top of it, `dashed` where it is to be told from
    one of the same colour."""

    name: str
    colour: int
    points: tuple[Point, ...]
    pale: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Values over the steps. `notes` say what is not drawn as it was recorded."""

    name: str
    title: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    wide: bool = False

    @property
    def values(self) -> list[float]:
        """All that are drawn."""
        return [value for line in self.lines for _, value in line.points if value is not None]


@dataclass(frozen=True)
class Span:
    """A figure with its interval."""

    label: str
    colour: int
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Spans:
    """Figures with intervals on a common scale."""

    title: str
    items: tuple[Span, ...]
    ends: tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """An amount, by part where it has some; `pale`: planned, not measured."""

    label: str
    colour: int
    parts: tuple[tuple[str, float], ...]
    text: str
    pale: bool = False

    @property
    def total(self) -> float:
        """All parts."""
        return sum(amount for _, amount in self.parts)


@dataclass(frozen=True)
class Bars:
    """Amounts on a common scale."""

    title: str
    items: tuple[Bar, ...]


@dataclass(frozen=True)
class Told:
    """What a run answered to a prompt: (step, answer, how it ended) as it went on. `run` is empty for the only one."""

    run: str
    colour: int
    answers: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Sample:
    """A prompt, and what each run made of it."""

    prompt: str
    told: tuple[Told, ...]


@dataclass(frozen=True)
class Note:
    """A remark; `warns` where something is wrong."""

    text: str
    warns: bool = False


Block: TypeAlias = Table | Tiles | Chart | Spans | Bars | Sample | Note


@dataclass(frozen=True)
class Section:
    """A part of the report; `anchor` is its address in the page."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""


@dataclass(frozen=True)
class Document:
    """A report. `states`: of its runs, with their names; `facts` stand below the title."""

    title: str
    states: tuple[tuple[str, str], ...]
    facts: tuple[str, ...]
    sections: tuple[Section, ...]
    made: float = field(default_factory=time.time)

    @property
    def charts(self) -> list[Chart]:
        """All of them."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Chart)]


def figure(value: float | None, digits: int = 4) -> str:
    """A number as people read it: `digits` significant ones, and no exponent where it can do without."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    size = abs(value)
    if size and not 1e-3 <= size < 1e6:
        return f"{value:.{digits - 2}e}"
    before = len(f"{size:.0f}")
    return f"{value:,.{max(0, digits - before)}f}" if size >= 1 else f"{value:.{digits}g}"


def loss_text(value: float | None) -> str:
    """A loss: with four places, as everywhere else."""
    plain = value is not None and 1e-3 <= abs(value) < 1e4
    return f"{value:.4f}" if plain else figure(value)


def count(value: float | None) -> str:
    """A whole number."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def many(value: int, name: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{value:,} {name}" + ("" if value == 1 else "s")


def percent(value: float | None) -> str:
    """A share."""
    return UNKNOWN if value is None else f"{value:.1%}"


def moment(when: float | None) -> str:
    """A point in time in words, of this machine's zone."""
    try:
        return UNKNOWN if when is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
    except (OverflowError, ValueError, OSError):  # no such time
        return UNKNOWN


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
