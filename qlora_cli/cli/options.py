"""Options that several commands share, and those of the longest of them, each spelled once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qlora_cli.cli.settings import SETTINGS


class Storage(str, Enum):
    """How a model's weights are loaded."""

    auto = "auto"
    nf4 = "nf4"
    fp4 = "fp4"
    none = "none"


Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - Typer reads this at run time, and Python 3.10 is supported
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. -s train.lr=1e-4."),
]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--output", "-o", metavar="DIR", help="Run directory (default: the recipe's output, or out/RECIPE)."),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the run that is in the run directory, from its newest whole checkpoint."),
]
AllowChange = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--allow-change",
        metavar="KEY",
        help="With --resume: a key of the recipe (train.lr), or of lock.json (versions.torch), that may differ.",
    ),
]
Adapter = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--adapter", metavar="DIR", help="A run directory, or an adapter folder."),
]
Json = Annotated[bool, typer.Option("--json", help="Print newline-delimited JSON events on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and errors only.")]
AllowChangedBase = Annotated[
    bool,
    typer.Option("--allow-changed-base", help="Put the adapter on this base though it was trained on another."),
]
ChatTarget = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(metavar="[RUN|MODEL]", help="A run directory, a model folder, or a Hub id."),
]
ChatAdapters = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="A run directory, or an adapter folder. Several share a base; /adapter switches.",
    ),
]
Quantization = Annotated[
    Storage,
    typer.Option(
        "--quantization",
        help="How to load a MODEL; auto: as its files say (4-bit ones as they are, merged and tuned ones in 16 bits), "
        "else nf4.",
    ),
]
Prompt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this and exit; `-` takes all of stdin for it."),
]
Prompts = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--prompts", metavar="FILE", help="Answer the rows of a .jsonl file ({prompt} or {messages}), a JSON row each."
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts of a file that are answered at once.")]
System = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--system", metavar="TEXT", help="The system message."),
]


def _decoding(name: str, *also: str) -> Any:
    flag = f"--{name.replace('_', '-')}"
    metavar = "N" if SETTINGS[name].kind is int else "X"
    default = {"max_new_tokens": "512", "seed": "0"}.get(name, "the model's")
    return typer.Option(
        flag, *also, parser=SETTINGS[name], metavar=metavar, help=f"{SETTINGS[name].help}  [default: {default}]"
    )


MaxNewTokens = Annotated[Optional[int], _decoding("max_new_tokens", "--max-tokens")]  # noqa: UP045
Temperature = Annotated[Optional[float], _decoding("temperature")]  # noqa: UP045
TopP = Annotated[Optional[float], _decoding("top_p")]  # noqa: UP045
TopK = Annotated[Optional[int], _decoding("top_k")]  # noqa: UP045
MinP = Annotated[Optional[float], _decoding("min_p")]  # noqa: UP045
RepetitionPenalty = Annotated[Optional[float], _decoding("repetition_penalty")]  # noqa: UP045
Seed = Annotated[Optional[int], _decoding("seed")]  # noqa: UP045
