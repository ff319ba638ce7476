"""A report as one HTML page that needs nothing else: style, script, pictures and values are in it.

Knows blocks and HTML. Invariant: no text of a run reaches the page unescaped, and nothing in the page may be loaded or
run but what stands here (its content security policy says so to the browser, too).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import singledispatch
from html import escape
from pathlib import Path

from qlora_cli import __version__
from qlora_cli.workflows.report_blocks import (
    UNKNOWN,
    Bars,
    Block,
    Chart,
    Document,
    Line,
    Note,
    Sample,
    Section,
    Spans,
    Table,
    Tiles,
    Told,
    many,
    moment,
)
from qlora_cli.workflows.report_svg import bar_svg, chart_svg, chart_words, colour_class, ranges, spans_svg
from qlora_cli.workflows.report_values import chart_table

ASSETS = Path(__file__).parent / "assets"
MARK = '<meta name="generator" content="qlora report'
"""By this a page is known as one that may be replaced."""
SHORT = 28
"""Characters of a cell of words that stay on one line."""
GOOD, BUSY = ("finished",), ("starting", "running")


def html_page(document: Document) -> str:
    """The page."""
    style, script = (f"\n{(ASSETS / name).read_text(encoding='utf-8')}" for name in ("report.css", "report.js"))
    sections = "\n".join(map(_section, document.sections))
    links = "".join(f'<a href="#{each.anchor}">{escape(each.title)}</a>' for each in document.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK} {__version__}">
<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(document.title)} · qlora report</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<p class="kind">qlora run report</p>
<h1>{escape(document.title)}</h1>
<p class="facts">{_states(document)}{"".join(f"<span>{escape(fact)}</span>" for fact in document.facts)}</p>
</header>
<nav aria-label="Sections">{links}</nav>
<main>
{sections}
</main>
<footer>Made {escape(moment(document.made))} by qlora {__version__}. All of it is in this file.</footer>
<script type="application/json" id="values">{_values(document)}</script>
<script>{script}</script>
</body>
</html>
"""


def _policy(style: str, script: str) -> str:
    """Only this very style and this very script count; nothing is fetched."""
    return f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _states(document: Document) -> str:
    """The state of a single run, or of each that is not finished."""
    several = len(document.states) > 1
    shown = [each for each in document.states if not (several and each[1] in GOOD)]
    return "".join(_state(f"{name}: {state}" if several else state, state) for name, state in shown)


def _state(said: str, state: str) -> str:
    kind = "good" if state in GOOD else "busy" if state.startswith(BUSY) else "bad"
    return f'<span class="state {kind}">{escape(said)}</span>'


def _values(document: Document) -> str:
    """The charts' values for the script; no text in it can end the element or begin another."""
    values = {chart.name: _chart_values(chart) for chart in document.charts}
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _chart_values(chart: Chart) -> dict[str, object]:
    steps, values = ranges(chart)
    return {"x": steps, "y": values, "lines": [_line_values(line) for line in chart.lines]}


def _line_values(line: Line) -> dict[str, object]:
    found = [None if value is None else float(f"{value:.5g}") for _, value in line.points]
    steps = [step for step, _ in line.points]
    return {"name": line.name, "class": colour_class(line.colour).split()[0], "steps": steps, "values": found}


def _section(section: Section) -> str:
    lead = f'<p class="lead">{escape(section.lead)}</p>' if section.lead else ""
    blocks = "\n".join(map(_block, section.blocks))
    title = f'<h2 id="{section.anchor}-title">{escape(section.title)}</h2>'
    return (
        f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">{title}{lead}\n'
        f'<div class="blocks">{blocks}</div></section>'
    )


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"no such block: {block!r}")


@_block.register
def _(block: Note) -> str:
    kind, role = ("note warns", ' role="alert"') if block.warns else ("note", "")
    return f'<p class="{kind}"{role}>{_text(block.text)}</p>'


@_block.register
def _(block: Tiles) -> str:
    each = (
        f"<div><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}</dd>"
        f'<dd class="small">{escape(tile.note)}</dd></div>'
        for tile in block.items
    )
    return f'<dl class="tiles">{"".join(each)}</dl>'


