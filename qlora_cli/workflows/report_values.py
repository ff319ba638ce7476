"""A chart's values as a table, for those who read rather than look.

Knows blocks. Invariant: every number in it was recorded at its very step; none is interpolated.
"""

from __future__ import annotations

from qlora_cli.workflows.report_blocks import UNKNOWN, Chart, Table, figure, spread

MOST = 12
"""Rows."""


def chart_table(chart: Chart) -> Table:
    """A few steps, evenly: those that all lines have, where these are some; else of any."""
    lines = [line for line in chart.lines if not line.name.endswith(", mean")]
    known = [dict(line.points) for line in lines]
    shared = set(known[0]).intersection(*known[1:])
    steps = sorted(shared) if len(shared) > 1 else sorted(set(known[0]).union(*known[1:]))
    chosen = [steps[i] for i in spread(range(len(steps)), MOST)]
    rows = tuple((f"{step:,}", *(_cell(values, step) for values in known)) for step in chosen)
    return Table(("step", *(line.name for line in lines)), rows, f"{chart.title}: values")


def _cell(values: dict[int, float | None], step: int) -> str:
    if step not in values:
        return UNKNOWN
    value = values[step]
    return "not finite" if value is None else figure(value)
