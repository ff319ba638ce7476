"""The `eval` command.

Knows its options and two workflows. Invariant: an option that would have no effect is a usage error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qlora_cli.cli.options import Adapter, AllowChangedBase, Json, Quiet
from qlora_cli.recipe.metrics import metric_problem

if TYPE_CHECKING:
    from qlora_cli.cli.console import Console


class How(str, Enum):
    """How the answers of `--generate` are decoded."""

    paper = "paper"
    greedy = "greedy"


Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL|RECIPE", help="A run directory, a model folder, a Hub id, or a recipe (its base)."
    ),
]
Data = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--data", metavar="FILE", help="Measure on these rows (the recipe's format) instead of its held-out ones."
    ),
]
Format = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--format", metavar="NAME", help="Shape of --data's rows, where it is not the recipe's."),
]
Against = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--against",
        metavar="base|RUN|MODEL",
        help="Measure this model too, on the same rows, and how far apart they are; `base`: the model before training.",
    ),
]
Metrics = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--metric",
        metavar="exact|contains|json|regex:PATTERN",
        help="Answer the held-out prompts, greedily, and count what is right; may be given several times.",
    ),
]
Limit = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--limit", min=1, metavar="N", help="The first N held-out rows (of --lm-eval: N rows of each task)."),
]
MaxNewTokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--max-new-tokens", min=1, help="Longest answer (default: 256; with --generate 1024)."),
]
Choices = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--choices",
        metavar="FILE",
        help="Multiple choice: rows of input (ending in `Answer:`), output (A, B, ...), subject.",
    ),
]
Tasks = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--lm-eval", metavar="TASK,...", help="Run tasks of lm-evaluation-harness (the extra lm-eval)."),
]
TaskDir = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--task-dir", metavar="DIR", help="Where the YAML files of --lm-eval's tasks are; nothing else is known then."
    ),
]
ChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="Put --lm-eval's prompts through the chat template.")
]
Generate = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--generate",
        metavar="PROMPTS",
        help="Answer the rows of a .jsonl file into the file of -o, and measure nothing; goes on where it was stopped.",
    ),
]
Decoding = Annotated[
    Optional[How],  # noqa: UP045
    typer.Option(
        "--decoding", help="With --generate: nucleus sampling (top-p 0.9, temperature 0.7), or the likeliest token."
    ),
]
Seed = Annotated[Optional[int], typer.Option("--seed", min=0, help="With --generate --decoding paper.")]  # noqa: UP045
BatchSize = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--batch-size", min=1, help="Rows at once (default: the recipe's eval.batch_size; answers 16, --generate 32)."
    ),
]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write the result as JSON (with --generate: the answers as .jsonl)."
    ),
]
Rows = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--rows", metavar="FILE", help="Write what was measured of each row, a JSON object a line."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files of --output and --rows.")]


def evaluate(
    target: Target,
    adapter: Adapter = None,
    data: Data = None,
    format_: Format = None,
    against: Against = None,
    metric: Metrics = None,
    limit: Limit = None,
    choices: Choices = None,
    lm_eval: Tasks = None,
    task_dir: TaskDir = None,
    chat_template: ChatTemplate = False,
    generate: Generate = None,
    decoding: Decoding = None,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = None,
    output: Output = None,
    rows: Rows = None,
    overwrite: Overwrite = False,
    allow_changed_base: AllowChangedBase = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model.

    Loss, perplexity and bits per byte on the rows that the recipe holds out; with --metric, answers to them; with
    --choices or --lm-eval those instead (add --data or --metric for both). A run's directory keeps the result for
    `qlora report`.
    """
    said = dict(locals())
    _check_options(said)

    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.quiet import quiet_libraries

    quiet_libraries()
    console = Console(as_json, quiet)
    if generate is not None:
        _generate(said, console)
    else:
        _measure(said, console)


