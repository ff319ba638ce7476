"""The benchmarks' random bases load and train as any other base does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qlora_cli.cli.app import main

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/bench/random_base.py"


def make(out: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script for its smallest shape."""
    command = [sys.executable, str(SCRIPT), "tiny", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_random_base_trains_and_is_never_overwritten(tmp_path: Path, recipe_file: Callable[..., Path]) -> None:
    made = make(tmp_path / "base")
    assert made.returncode == 0, made.stderr
    command = ["train", str(recipe_file()), "-s", f"model.base={tmp_path / 'base'}", "-o", str(tmp_path / "run"), "-q"]
    assert main(command) == 0
    again = make(tmp_path / "base")
    assert again.returncode == 1
    assert "exists" in again.stderr
