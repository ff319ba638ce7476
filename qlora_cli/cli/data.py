"""The `data` command.

Knows its options and one workflow, and how rows look on a terminal and in a pipe. Invariant: what carries loss can be
told from what does not, with colour or without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from qlora_cli.cli.options import Json, Overrides, Quiet

if TYPE_CHECKING:
    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.data import Preview
    from qlora_cli.workflows.seen import SeenRow

Pieces = Sequence[tuple[str, bool]]
"""Text, and whether it carries loss."""
Mark = Callable[[Pieces], str]
ROWS, LOST = 3, 20
SUPERVISED = "black on green"
"""A background, since blanks carry loss too."""
OPEN, CLOSE = "⟦", "⟧"


def _place(text: str) -> tuple[str, int]:
    """`FILE:LINE`."""
    file, colon, line = text.rpartition(":")
    if not (file and colon and line.isascii() and line.isdigit()):
        raise typer.BadParameter(f"write FILE:LINE, e.g. rows.jsonl:12 (got {text})")
    return file, int(line)


Recipe = Annotated[
    Optional[str],  # noqa: UP045 - Typer reads this at run time, and Python 3.10 is supported
    typer.Argument(metavar="[RECIPE]", help="A YAML recipe, or the name of a shipped one."),
]
Rows = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--rows", min=0, metavar="N", help=f"Show so many rows, spread over all.  [default: {ROWS}]"),
]
Row = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--row", metavar="FILE:LINE", help="Show this row, dropped or not, and what became of it. Repeatable."
    ),
]
HeldOut = Annotated[bool, typer.Option("--held-out", help="Take --rows from the held-out rows.")]
Lost = Annotated[
    bool, typer.Option("--lost", help="List rows that were dropped, cut, duplicate or held out too, with the reason.")
]
LostRows = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--lost-rows", min=1, metavar="N", help=f"--lost, and so many of them.  [default: {LOST}]"),
]
Clear = Annotated[
    bool, typer.Option("--clear-cache", help="Remove all encoded rows kept on disk (no RECIPE then); bases stay.")
]


def data(
    recipe: Recipe = None,
    overrides: Overrides = None,
    rows: Rows = None,
    row: Row = None,
    held_out: HeldOut = False,
    lost: Lost = False,
    lost_rows: LostRows = None,
    clear_cache: Clear = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the data as the model sees it.

    Prints what became of every row, then rows with what carries loss marked: in colour, or in ⟦ ⟧. Reads the
    tokenizer, no weights.
    """
    if clear_cache and (recipe is not None or overrides or rows is not None or row or held_out or lost or lost_rows):
        raise typer.BadParameter("--clear-cache removes the rows of every recipe; give nothing else with it")
    if not clear_cache and recipe is None:
        raise typer.BadParameter("name a recipe, or give --clear-cache")
    places = [_place(each) for each in row or []]
    if recipe is None:
        _clear(as_json, quiet)
        return

    from qlora_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])

    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.data import Wanted, preview
    from qlora_cli.workflows.quiet import quiet_libraries

    quiet_libraries()
    most = lost_rows or (LOST if lost else 0)
    sample = rows if rows is not None else 0 if places or most else ROWS
    with Console(as_json, quiet) as console:
        found = preview(loaded, Wanted(sample, held_out, places, most), console)
    _show(found, console, bool(most))
    if found.refusal is not None:
        raise found.refusal


def _clear(as_json: bool, quiet: bool) -> None:
    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.data import clear_cache
    from qlora_cli.workflows.data_text import cleared_text

    console = Console(as_json, quiet)
    done = clear_cache(console)
    console.result(cleared_text(done), done.as_json())


def _show(found: Preview, console: Console, with_lost: bool) -> None:
    from qlora_cli.workflows.data_text import heading, lost_heading, lost_line, receipt_text

    mark = _coloured if _has_colour() else _bracketed
    console.result(receipt_text(found.receipt), {"event": "receipt", **found.receipt.as_json()})
    if with_lost:
        count = {"event": "lost_rows", "count": found.all_lost, "shown": len(found.lost)}
        console.result(f"\n{lost_heading(found)}", count)
    for lost in found.lost:
        console.result(_visible(lost_line(lost)), {"event": "lost", **lost})
    for row in found.rows:
        console.result("\n".join(["", _visible(heading(row)), *_body(row, mark)]), row.as_json())


def _has_colour() -> bool:
    """Whether stdout is a terminal with colours that are wanted, or is to be taken for one (FORCE_COLOR)."""
    from rich.console import Console as RichConsole

    console = RichConsole()
    return console.is_terminal and console.color_system is not None and not console.no_color


def _body(row: SeenRow, mark: Mark) -> list[str]:
    """The row's text, or what it says where it has no tokens, or nothing where that is not known either."""
    text = mark([(_visible(piece.text), piece.supervised) for piece in row.pieces]) or _visible(row.values)
    return [text] if text else []


def _bracketed(pieces: Pieces) -> str:
    return "".join(f"{OPEN}{text}{CLOSE}" if supervised else text for text, supervised in pieces)


def _coloured(pieces: Pieces) -> str:
    """A line break has no colour to be seen, so that one which carries loss gets a sign."""
    from rich.console import Console as RichConsole
    from rich.text import Text

    console = RichConsole(highlight=False, soft_wrap=True)
    shown = [(text.replace("\n", "↵\n"), SUPERVISED) if supervised else (text, "") for text, supervised in pieces]
    with console.capture() as captured:
        console.print(Text.assemble(*shown), end="")
    return captured.get()


def _visible(text: str) -> str:
    """Control characters as pictures of themselves: a row may hold what would move a terminal's cursor, or worse."""
    from qlora_cli.cli.console import PICTURES

    return text.translate(PICTURES)
