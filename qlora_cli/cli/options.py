"""Options that several commands share, each spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - Typer reads this at run time, and Python 3.10 is supported
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. -s train.lr=1e-4."),
]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--output", "-o", metavar="DIR", help="Run directory (default: the recipe's output, or out/RECIPE)."),
]
Adapter = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--adapter", metavar="DIR", help="A run directory, or an adapter folder."),
]
Json = Annotated[bool, typer.Option("--json", help="Print newline-delimited JSON events on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and errors only.")]
