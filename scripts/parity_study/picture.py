"""The table as a picture.

Knows matplotlib. Invariant: it shows every seed, and the same means and intervals as the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity_study.design import DOUBLE, FP4, FULL, NF4, SIXTEEN, Configuration
from parity_study.results import Table
from parity_study.verdict import ACCURACY, LOSS, Measure

COLOURS = {FULL: "#444444", SIXTEEN: "#0072b2", DOUBLE: "#d55e00", NF4: "#e69f00", FP4: "#cc79a7"}


def plot(tables: Mapping[int, Table], path: Path) -> None:
    """Writes a PNG: one line per configuration, its seeds as dots, mean and 95% interval; a panel per measure and
    length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(measure, steps, table) for measure in (ACCURACY, LOSS) for steps, table in tables.items()]
    shown = list(panels[0][2].parameters)
    figure = Figure(figsize=(3 + 2.9 * len(panels), 1.8 + 0.26 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (measure, steps, table) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for height, each in enumerate(shown):
            _line(axes, table, measure, each, height)
        axes.set_title(f"{steps} steps", fontsize="medium")
        axes.set_xlabel(f"{measure.title} ({measure.unit})")
        axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.set_yticks(range(len(shown)), [each.name for each in shown], fontsize="small")
    axes.invert_yaxis()
    told = f"{len(table.seeds)} seeds (dots), mean and 95% t interval; each panel has its own scale"
    figure.suptitle(told, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=72, pil_kwargs={"optimize": True})


def _line(axes: Any, table: Table, measure: Measure, each: Configuration, height: int) -> None:
    colour, of = COLOURS[each.storage], table.interval(measure.name, each)
    seeds = [value * measure.scale for value in table.values[measure.name][each]]
    axes.plot(seeds, [height] * len(seeds), "o", color=colour, markersize=3, alpha=0.35, markeredgewidth=0)
    bounds = [[(of.mean - of.low) * measure.scale], [(of.high - of.mean) * measure.scale]]
    axes.errorbar(of.mean * measure.scale, height, xerr=bounds, fmt="|", color=colour, capsize=3, linewidth=1.4)
