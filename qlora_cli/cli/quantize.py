"""The `quantize` command.

Knows Typer, and the workflow of that name. Invariant: it parses and hands on; nothing is decided here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from qlora_cli.cli.options import Json, Quiet

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _bytes(text: str) -> int:
    """`500MB`, `5GB` or plain bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B|)", text.strip().upper())
    count = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if count < 1:
        raise typer.BadParameter(f"{text!r} is no size; write 500MB or 5GB")
    return count


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A 16- or 32-bit model: a folder, or a Hub id.")]
Output = Annotated[
    Optional[Path],  # noqa: UP045 - Typer reads this at run time, and Python 3.10 is supported
    typer.Option("--output", "-o", metavar="DIR", help="Folder to write; without it, --compare only measures."),
]
Type = Annotated[Literal["nf4", "fp4"], typer.Option("--type", help="4-bit NormalFloat or 4-bit float.")]
DoubleQuant = Annotated[
    bool, typer.Option("--double-quant/--no-double-quant", help="Quantise the quantization constants too.")
]
Blocksize = Annotated[
    Literal["32", "64", "128", "256", "512", "1024", "2048", "4096"],
    typer.Option("--blocksize", help="Weights that share one quantization constant."),
]
Dtype = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option("--dtype", help="Type to quantise from, and of all other tensors; `auto`: that of the files."),
]
ComputeDtype = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option("--compute-dtype", help="Type that transformers is told to compute in; `auto`: as --dtype."),
]
Skip = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--skip", metavar="NAME", help="Leave layers of this name out, besides the head. Repeatable."),
]
ShardSize = Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Largest weight file, e.g. 500MB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that qlora wrote there.")]
Data = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--data", metavar="FILE", help="Rows (.jsonl) to measure loss and perplexity on, before and after."),
]
Format = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--format", metavar="NAME", help="Shape of those rows, where it is not plain from the first."),
]
MaxLength = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--max-length", min=1, help="Most tokens of a row; longer ones are left out and counted."),
]
Compare = Annotated[
    str, typer.Option("--compare", metavar="LIST", help="Measure these too, e.g. nf4,fp4,nf4-nodq,nf4-128.")
]
Plot = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--plot", metavar="FILE.png", help="Draw the error of every layer (needs the extra `plot`)."),
]


def quantize(
    model: Model,
    output: Output = None,
    kind: Type = "nf4",
    double_quant: DoubleQuant = True,
    blocksize: Blocksize = "64",
    dtype: Dtype = "auto",
    compute_dtype: ComputeDtype = "auto",
    skip: Skip = None,
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    data: Data = None,
    format_: Format = None,
    max_length: MaxLength = None,
    compare: Compare = "",
    plot: Plot = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model in 4 bits, and measure the damage.

    Prints what it did to size, weights and (with --data) loss, then the folder.
    """
    shard_bytes, variants = _bytes(shard_size), tuple(filter(None, compare.split(",")))
    if output is None and not variants:
        raise typer.BadParameter("name a folder with -o DIR, or variants to measure with --compare")

    from qlora_cli.cli.console import Console
    from qlora_cli.workflows.quantize import QuantizeOptions, run_quantize, section_of
    from qlora_cli.workflows.quiet import quiet_libraries

    quiet_libraries()
    section = section_of(kind, double_quant, int(blocksize), DTYPES[compute_dtype], skip or [])
    options = QuantizeOptions(section, output, DTYPES[dtype], shard_bytes, overwrite, variants)
    options = options.measuring(plot, data, format_, max_length)
    with Console(as_json, quiet) as console:
        result = run_quantize(model, options, console)
    console.result(result.text(), result.as_json())
