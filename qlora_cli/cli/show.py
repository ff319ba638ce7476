"""The `show` command.

Knows one workflow and how wide the terminal is. Invariant: stdout carries what was found, free of control characters.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.options import Json

NARROWEST, WIDEST = 40, 100

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


def show(run: Run, as_json: Json = False) -> None:
    """Show how a run stands.

    Prints its state, figures, loss curve and checkpoints with their validity, and how to go on. Changes nothing, and
    may be asked while the run is at work.
    """
    from qlora_cli.cli.console import PICTURES, Console
    from qlora_cli.workflows.quiet import quiet_libraries
    from qlora_cli.workflows.show import run_show
    from qlora_cli.workflows.show_text import show_text

    quiet_libraries()
    found = run_show(run)
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    Console(as_json).result(show_text(found, width).translate(PICTURES), found.as_json())
