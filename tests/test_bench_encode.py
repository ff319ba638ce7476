"""The encoding benchmark runs, on a few rows, and compares the same tokens."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench" / "encode.py"


def run(*options: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_both_sides_are_measured_in_turn() -> None:
    found = run("--rows", "40", "--repeat", "2")
    assert found["rows"] == 40
    assert {who: len(rates) for who, rates in found["runs"].items()} == {"ours": 2, "tokenizer": 2}
    assert found["tokens_per_second"]["ours"] == pytest.approx(statistics.median(found["runs"]["ours"]))
    ratios = [ours / other for ours, other in zip(found["runs"]["ours"], found["runs"]["tokenizer"], strict=True)]
    assert found["ratio"] == pytest.approx(statistics.median(ratios))
    assert found["tokens"] > 40 * 50


def test_memory_is_measured_on_a_file_of_the_size_asked_for() -> None:
    found = run("--gigabytes", "0.003")
    assert 2e6 < found["file_bytes"] < 5e6
    assert found["peak_rss"] > 1e8
    assert found["tokens"] > 1e5
