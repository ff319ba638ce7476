"""The curves of a report as a picture.

Knows matplotlib, which is optional (the extra `plot`). Invariant: no text of a run is read as a formula.
"""

from __future__ import annotations

import importlib.util
import io
import textwrap
from typing import Any

from qlora_cli import __version__
from qlora_cli.errors import MachineError
from qlora_cli.workflows.report_blocks import Chart, Document

MARK = "qlora report"
"""The picture's `Software`, by which it is known as one that may be replaced."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#C0649A", "#B57F00", "#3592CC", "#1B1F24")
STYLES = ("-", "--", ":")
WIDEST = 110
"""Characters of a note on one line."""


def check_matplotlib() -> None:
    """Raises `MachineError` where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        fix = "run pip install 'qlora-cli[plot]', or take --format html, which needs nothing"
        raise MachineError("--format png needs matplotlib, which is not installed", fix=fix)


def png(document: Document) -> bytes:
    """All charts, one below the other; a picture that says so where there is none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = document.charts
    figure = Figure(figsize=(9, 0.6 + 2.9 * max(1, len(charts))), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(document.title, parse_math=False)
    panels = figure.subplots(max(1, len(charts)), squeeze=False)[:, 0]
    for axes, chart in zip(panels, charts, strict=False):
        _panel(axes, chart)
    if not charts:
        panels[0].set_title("no step was logged")
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": f"{MARK} {__version__}"})
    return buffer.getvalue()


def _panel(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        steps = [step for step, _ in line.points]
        values = [float("nan") if value is None else value for _, value in line.points]
        axes.plot(
            steps,
            values,
            color=PALETTE[line.colour % len(PALETTE)],
            linestyle="--" if line.dashed else STYLES[min(2, line.colour // len(PALETTE))],
            linewidth=0.8 if line.pale else 1.6,
            alpha=0.35 if line.pale else 1.0,
            marker="o" if len(steps) == 1 else None,
            markersize=3,
            label=None if line.pale else line.name.removesuffix(", mean"),
        )
    for text in axes.legend(fontsize="small", frameon=False).get_texts():
        text.set_parse_math(False)
    axes.set_title(chart.title, loc="left", fontsize="medium")
    said = (line for note in ("step", *chart.notes) for line in textwrap.wrap(note, WIDEST))
    axes.set_xlabel("\n".join(said), fontsize="small", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