@_block.register
def _(block: Table) -> str:
    if not block.folded:
        return f'<div class="block">{f"<h3>{escape(block.title)}</h3>" if block.title else ""}{_table(block)}</div>'
    return _folded(f"{block.title} ({many(len(block.rows), 'row')})", _table(block))


def _folded(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def _table(block: Table) -> str:
    head = "".join(f'<th scope="col"{_kind(i, block)}>{escape(name)}</th>' for i, name in enumerate(block.head))
    colours: Sequence[int | None] = block.colours or [None] * len(block.rows)
    rows = "".join(_row(row, colour, block) for row, colour in zip(block.rows, colours, strict=True))
    name = escape(block.title or "Summary")
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(row: Sequence[str], colour: int | None, block: Table) -> str:
    mark = "" if colour is None else f'<i class="key {colour_class(colour)}"></i>'
    cells = (f"<td{_kind(i, block) or _width(cell)}>{_text(cell)}</td>" for i, cell in enumerate(row) if i)
    return f'<tr><th scope="row"{_width(row[0])}>{mark}{_text(row[0])}</th>{"".join(cells)}</tr>'


def _kind(column: int, block: Table) -> str:
    return "" if column < block.text else ' class="number"'


def _width(cell: str) -> str:
    return "" if len(cell) <= SHORT else ' class="long"'


def _text(value: str) -> str:
    """Escaped; a break may come after each separator of a path or key."""
    return escape(value).replace("\n", "<br>") if value != UNKNOWN else f'<span class="none">{UNKNOWN}</span>'


@_block.register
def _(block: Chart) -> str:
    drawn = [line for line in block.lines if not line.pale]
    keys = "".join(map(_key, drawn)) if len(drawn) > 1 else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in block.notes)
    table = chart_table(block)
    return (
        f'<figure class="{"chart whole" if block.wide else "chart"}"><figcaption>{escape(block.title)}</figcaption>'
        f'<p class="keys">{keys}</p><div class="box" data-chart="{escape(block.name)}" tabindex="0">'
        f'{chart_svg(block, chart_words(block))}<div class="tip" hidden></div></div>'
        f'<p class="below">step</p>{f"<ul class=notes>{notes}</ul>" if notes else ""}'
        f"{_folded('Values', _table(table))}</figure>"
    )


def _key(line: Line) -> str:
    dash = " dash" if line.dashed else ""
    name = line.name.removesuffix(", mean")
    return f'<span><i class="key {colour_class(line.colour)}{dash}"></i>{escape(name)}</span>'


@_block.register
def _(block: Spans) -> str:
    rows = "".join(
        f'<div class="measure"><span>{escape(each.label)}</span><b>{escape(each.text)}</b>{spans_svg(block, i)}</div>'
        for i, each in enumerate(block.items)
    )
    ends = f'<p class="ends"><span>{block.ends[0]:.0%}</span><span>{block.ends[1]:.0%}</span></p>'
    return f'<div class="block"><h3>{escape(block.title)}</h3>{rows}{ends}</div>'


@_block.register
def _(block: Bars) -> str:
    rows = "".join(
        f'<div class="measure"><span>{escape(each.label)}</span><b>{escape(each.text)}</b>{bar_svg(block, i)}</div>'
        for i, each in enumerate(block.items)
    )
    return f'<div class="block"><h3>{escape(block.title)}</h3>{rows}</div>'


@_block.register
def _(block: Sample) -> str:
    told = "".join(map(_told, block.told))
    return f'<article class="sample"><div class="prompt">{_said(block.prompt)}</div>{told}</article>'


def _told(told: Told) -> str:
    each = (
        f'<li><span class="at">step {escape(step)}</span><div class="said">{_said(answer)}</div>'
        f"{f'<span class=small>ended: {escape(ended)}</span>' if ended else ''}</li>"
        for step, answer, ended in told.answers
    )
    run = f'<h3><i class="key {colour_class(told.colour)}"></i>{escape(told.run)}</h3>' if told.run else ""
    return f"{run}<ol>{''.join(each)}</ol>"


def _said(text: str) -> str:
    return escape(text) if text.strip() else '<span class="none">(nothing)</span>'
