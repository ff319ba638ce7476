"""The `judge` command.

Knows its options and one workflow. Invariant: what it will cost is said before anything is asked, and a person at a
terminal is asked for leave.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from qlora_cli.cli.options import Json, Quiet


class Grade(str, Enum):
    """What a verdict is."""

    pairwise = "pairwise"
    ten_point = "ten-point"


AnswersA = Annotated[
    Path,
    typer.Argument(metavar="ANSWERS_A", help="A .jsonl file of {prompt, answer}, as `qlora chat --prompts` writes."),
]
AnswersB = Annotated[Path, typer.Argument(metavar="ANSWERS_B", help="Another model's answers to the same prompts.")]
Model = Annotated[str, typer.Option("--model", "-m", metavar="NAME", help="The judge, as the endpoint calls it.")]
Graded = Annotated[
    Grade, typer.Option("--grade", help="Which answer is better, or a score from 1 to 10 for each of them.")
]
Judgments = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="FILE.jsonl", help="Rows for `qlora elo`; what is there is not asked again."
    ),
]
Names = Annotated[
    Optional[tuple[str, str]],  # noqa: UP045 - Typer reads this at run time, and Python 3.10 is supported
    typer.Option("--names", metavar="A B", help="What the two models are called (default: as their files)."),
]
Parallel = Annotated[int, typer.Option("--parallel", min=1, max=256, metavar="N", help="Requests at a time.")]
MaxQuestions = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--max-questions", min=1, metavar="N", help="Ask for the first N questions only."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Longest reply of the judge.")]
PriceIn = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--price-in", min=0, metavar="X", help="Price of a million tokens that are asked, for the estimate."),
]
PriceOut = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--price-out", min=0, metavar="X", help="Price of a million tokens of replies."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask the judge without asking you.")]


def judge(
    answers_a: AnswersA,
    answers_b: AnswersB,
    model: Model,
    output: Judgments,
    grade: Graded = Grade.pairwise,
    names: Names = None,
    parallel: Parallel = 4,
    max_questions: MaxQuestions = None,
    max_tokens: MaxTokens = 1024,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    yes: Yes = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a model judge the answers of two others.

    Asks the OpenAI-compatible endpoint at QLORA_JUDGE_URL (key: QLORA_JUDGE_KEY), or at OPENAI_BASE_URL
    (OPENAI_API_KEY), for every question in both orders. Tells the likely cost first.
    """
    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.judge import Price, Wanted, plan_judge, run_judge
    from qlora_cli.workflows.quiet import quiet_libraries

    quiet_libraries()
    wanted = Wanted(model, grade.value, names, parallel, max_questions, max_tokens, Price(price_in, price_out))
    with Console(as_json, quiet) as console:
        plan = plan_judge((answers_a, answers_b), output, wanted, console)
        if plan.estimate.requests and console.typed and not yes:
            if quiet:
                console.hint(plan.estimate.line())
            if (console.ask("ask the judge? [y/N] ") or "").strip().lower() not in {"y", "yes"}:
                console.hint("nothing was asked")
                raise typer.Exit
        result = run_judge(plan, console)
    console.result(result.text(), result.as_json())
