"""The `elo` command.

Knows Typer and one workflow. Invariant: it parses and hands on; nothing is decided here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Optional

import typer

from qlora_cli.cli.options import Json

Files = Annotated[
    list[str],
    typer.Argument(metavar="JUDGMENTS...", help="Rows (.jsonl) of verdicts, or of scores: files, folders, patterns."),
]
Orders = Annotated[
    int, typer.Option("--orders", min=1, max=1_000_000, metavar="N", help="Random orders of the games to average over.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the orders and resamples.")]
K = Annotated[float, typer.Option("--k", metavar="X", help="Points that the largest upset moves.")]
Start = Annotated[float, typer.Option("--start", metavar="X", help="Rating that all models start from.")]
Baseline = Annotated[
    Optional[str],  # noqa: UP045 - Typer reads this at run time, and Python 3.10 is supported
    typer.Option("--baseline", metavar="MODEL", help="Show ten-point scores as percent of this model's instead."),
]
Plot = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--plot", metavar="FILE.png", help="Draw the figures with intervals (needs the extra `plot`)."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave rows out that cannot be used, and count them.")]
LARGEST_K, LARGEST_START = 1000.0, 1e6


def elo(
    files: Files,
    orders: Orders = 10_000,
    seed: Seed = 0,
    k: K = 32.0,
    start: Start = 1000.0,
    baseline: Baseline = None,
    plot: Plot = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Rate models by judgments of their answers.

    Prints Elo ratings over many random orders, Bradley-Terry ratings, the win table and what the first position is
    worth; with --baseline, scores as percent of one model's.
    """
    if not 0 < k <= LARGEST_K:
        raise typer.BadParameter(f"--k must be above 0 and at most {LARGEST_K:g} (got {k:g})")
    if not (math.isfinite(start) and abs(start) <= LARGEST_START):
        raise typer.BadParameter(f"--start must be a number up to {LARGEST_START:,.0f} (got {start:g})")

    from qlora_cli.cli.console import PICTURES, Console
    from qlora_cli.workflows.elo import EloOptions, run_elo, run_percent
    from qlora_cli.workflows.elo_text import elo_text, percent_text

    options = EloOptions(orders, seed, k, start, plot, skip_bad)
    if baseline is None:
        rated = run_elo(files, options)
        text, value = elo_text(rated), rated.as_json()
    else:
        compared = run_percent(files, baseline, options)
        text, value = percent_text(compared), compared.as_json()
    Console(as_json).result(text.translate(PICTURES), value)
