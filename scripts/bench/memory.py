"""How well the plan of memory foretells a run: short runs of three sizes, planned beside measured.

    python scripts/bench/memory.py [--shapes 30m 110m] [--json FILE]

Knows `qlora train` and the plan.json that it leaves. Each case is a run in a process of its own on generated rows.
Figures are in MB: on a CPU the growth of resident memory from just before the base is read, on CUDA what was allocated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import child
import ours
import workload

CASES = {
    "defaults": (),
    "1,024 tokens": ("data.max_length=1024",),
    "not packed": ("train.packing=false",),
    "not checkpointed": ("train.gradient_checkpointing=off",),
    "rank 64": ("lora.r=64",),
    "adamw": ("train.optimizer=adamw",),
    "rank 64, adamw, not checkpointed": ("lora.r=64", "train.optimizer=adamw", "train.gradient_checkpointing=off"),
    "evaluated": ("data.eval_split=8",),
}
"""Changes to: rank 16, micro-batches of 2 x 512 tokens, packed, checkpointing, paged_adamw_8bit."""


def spec(shape: str, steps: int) -> workload.Spec:
    """The workload of a size."""
    return workload.Spec(
        shape=shape,
        full=False,
        steps=steps,
        batch_size=8,
        micro_batch_size=2,
        max_length=512,
        rank=16,
        optimizer="paged_adamw_8bit",
        checkpointing="on",
        overrides=("quantization.cache=false",),
    )


def measure(folder: Path, shape: str, case: str) -> dict[str, Any]:
    """One run."""
    ours.train(folder, [*CASES[case], "quantization.cache=false"])
    plan = json.loads((folder / "run" / "plan.json").read_text(encoding="utf-8"))
    planned, measured = plan["memory_bytes"], plan["measured_memory_bytes"]
    return {"shape": shape, "case": case, "planned": planned, "measured": measured, "parts": plan["memory"]}


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    planned, measured = found["planned"], found["measured"]
    return (
        f"| {found['shape']} | {found['case']} | {planned / 1e6:,.0f} | {measured / 1e6:,.0f} | {error(found):+.1%} |"
    )


def error(found: dict[str, Any]) -> float:
    """How much more was planned than measured, as a share."""
    return float(found["planned"] / found["measured"] - 1)


def run(shapes: Sequence[str], cases: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """All cases of all sizes."""
    results = []
    with tempfile.TemporaryDirectory() as place:
        for shape in shapes:
            workload.make(folder := Path(place) / shape, spec(shape, steps))
            for case in cases:
                results.append(measure(folder, shape, case))
                print(line(results[-1]), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Score the plan of memory against short runs.")
    parser.add_argument("--shapes", nargs="+", default=["30m", "110m", "350m"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write every result and the machine to this file")
    args = parser.parse_args()
    print("| size | case | planned | measured | error |\n|---|---|---|---|---|")
    results = run(args.shapes, args.cases, args.steps)
    errors = [abs(error(found)) for found in results]
    print(f"largest error {max(errors):.1%}, mean {sum(errors) / len(errors):.1%}")
    if args.json:
        versions, _ = child.versions(sys.executable, child.OURS)
        whole = {"machine": child.machine(), "versions": versions, "results": results}
        args.json.write_text(json.dumps(whole, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
