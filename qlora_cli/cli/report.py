"""The `report` command.

Knows Typer and one workflow. Invariant: it parses and hands on; nothing is decided here but the format, where only the
name of the output says it.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from qlora_cli.cli.options import Json


class Format(str, Enum):
    """What a report is written as."""

    html = "html"
    md = "md"
    png = "png"


Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, also of runs that are at work.")]
Output = Annotated[
    Optional[Path],  # noqa: UP045 - Typer reads this at run time, and Python 3.10 is supported
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where to write it (default: report.html or report.png here; Markdown to stdout). "
        "Replaces an earlier report, and no other file.",
    ),
]
Kind = Annotated[
    Optional[Format],  # noqa: UP045
    typer.Option(
        "--format", help="A page, Markdown, or the curves as a picture (needs the extra `plot`).  [default: html]"
    ),
]
ENDINGS = {".html": Format.html, ".htm": Format.html, ".md": Format.md, ".png": Format.png}


def report(runs: Runs, output: Output = None, kind: Kind = None, as_json: Json = False) -> None:
    """Write a report of runs.

    One HTML page, without network: curves of all runs, figures, evaluations, samples, data, memory, merges, recipes and
    what differs between them. Prints its path. Changes nothing in the runs.
    """
    named = ENDINGS.get(output.suffix.lower()) if output else None
    if kind and named and kind is not named:
        raise typer.BadParameter(f"--format {kind.value} and -o {output} name two formats; leave one out")

    from qlora_cli.cli.console import PICTURES, Console
    from qlora_cli.workflows.quiet import quiet_libraries
    from qlora_cli.workflows.report import run_report

    quiet_libraries()
    made = run_report(runs, output, (kind or named or Format.html).value)
    Console(as_json).result(made.line().translate(PICTURES), made.as_json())
