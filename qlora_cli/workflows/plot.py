"""The damage by layer as a picture.

Knows matplotlib, which is optional (the extra `plot`). Invariant: its absence is found before any weight is read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_cli.errors import DiskError, MachineError
from qlora_cli.export.damage import Damage
from qlora_cli.files import disk_errors


def check_plot(path: Path | None) -> None:
    """Raises `MachineError` where a plot is wanted and matplotlib is not there, `DiskError` where it has no place."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise MachineError(
            "--plot needs matplotlib, which is not installed", fix="run pip install 'qlora-cli[plot]', or leave it out"
        )
    if path.is_dir() or path.suffix.lower() != ".png":
        raise DiskError(f"cannot write {path}: a plot is a .png file", fix="name a file, e.g. --plot damage.png")


def plot_damage(damage: Mapping[str, Damage], path: Path) -> None:
    """Writes a PNG: relative error of each layer in the order of the files, a colour for each kind of layer; one panel
    for each variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2 * len(damage)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(damage), squeeze=False, sharex=True)[:, 0]
    for axes, (name, each) in zip(panels, damage.items(), strict=True):
        _panel(axes, name, each)
    panels[0].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    panels[-1].set_xlabel("layer, in the order of the files")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def _panel(axes: Any, name: str, damage: Damage) -> None:
    kinds: dict[str, list[int]] = {}
    for position, layer in enumerate(damage.layers):
        kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append(position)
    for kind, positions in kinds.items():
        axes.plot(positions, [damage.layers[i].error for i in positions], "o", markersize=3, label=kind)
    axes.axhline(damage.error, color="grey", linewidth=1, label="all layers")
    axes.axhline(damage.limit, color="grey", linewidth=1, linestyle=":", label="outlier above")
    axes.set_ylabel("relative error")
    title = f"{name}: {damage.error:.4f} over all, {damage.bits:.3f} bits per weight"
    axes.set_title(title, loc="left", fontsize="medium")
