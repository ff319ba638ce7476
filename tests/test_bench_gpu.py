"""The GPU benchmark runs wherever torch does, and measures nothing where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/bench/gpu.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_not_measured() -> None:
    done = run("--shape", "llama2-7b")
    assert (done.returncode, done.stdout) == (6, "")
    assert "not measured" in done.stderr


def test_a_side_is_measured_on_its_smallest_shape() -> None:
    done = run("--shape", "tiny", "--device", "cpu", "--length", "32", "--steps", "1", "--skip", "1", "--side", "ours")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["side"], found["shape"], found["length"]) == ("ours", "tiny", 32)
    assert 0 < found["limit_share"] < 10
    assert found["tokens_per_s"] > 0
