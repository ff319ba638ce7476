"""The command line.

Knows Typer, workflows, recipes and errors. Invariant: `main` is the only place that turns an exception into an exit
code, and `--help` or a refused recipe never waits for torch.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Optional

import typer

from qlora_cli import __version__
from qlora_cli.cli.options import Adapter, Json, Output, Overrides, Quiet
from qlora_cli.errors import QloraError

app = typer.Typer(
    name="qlora",
    help="Fine-tunes 4-bit language models from YAML recipes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    """Fine-tunes 4-bit language models from YAML recipes."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe, or the name of a shipped one.")],
    overrides: Overrides = None,
    output: Output = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, read the data, print the plan; load no weight.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model.

    Prints the folder that holds the adapter (or, without lora, the model).
    """
    from qlora_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])

    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.quiet import quiet_libraries
    from qlora_cli.workflows.train import plan_train, run_train

    quiet_libraries()
    console = Console(as_json, quiet)
    if dry_run:
        plan = plan_train(loaded, output, console)
        console.result(plan.line(), {"event": "result", **plan.as_json()})
        return
    with console:
        result = run_train(loaded, output, console)
    console.result(str(result.artifact), result.as_json())


@app.command(name="eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A run directory, or a recipe.")],
    adapter: Adapter = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure loss and perplexity.

    Takes the rows that the recipe holds out, and a run's adapter or a recipe's base model.
    """
    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.eval import run_eval
    from qlora_cli.workflows.quiet import quiet_libraries

    quiet_libraries()
    console = Console(as_json, quiet)
    outcome = run_eval(target, adapter, console)
    console.result(outcome.line(), outcome.as_json())


@app.command()
def chat(
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[RUN|MODEL]", help="A run directory, a model folder, or a Hub id."),
    ] = None,
    adapter: Adapter = None,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this and exit; without it, read turns from stdin."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token; higher varies more.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.01, max=1.0, help="Draw from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the draws.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Talk to a model.

    With an adapter: in the template, quantization and stop tokens that it was trained with.
    """
    if target is None and adapter is None:
        raise typer.BadParameter("name a run directory or a model, or give --adapter DIR")

    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.chat import Decoding, open_talk
    from qlora_cli.workflows.quiet import quiet_libraries

    quiet_libraries()
    console = Console(quiet=quiet)
    talk = open_talk(target, adapter, console)
    decoding = Decoding(max_tokens, temperature, top_p, seed)
    turns = [prompt] if prompt is not None else console.turns()
    for turn in turns:
        console.answer(talk.say(turn, decoding))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    _end_on_signals()
    try:
        app(args=list(argv) if argv is not None else None, prog_name="qlora")
    except SystemExit as end:
        return _code(end)
    except QloraError as error:
        from qlora_cli.cli.console import show_error

        show_error(error)
        return error.exit_code
    except Exception as error:
        from qlora_cli.cli.console import show_bug

        show_bug(error)
        return 1
    return 0


def _end_on_signals() -> None:
    """A request to end, or a terminal that closes, ends the program as Ctrl-C does: with its state written. A signal
    that was already ignored, as under nohup, stays so."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, end)


def _code(end: SystemExit) -> int:
    code = end.code if isinstance(end.code, int) else 0
    if code > 128:
        from qlora_cli.cli.console import show_interrupt

        show_interrupt()
    return code


if __name__ == "__main__":
    sys.exit(main())
