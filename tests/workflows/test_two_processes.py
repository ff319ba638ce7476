"""Two processes (gloo, CPU) against one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import RECIPE, write_jsonl

UNEVEN = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ab" * (1 + i % 5)}]}
    for i in range(24)
]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def processes(run: Path) -> int:
    """How many took part in a run."""
    return int(json.loads((run / "lock.json").read_text())["processes"])


def train(processes: int, recipe: Path, run: Path) -> subprocess.CompletedProcess[str]:
    """`qlora train` in one process, or under `accelerate launch`, which has no form of its own for several processes
    on a CPU: with --multi_gpu it starts them, and without a GPU they meet through gloo."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "qlora_cli"]
    command = [sys.executable, *(launcher if processes > 1 else ["-m", "qlora_cli"]), "train", str(recipe)]
    return subprocess.run([*command, "-o", str(run)], capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_two_processes_give_the_losses_and_the_adapter_of_one(
    recipe_file: Callable[..., Path], tmp_path: Path, dropout: float
) -> None:
    asked = [{"input": f"{i}?\nAnswer:", "output": "ABCD"[i % 4], "subject": "s"} for i in range(5)]
    choices = write_jsonl(tmp_path / "choices.jsonl", asked)
    measured = f"metrics: [exact, 'regex:.'], max_new_tokens: 8, samples: [q1], choices: {choices}"
    evaluation = f"eval: {{{{every: 3, batch_size: 2, {measured}}}}}\n"
    text = RECIPE.replace("alpha: 8", f"alpha: 8, dropout: {dropout}") + evaluation
    recipe = recipe_file(text, UNEVEN)
    outputs = {count: train(count, recipe, tmp_path / str(count)) for count in (1, 2)}
    assert [done.returncode for done in outputs.values()] == [0, 0], outputs[2].stderr[-3000:]
    assert [processes(tmp_path / n) for n in ("1", "2")] == [1, 2]
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert (a["kind"], a["step"], a["targets"]) == (b["kind"], b["step"], b["targets"])
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        if a["kind"] == "eval":
            assert b["scores"] == a["scores"]
            assert b["choices"]["loss"] == pytest.approx(a["choices"]["loss"], abs=1e-3)
            assert b["sources"][0]["rows"] == a["sources"][0]["rows"] == 4
    samples = [(tmp_path / n / "samples.jsonl").read_text() for n in ("1", "2")]
    assert samples[0] == samples[1]
    assert samples[0].count("\n") == 2
    adapters = [load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("1", "2")]
    assert all((adapters[0][key] - adapters[1][key]).abs().max() < 1e-4 for key in adapters[0])
    assert outputs[2].stdout.splitlines() == [str(tmp_path / "2/adapter")], "only the first process prints"
    assert outputs[2].stderr.count("step 1/6") == 1
