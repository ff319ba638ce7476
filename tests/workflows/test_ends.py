"""How runs end that do not simply finish, and what they leave."""

from __future__ import annotations

import json
import signal as signals
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_cli.cli.app import main
from tests.workflows.test_train import Recipe, train, weights


def test_a_last_evaluation_that_fails_does_not_lose_what_was_trained(
    recipe_file: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import qlora_cli.workflows.measuring as workflow

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(workflow, "evaluate", fail)
    run = tmp_path / "run"
    assert main(["train", str(recipe_file()), "-o", str(run)]) == 7
    said = capsys.readouterr().err
    assert f"what was trained is saved in {run / 'adapter'}" in said
    assert "eval.batch_size" in said
    assert "| held-out loss | not measured |" in (run / "adapter/README.md").read_text()
    monkeypatch.undo()
    assert main(["eval", str(run), "-q"]) == 0


def test_a_dry_run_of_a_directory_in_use_still_plans_and_says_so(
    recipe_file: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(recipe_file(), tmp_path / "run")
    before = weights(run)
    capsys.readouterr()
    assert main(["train", str(recipe_file()), "-o", str(run), "--dry-run"]) == 0
    assert "is not empty: the run itself would be refused" in capsys.readouterr().err
    assert weights(run) == before


def test_the_saved_recipe_names_the_directory_that_was_chosen(recipe_file: Recipe, tmp_path: Path) -> None:
    run = train(recipe_file(), tmp_path / "run")
    lines = (run / "resolved.yaml").read_text().splitlines()
    assert lines[-1] == f'output: "{run}"  # chosen for this run'
    assert (run / "adapter/recipe.yaml").read_text() == (run / "resolved.yaml").read_text()


@pytest.mark.parametrize(("signal", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_a_signal_ends_a_run_with_its_state_written(
    recipe_file: Recipe, tmp_path: Path, signal: str, code: int
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "qlora_cli",
        "train",
        str(recipe_file()),
        "-o",
        str(run),
        "-s",
        "train.steps=100000",
    ]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert any("step 2/" in line for line in child.stderr)
    child.send_signal(getattr(signals, f"SIG{signal}"))
    assert "interrupted" in child.stderr.read()
    assert child.wait(timeout=60) == code
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert not (run / "adapter").exists()


@pytest.mark.parametrize("target", ["/dev/full", "closed"])
def test_results_that_cannot_be_told_are_an_error_and_stay_saved(
    recipe_file: Recipe, tmp_path: Path, target: str
) -> None:
    run = tmp_path / "run"
    command = f"{sys.executable} -m qlora_cli train {recipe_file()} -o {run} -q " + (
        "> /dev/full" if target == "/dev/full" else "| true; exit ${PIPESTATUS[0]}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 8
    assert "cannot write to stdout" in done.stderr
    assert "Traceback" not in done.stderr
    assert (run / "adapter/adapter_model.safetensors").is_file()


def test_a_run_under_nohup_survives_its_terminal(recipe_file: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_it = [sys.executable, "-m", "qlora_cli", "train", str(recipe_file()), "-o", str(run), "-s", "train.steps=40"]
    child = subprocess.Popen(["nohup", *train_it], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert any("step 2/" in line for line in child.stderr)
    child.send_signal(signals.SIGHUP)
    assert child.communicate(timeout=120)[0] == f"{run / 'adapter'}\n"
    assert child.returncode == 0
