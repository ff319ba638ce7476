"""The demo's task with every fast part of the engine, and with none: both must end at the same held-out accuracy.

    python scripts/bench/exactness.py --steps 200

Makes the demo's base and rows in a temporary folder (about a minute), trains twice, asks both adapters the 200 held-out
prompts. Exit code 1 when their exact matches are more than one point apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MOST_POINTS, MAX_TOKENS = 1.0, 64
SIDES = {"all fast parts": ("model.engine=auto",), "none": ("model.engine=plain", "train.packing=false")}


def run(*command: str) -> str:
    """A command's output; its failure ends this script."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def train(place: Path, name: str, values: tuple[str, ...], steps: int) -> Path:
    """The run directory of a training with these values of the recipe."""
    found = place / name.replace(" ", "-")
    paths = (f"model.base={place / 'base'}", f"data.train={place / 'data' / 'train.jsonl'}")
    options = [part for value in (*paths, f"train.steps={steps}", *values) for part in ("-s", value)]
    run("-m", "qlora_cli", "train", "recipes/tiny-demo.yaml", "-o", str(found), "-q", *options)
    return found


def score(found: Path, rows: list[list[dict[str, str]]], prompts: Path) -> dict[str, Any]:
    """Exact matches in percent, and the run's losses."""
    options = ("--prompts", str(prompts), "--max-new-tokens", str(MAX_TOKENS), "-q")
    lines = run("-m", "qlora_cli", "chat", "--adapter", str(found), *options).splitlines()
    right = sum(json.loads(line)["answer"] == row[1]["content"] for line, row in zip(lines, rows, strict=True))
    metrics = [json.loads(line) for line in (found / "metrics.jsonl").read_text("utf-8").splitlines()]
    last = {kind: [each["loss"] for each in metrics if each["kind"] == kind][-1] for kind in ("step", "eval")}
    return {"exact_match": 100 * right / len(rows), "loss": last["step"], "held_out_loss": last["eval"]}


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo with all fast parts and with none, and compare.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run("scripts/make_tiny_base.py", "--out", str(place / "base"))
        run("scripts/tiny_corpus.py", "--out", str(place / "data"))
        lines = (place / "data" / "heldout.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line)["messages"] for line in lines]
        prompts = place / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": row[0]["content"]}) + "\n" for row in rows), "utf-8")
        runs = {name: train(place, name, values, args.steps) for name, values in SIDES.items()}
        found = {name: score(path, rows, prompts) for name, path in runs.items()}
    if args.json:
        print(json.dumps({"steps": args.steps, **found}))
    else:
        for name, side in found.items():
            print(f"{name:<16}" + "  ".join(f"{key} {value:.4f}" for key, value in side.items()))
    one, other = (side["exact_match"] for side in found.values())
    return 1 if abs(one - other) > MOST_POINTS else 0


if __name__ == "__main__":
    sys.exit(main())
