"""The `merge` command.

Knows its options and one workflow. Invariant: options that contradict each other are refused before anything is read.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qlora_cli.cli.options import Adapter, AllowChangedBase, Json, Quiet


class MergeBase(str, Enum):
    """What the delta is added to."""

    dequantized = "dequantized"
    original = "original"
    requantized = "requantized"
    auto = "auto"


class MergeDtype(str, Enum):
    """Type of the merged weights."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


Run = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(metavar="[RUN]", help="A run directory (default: the newest finished one below out/)."),
]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--output", "-o", metavar="DIR", help="Where to write (default: merged/ or portable/ in the run)."),
]
Base = Annotated[
    MergeBase,
    typer.Option(
        "--base",
        help="dequantized: the 4-bit values that training computed with; original: the 16-bit weights; requantized: "
        "dequantized, then 4 bits again (mostly erases the adapter); auto: measure all, take the best.",
    ),
]
Dtype = Annotated[
    Optional[MergeDtype],  # noqa: UP045
    typer.Option("--dtype", help="Type of the merged weights (default: bf16)."),
]
VerifyData = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--verify-data", metavar="FILE", help="Rows to compare on (default: those the run held out)."),
]
VerifyRows = Annotated[int, typer.Option("--verify-rows", min=1, help="Most rows to compare on.")]
Tolerance = Annotated[
    float, typer.Option("--tolerance", min=0.0, help="Most KL from base + adapter, in nats per token.")
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Compare nothing; the model card will say so.")]
Portable = Annotated[
    bool,
    typer.Option(
        "--portable-adapter", help="Write an adapter instead, with its scaling folded in: all servers read it alike."
    ),
]
Push = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--push", metavar="REPO", help="Upload the result to this Hub repository, private when new."),
]
Public = Annotated[bool, typer.Option("--public", help="Make a new repository of --push public.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what this command wrote there before.")]


def merge(
    run: Run = None,
    adapter: Adapter = None,
    output: Output = None,
    base: Base = MergeBase.dequantized,
    dtype: Dtype = None,
    verify_data: VerifyData = None,
    verify_rows: VerifyRows = 64,
    tolerance: Tolerance = 0.01,
    no_verify: NoVerify = False,
    portable_adapter: Portable = False,
    push: Push = None,
    public: Public = False,
    overwrite: Overwrite = False,
    allow_changed_base: AllowChangedBase = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make one model of a base and its adapter.

    Writes it tensor by tensor, reads it back, compares it with base + adapter, and prints its folder. A model that is
    not the one trained is not kept: the command then ends with exit code 5.
    """
    measured, plain = base is MergeBase.auto or verify_data, base is MergeBase.dequantized and not dtype
    for wrong, text in (
        (no_verify and measured, "--no-verify measures nothing, which --base auto and --verify-data ask for"),
        (portable_adapter and (not plain or no_verify or verify_data), "--portable-adapter merges nothing"),
        (base is MergeBase.requantized and dtype, "--base requantized keeps the type that training computed in"),
        (public and push is None, "--public says how to --push, which is not given"),
    ):
        if wrong:
            raise typer.BadParameter(text)
    options: dict[str, Any] = {"target": run, "adapter": adapter, "output": output, "overwrite": overwrite}
    options |= {"base": base.value, "dtype": dtype.value if dtype else None, "allow_changed_base": allow_changed_base}
    options |= {"verify": not no_verify, "verify_data": verify_data, "verify_rows": verify_rows, "tolerance": tolerance}
    _merge(options, portable_adapter, (push, public), (as_json, quiet))


def _merge(
    options: dict[str, Any], portable: bool, upload_to: tuple[str | None, bool], show: tuple[bool, bool]
) -> None:
    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.merge import MergeOptions, run_merge
    from qlora_cli.workflows.portable import run_portable
    from qlora_cli.workflows.quiet import quiet_libraries
    from qlora_cli.workflows.upload import check_push, upload

    quiet_libraries()
    repository, public = upload_to
    if repository is not None:
        check_push(repository)
    with Console(*show) as console:
        work = run_portable if portable else run_merge
        result = work(MergeOptions(**options), console)
        if repository is not None:
            upload(result.output, repository, public, console)
    console.result(str(result.output), result.as_json())
