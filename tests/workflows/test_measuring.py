"""What is measured at the evaluations of a run is what `qlora eval` and `qlora chat` say of its adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli.app import main
from qlora_cli.workflows.chat import open_talk
from tests.conftest import RECIPE, write_jsonl

Recipe = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
ASKED = [{"input": f"Is {i} odd?\nAnswer:", "output": "ABCD"[i % 4], "subject": "numbers"} for i in range(6)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measuring(recipe_file: Recipe, choices: Path, data: str = "") -> Path:
    """A recipe that is evaluated in every way, every three steps."""
    section = f"eval: {{{{every: 3, metrics: [exact, 'regex:.'], samples: [q1, hello], choices: {choices}}}}}\n"
    return recipe_file(RECIPE.replace("steps: 6", "steps: 12") + section + data)


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_the_last_evaluation_is_what_eval_and_chat_find(
    recipe_file: Recipe, tmp_path: Path, capsys: Capture, engine: str
) -> None:
    choices, run = write_jsonl(tmp_path / "mmlu.jsonl", ASKED), tmp_path / "run"
    recipe = measuring(recipe_file, choices)
    assert main(["train", str(recipe), "-o", str(run), "-q", "-s", f"model.engine={engine}"]) == 0
    told = [line for line in lines(run / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["step"] for line in told] == [3, 6, 9, 12]
    capsys.readouterr()
    options = ["--metric", "exact", "--metric", "regex:.", "--choices", str(choices)]
    assert main(["eval", str(run), *options, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = told[-1]
    assert last["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert last["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-6)
    assert last["scores"] == found["scores"]
    assert last["choices"]["right"] == found["choices"]["right"]
    assert last["choices"]["loss"] == pytest.approx(found["choices"]["loss"], rel=1e-4)
    samples = lines(run / "samples.jsonl")
    assert [(each["step"], each["prompt"]) for each in samples] == [
        (s, p) for s in (3, 6, 9, 12) for p in ("q1", "hello")
    ]
    said = open_talk(str(run), None, lambda event: None).answer_all(["q1", "hello"], 256)
    assert [each["answer"] for each in samples[-2:]] == said
    assert all(each["ended"] in {"stop token", "max_new_tokens", "positions"} for each in samples)


def test_measuring_changes_nothing_of_what_is_learned(recipe_file: Recipe, tmp_path: Path) -> None:
    choices = write_jsonl(tmp_path / "mmlu.jsonl", ASKED)
    dropout = ["-s", "lora.dropout=0.1"]
    weights = []
    for name, recipe in (("with", measuring(recipe_file, choices)), ("without", None)):
        plain = recipe or recipe_file(RECIPE.replace("steps: 6", "steps: 12"))
        assert main(["train", str(plain), "-o", str(tmp_path / name), "-q", *dropout]) == 0
        weights.append((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_resumed_run_has_every_sample_once(recipe_file: Recipe, tmp_path: Path) -> None:
    choices, run = write_jsonl(tmp_path / "mmlu.jsonl", ASKED), tmp_path / "run"
    recipe = measuring(recipe_file, choices, "save: {{every: 4}}\n")
    assert main(["train", str(recipe), "-o", str(run), "-q"]) == 0
    whole = (run / "samples.jsonl").read_text()
    for folder in (run / "checkpoints").iterdir():
        if folder.name > "step-000008":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))
    assert main(["train", str(recipe), "-o", str(run), "-q", "--resume"]) == 0
    assert (run / "samples.jsonl").read_text() == whole


def test_what_cannot_be_asked_is_refused_before_weights_are_read(
    recipe_file: Recipe, tmp_path: Path, capsys: Capture
) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"input": "x", "output": "Paris", "subject": "s"}])
    recipe = measuring(recipe_file, bad)
    assert main(["train", str(recipe), "-o", str(tmp_path / "run"), "-q", "--dry-run"]) == 4
    assert f"{bad}:1" in capsys.readouterr().err
    long = recipe_file(RECIPE + f"eval: {{{{samples: [{'q' * 3000}]}}}}\n")
    assert main(["train", str(long), "-o", str(tmp_path / "run"), "-q", "--dry-run"]) == 4
    assert "positions" in capsys.readouterr().err
