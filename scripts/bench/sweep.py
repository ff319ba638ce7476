"""How the cost of training grows with rank, length, vocabulary, layers and checkpointing: `qlora train` alone, CPU.

    python scripts/bench/sweep.py --out sweep.json

One axis at a time leaves the middle point: rank 64, 512 tokens, vocabulary 16,000, 2 layers of the 110m shape,
checkpointing on. Every row is full and every token a target. Each point is two processes, whose micro-batches hold
`--tokens` tokens (one row at least) and twice as many: the difference of their peaks of memory is what a token of a
micro-batch takes, and the growth is the first one's peak above that of a process that only imports. Offloaded
activations need CUDA and are not measured here. The fraction is that of `limit.py`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import child
from compare import Ran, figures
from limit import gemm
from ours import train
from workload import Spec, make

IMPORTS = "import qlora_cli.workflows.train, qlora_cli.model.nf4"


@dataclass(frozen=True)
class Point:
    """A place in the sweep."""

    rank: int = 64
    length: int = 512
    vocabulary: int = 16_000
    layers: int = 2
    checkpointing: str = "on"


AXES: Mapping[str, tuple[Any, ...]] = {
    "rank": (8, 64, 256),
    "length": (256, 512, 1024, 2048, 4096),
    "vocabulary": (16_000, 128_000),
    "layers": (2, 4, 8),
    "checkpointing": ("on", "off"),
}


def points(axes: list[str]) -> Iterator[tuple[str, Point]]:
    """(axis, point): every value of each axis, all else in the middle."""
    for axis in axes:
        for value in AXES[axis]:
            yield axis, replace(Point(), **{axis: value})


def spec_of(point: Point, micro_rows: int, args: argparse.Namespace) -> Spec:
    """A workload of whole micro-batches."""
    return Spec(
        shape=args.shape,
        full=True,
        steps=args.steps,
        batch_size=micro_rows * args.accumulation,
        micro_batch_size=micro_rows,
        max_length=point.length,
        rank=point.rank,
        optimizer="adamw",
        checkpointing=point.checkpointing,
        changes={"vocab_size": point.vocabulary, "num_hidden_layers": point.layers},
    )


def measure(point: Point, idle: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both processes of a point. `idle`: bytes of a process that only imports. Leaves nothing behind."""
    rows = max(1, args.tokens // point.length)
    whole = spec_of(point, 2 * rows, args)
    facts = make(folder, whole)
    before = gemm(folder)
    large = train(folder, args.set)
    small = train(folder, [f"train.batch_size={rows * args.accumulation}", f"train.micro_batch_size={rows}", *args.set])
    rate = (before + gemm(folder)) / 2
    shutil.rmtree(folder)
    counted = (figures(run[0][args.skip :], Ran(*run[1:]), whole, facts["counts"], rate) for run in (small, large))
    return cost(*counted, tokens=rows * point.length, idle=idle)


def cost(small: Mapping[str, Any], large: Mapping[str, Any], *, tokens: int, idle: int) -> dict[str, Any]:
    """What a point comes to, from the figures of its runs with `tokens` and twice as many in a micro-batch."""
    keys = ("tokens_per_second", "gemm_flops", "fraction", "flop_per_token")
    growth, more = small["peak_rss"] - idle, large["peak_rss"] - small["peak_rss"]
    return {key: small[key] for key in keys} | {
        "micro_batch_tokens": tokens,
        "rss_growth": growth,
        "bytes_per_token": more / tokens,
    }


def show(found: list[dict[str, Any]]) -> str:
    """A table."""
    names = ("axis", "value", "tokens/s", "MFLOP/token", "of limit", "RSS growth", "KB/token")
    lines = ["".join(f"{name:>15}" for name in names)]
    for row in found:
        values = (
            row["axis"],
            str(row["point"][row["axis"]]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['flop_per_token'] / 1e6:.0f}",
            f"{row['fraction']:.1%}",
            f"{row['rss_growth'] / 1e6:.0f} MB",
            f"{row['bytes_per_token'] / 1e3:.0f}",
        )
        lines.append("".join(f"{value:>15}" for value in values))
    return "\n".join([*lines, "checkpointing offload: not measured (needs CUDA)"])


def arguments(values: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="How the cost of `qlora train` grows, one axis at a time.")
    parser.add_argument("--axis", action="append", choices=list(AXES), help="only this one; may be given again")
    parser.add_argument("--shape", default="110m", help="one that random_base.py knows; layers and vocabulary change")
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch, one row at least")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--skip", type=int, default=1, help="first steps that count as warm-up")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override in the recipe")
    parser.add_argument("--json", action="store_true", help="newline-delimited JSON: each point, then the result")
    parser.add_argument("--out", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args(values)
    if not 0 <= args.skip < args.steps:
        parser.error("--steps must exceed --skip")
    return args


def main() -> int:
    args = arguments()
    found: list[dict[str, Any]] = []
    done: dict[Point, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place).resolve()
        idle = child.run([sys.executable, "-c", IMPORTS], root / "idle.log").peak_rss
        for axis, point in points(args.axis or list(AXES)):
            if point not in done:
                done[point] = measure(point, idle, root / "point", args)
            found.append({"event": "point", "axis": axis, "point": asdict(point), **done[point]})
            print(json.dumps(found[-1]) if args.json else f"{axis} {getattr(point, axis)} done", flush=True)
    result = {
        "event": "result",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": child.machine(),
        "versions": child.versions(sys.executable, child.OURS)[0],
        "checkpointing offload": "not measured",
        "points": found,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if args.json else show(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
