"""The 4-bit quantiser alone on a CPU: qlora's beside bitsandbytes' own, weight by weight.

    python scripts/bench/nf4.py --shape 1024x2816 --shape 4096x4096 --rounds 5

Each weight is normally distributed, bfloat16, and quantised to NF4 with double quantization, blocks of 64, by both in
turn. Rates are parameters/s of the median; both must give the same codes and constants, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import child

SHAPES = ("1024x1024", "2816x1024", "4096x4096", "11008x4096")
"""Of the 110m benchmark shape, and of Llama-2-7B."""


def shape_of(text: str) -> tuple[int, int]:
    """(out, in) of OUTxIN."""
    try:
        out, in_ = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not OUTxIN, as in 4096x4096") from None
    return out, in_


def measure(shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Both on one weight. Ends the program where they differ."""
    import torch

    from qlora_cli.model.nf4 import Packed, bnb_functional, quantize
    from qlora_cli.recipe.schema import QuantizationSection

    section = QuantizationSection()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    settings: dict[str, Any] = {"blocksize": section.blocksize, "compress_statistics": True, "quant_type": section.type}
    ways: dict[str, Callable[[], Packed]] = {
        "ours": lambda: quantize(weight, section),
        "peer": lambda: Packed(*bnb_functional.quantize_4bit(weight, **settings)),
    }
    seconds: dict[str, list[float]] = {who: [] for who in ways}
    made = {who: way() for who, way in ways.items()}  # the first also makes tables and threads
    for turn in range(rounds):
        for who in list(ways)[:: -1 if turn % 2 else 1]:
            started = time.perf_counter()
            made[who] = ways[who]()
            seconds[who].append(time.perf_counter() - started)
    if not same(made["ours"], made["peer"]):
        raise SystemExit(f"{shape}: the two quantisers differ")
    rates = {who: weight.numel() / statistics.median(found) for who, found in seconds.items()}
    return {"shape": shape, "parameters_per_second": rates, "ratio": rates["ours"] / rates["peer"]}


def same(one: Any, other: Any) -> bool:
    """Whether codes, constants and their constants are equal to the bit."""
    import torch

    first, second = (
        (each.codes, each.state.absmax, each.state.offset, each.state.state2.absmax) for each in (one, other)
    )
    return all(torch.equal(a.view(-1), b.view(-1)) for a, b in zip(first, second, strict=True))


def main(values: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the NF4 quantiser beside bitsandbytes' on the CPU.")
    parser.add_argument("--shape", action="append", type=shape_of, metavar="OUTxIN", help="may be given again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(values)
    found = [measure(shape, args.rounds) for shape in args.shape or map(shape_of, SHAPES)]
    if args.json:
        print(json.dumps({"machine": child.machine(), "weights": found}))
        return 0
    print(f"{'weight':>14}{'ours M/s':>12}{'peer M/s':>12}{'ratio':>8}")
    for each in found:
        rates = each["parameters_per_second"]
        name = "x".join(map(str, each["shape"]))
        print(f"{name:>14}{rates['ours'] / 1e6:>12.0f}{rates['peer'] / 1e6:>12.0f}{each['ratio']:>8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