def _generate(said: Mapping[str, Any], console: Console) -> None:
    """Answers prompts, as the options say."""
    from qlora_cli.workflows.generate import PAPER, Wanted, run_generate

    if Path(said["target"]).suffix.lower() in {".yaml", ".yml"}:
        raise typer.BadParameter("a recipe gives no answers; name a run or a model, e.g. the recipe's model.base")
    plain = {"temperature": 0.0, "top_p": 1.0} if said["decoding"] is How.greedy else {"seed": said["seed"] or 0}
    how = replace(PAPER, max_new_tokens=said["max_new_tokens"] or PAPER.max_new_tokens, **plain)
    wanted = Wanted(how, said["batch_size"] or Wanted.batch_size, allow_changed_base=said["allow_changed_base"])
    made = run_generate(said["target"], said["adapter"], said["generate"], said["output"], wanted, console)
    console.result(made.line(), made.as_json())


def _measure(said: Mapping[str, Any], console: Console) -> None:
    """Measures, as the options say."""
    from qlora_cli.workflows.eval import EvalRequest, Measures, run_eval
    from qlora_cli.workflows.eval_text import eval_text

    tasks = tuple(map(str.strip, said["lm_eval"].split(","))) if said["lm_eval"] else ()
    metrics = tuple(said["metric"] or ())
    measures = Measures(
        held_out=bool(said["data"] or metrics) or not (said["choices"] or tasks),
        metrics=metrics,
        max_new_tokens=said["max_new_tokens"] or Measures.max_new_tokens,
        tasks=tasks,
        **{name: said[name] for name in ("limit", "choices", "task_dir", "chat_template", "batch_size")},
    )
    places = ("target", "adapter", "data", "format_", "against", "output", "rows", "overwrite", "allow_changed_base")
    outcome = run_eval(EvalRequest(measures=measures, **{name: said[name] for name in places}), console)
    console.result(eval_text(outcome), outcome.as_json())


def _check_options(said: Mapping[str, Any]) -> None:
    """Raises a usage error for options that say nothing, or nothing together."""
    given = {name for name, value in said.items() if value is not None and value is not False}
    if empty := {name for name in given if said[name] == ""}:
        raise typer.BadParameter(f"an empty name says nothing: {_named(empty)}")
    if "generate" in given:
        idle = given - _GENERATES
        if idle:
            raise typer.BadParameter(f"--generate measures nothing; leave out {_named(idle)}")
        if "output" not in given:
            raise typer.BadParameter("--generate writes its answers to the file of -o; give that too")
    for needed, options in _NEEDS.items():
        if needed not in given and given & options:
            raise typer.BadParameter(
                f"{_named(given & options)} says something about {_named({needed})}; give that too"
            )
    if "max_new_tokens" in given and not given & {"metric", "generate"}:
        raise typer.BadParameter("--max-new-tokens limits the answers of --metric or --generate; give one of them")
    held_out = given & {"data", "metric"} or not given & {"choices", "lm_eval"}
    if "limit" in given and not held_out and "lm_eval" not in given:
        raise typer.BadParameter("--limit takes held-out rows, or --lm-eval's, but none are measured; leave it out")
    if "rows" in given and not held_out and "choices" not in given:
        raise typer.BadParameter("--rows writes held-out or multiple-choice rows, but none are measured; leave it out")
    if "overwrite" in given and not given & {"output", "rows"}:
        raise typer.BadParameter("--overwrite replaces the files of --output and --rows; give one of them")
    if {"output", "rows"} <= given and os.path.realpath(said["output"]) == os.path.realpath(said["rows"]):
        raise typer.BadParameter("--output and --rows name the same file; name another for one of them")
    for problem in filter(None, map(metric_problem, said["metric"] or ())):
        raise typer.BadParameter(f"--metric {problem}")


_GENERATES = {"target", "adapter", "generate", "decoding", "seed", "max_new_tokens", "batch_size", "output"}
_GENERATES |= {"allow_changed_base", "as_json", "quiet"}
_NEEDS = {"data": {"format_"}, "generate": {"decoding", "seed"}, "lm_eval": {"task_dir", "chat_template"}}
"""Options, and those that say something about them."""


def _named(options: set[str]) -> str:
    return ", ".join(
        "TARGET" if name == "target" else "--" + name.strip("_").replace("_", "-") for name in sorted(options)
    )
