"""`qlora train` as its user starts it, measured: the counterpart of `peer_trl.py`.

Knows a folder that `workload.make` prepared. Invariant: nothing of an earlier run is read.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import child

KEYS = ("tokens", "targets", "loss", "seconds")


def train(folder: Path, overrides: Sequence[str]) -> tuple[list[dict[str, float]], child.Finished, bool]:
    """Runs the folder's recipe: each step's tokens, targets, loss and seconds; the process; whether activations were
    computed again."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    command: list[str | Path] = [sys.executable, "-m", "qlora_cli", "train", folder / "recipe.yaml", "-o", out]
    command += [part for value in overrides for part in ("-s", value)]
    finished = child.run(command, folder / "ours.log")
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [{key: line[key] for key in KEYS} for line in lines if line["kind"] == "step"]
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    return steps, finished, plan["checkpointing"] != "off"
