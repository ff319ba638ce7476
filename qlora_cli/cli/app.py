"""The command line.

Knows Typer, workflows, recipes and errors. Invariant: `main` is the only place that turns an exception into an exit
code, and `--help` or a refused recipe never waits for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import qlora_cli.cli.options as opt
from qlora_cli import __version__
from qlora_cli.cli.clean import clean_stderr
from qlora_cli.cli.data import data
from qlora_cli.cli.elo import elo
from qlora_cli.cli.eval import evaluate
from qlora_cli.cli.judge import judge
from qlora_cli.cli.merge import merge
from qlora_cli.cli.options import AllowChangedBase, Json, Output, Overrides, Quiet
from qlora_cli.cli.quantize import quantize
from qlora_cli.cli.report import report
from qlora_cli.cli.settings import SETTINGS
from qlora_cli.cli.show import show
from qlora_cli.cli.signals import end_on_signals, interruption
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


app.command()(data)


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A YAML recipe, or the name of a shipped one; with --resume also a run directory."
        ),
    ],
    overrides: Overrides = None,
    output: Output = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, read the data, print the plan; load no weight.")
    ] = False,
    resume: opt.Resume = False,
    allow_change: opt.AllowChange = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model.

    Prints the folder that holds the adapter (or, without lora, the model).
    """
    if allow_change and not resume:
        raise typer.BadParameter("--allow-change says what may differ for --resume; give that too")
    from qlora_cli.recipe.load import load_recipe

    if resume and Path(recipe).is_dir():
        recipe, output = str(Path(recipe) / "resolved.yaml"), output or Path(recipe)
    loaded = load_recipe(recipe, overrides or [])

    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.quiet import quiet_libraries
    from qlora_cli.workflows.train import plan_train, run_train

    quiet_libraries()
    console = Console(as_json, quiet)
    if dry_run:
        plan = plan_train(loaded, output, console, resume)
        console.result(plan.line(), {"event": "result", **plan.as_json()})
        return
    with console:
        result = run_train(loaded, output, console, resume, allow_change or ())
    console.result(str(result.artifact), result.as_json())


app.command(name="eval")(evaluate)
app.command()(merge)
app.command()(quantize)
app.command()(show)
app.command()(report)
app.command()(judge)
app.command()(elo)


@app.command()
def chat(
    target: opt.ChatTarget = None,
    adapter: opt.ChatAdapters = None,
    quantization: opt.Quantization = opt.Storage.auto,
    allow_changed_base: AllowChangedBase = False,
    prompt: opt.Prompt = None,
    prompts: opt.Prompts = None,
    batch_size: opt.BatchSize = 32,
    system: opt.System = None,
    max_new_tokens: opt.MaxNewTokens = None,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Talk to a model.

    With an adapter: on the base, in the template, quantization and stop tokens that it was trained with. Without
    --prompt or --prompts it reads turns: typed ones (try /help), or one per line of stdin.
    """
    given = {name: value for name, value in locals().items() if name in SETTINGS and value is not None}
    if target is None and not adapter:
        raise typer.BadParameter("name a run directory or a model, or give --adapter DIR")
    if prompt is not None and prompts is not None:
        raise typer.BadParameter("give --prompt or --prompts, not both")

    from qlora_cli.cli.console import Console
    from qlora_cli.cli.converse import answer_prompts, converse, decoding_of
    from qlora_cli.workflows.chat import check_prompts, open_talk, read_prompts
    from qlora_cli.workflows.quiet import quiet_libraries

    quiet_libraries()
    console = Console(as_json, quiet)
    rows = check_prompts(read_prompts(prompts), target, adapter, system) if prompts is not None else None
    talk = open_talk(target, adapter, console, quantization.value, allow_changed_base)
    talk.instruct(system)
    decoding = decoding_of(talk, console, given)
    if rows is not None:
        answer_prompts(talk, console, decoding, rows, batch_size)
    else:
        converse(talk, console, decoding, prompt)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    end_on_signals()
    try:
        with clean_stderr():
            app(args=list(argv) if argv is not None else None, prog_name="qlora")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        return _interrupted(code) if code > 128 else code
    except Exception as error:
        asked = interruption()  # a library's native code may have made another exception of it
        return _failed(error) if asked is None else _interrupted(asked)
    return 0


def _interrupted(code: int) -> int:
    from qlora_cli.cli.console import show_interrupt

    show_interrupt()
    return code


def _failed(error: Exception) -> int:
    from qlora_cli.cli.console import show_bug, show_error

    if isinstance(error, QloraError):
        show_error(error)
        return error.exit_code
    show_bug(error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
