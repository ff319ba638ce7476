"""A report as Markdown: the same sections and figures, as tables.

Knows blocks and Markdown. Invariant: no text of a run can begin a table, a heading or an element of HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import singledispatch

from qlora_cli import __version__
from qlora_cli.workflows.report_blocks import (
    Bars,
    Block,
    Chart,
    Document,
    Note,
    Sample,
    Section,
    Spans,
    Table,
    Tiles,
    moment,
)
from qlora_cli.workflows.report_values import chart_table

MARK = "<!-- qlora report"
"""By this a file is known as one that may be replaced."""
_SPECIAL = re.compile(r"([\\`*_\[\]{}#|~$])")


def markdown(document: Document) -> str:
    """The report, with a line break at its end."""
    states = [f"{_text(name)}: {_text(state)}" for name, state in document.states]
    facts = ", ".join([*states, *map(_text, document.facts)])
    head = [f"{MARK} {__version__}, {moment(document.made)} -->", f"# {_text(document.title)}", facts]
    return "\n\n".join([*head, *(part for section in document.sections for part in _section(section))]) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {_text(section.title)}"
    if section.lead:
        yield _text(section.lead)
    for block in section.blocks:
        yield _block(block)


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"no such block: {block!r}")


@_block.register
def _(block: Note) -> str:
    return f"> **Warning:** {_text(block.text)}" if block.warns else _text(block.text)


@_block.register
def _(block: Tiles) -> str:
    rows = [(each.label, each.value, each.note) for each in block.items]
    return _table(("figure", "value", "note"), rows, 1, 2)


@_block.register
def _(block: Table) -> str:
    return _titled(block.title, _table(block.head, block.rows, block.text))


@_block.register
def _(block: Chart) -> str:
    values = chart_table(block)
    notes = "".join(f"\n\n{_text(note)}" for note in block.notes)
    return _titled(block.title, _table(values.head, values.rows, 1)) + notes


@_block.register
def _(block: Spans) -> str:
    return _titled(block.title, _table(("what", "figure"), [(each.label, each.text) for each in block.items], 2))


@_block.register
def _(block: Bars) -> str:
    return _titled(block.title, _table(("what", "amount"), [(each.label, each.text) for each in block.items], 1))


@_block.register
def _(block: Sample) -> str:
    named = any(told.run for told in block.told)
    rows = [(*([told.run] if named else []), *answer) for told in block.told for answer in told.answers]
    return _titled(block.prompt, _table((*(["run"] if named else []), "step", "answer", "ended"), rows, 4))


def _titled(title: str, inside: str) -> str:
    return f"### {_text(title)}\n\n{inside}" if title else inside


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int, numbers_to: int | None = None) -> str:
    """`words` columns to the left, those after them, up to `numbers_to`, to the right."""
    last = len(head) if numbers_to is None else numbers_to
    rule = ["---:" if words <= i < last else "---" for i in range(len(head))]
    shown = [[_text(name) for name in head], rule, *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in shown)


def _text(value: str) -> str:
    """On one line, with nothing that means something else there."""
    plain = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"\s*\n\s*", " / ", _SPECIAL.sub(r"\\\1", plain).strip())
