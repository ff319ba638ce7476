"""`qlora train` end to end on a tiny 4-bit model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli.cli.app import main
from qlora_cli.workflows.memory import total
from tests.conftest import RECIPE, chat_rows, make_llama

Recipe = Callable[..., Path]
FILES = {
    ".lock",
    "adapter",
    "checkpoints",
    "data_receipt.json",
    "data_rows.jsonl",
    "lock.json",
    "metrics.jsonl",
    "plan.json",
    "recipe.yaml",
    "resolved.yaml",
    "status.json",
    "train.log",
}


def train(recipe: Path, run: Path, *options: str) -> Path:
    """A run that must succeed."""
    assert main(["train", str(recipe), "-o", str(run), "-q", *options]) == 0
    return run


def weights(run: Path) -> bytes:
    """The adapter's bytes."""
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises_and_says_where(
    recipe_file: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, recipe = tmp_path / "run", recipe_file()
    assert main(["train", str(recipe), "-o", str(run)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{run / 'adapter'}\n"
    assert "\r" not in captured.err
    assert "step 6/6" in captured.err
    assert {path.name for path in run.iterdir()} == FILES
    assert (run / "recipe.yaml").read_text() == recipe.read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert json.loads((run / "data_receipt.json").read_text())["train"]["rows"] == 20
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6, 6]
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    assert any(value.any() for key, value in tensors.items() if "lora_B" in key)
    card = (run / "adapter/README.md").read_text()
    assert f"{metrics(run)[-1]['loss']:.4f}" in card
    assert not [path for path in run.rglob("*") if path.name.startswith((".tmp", ".trash"))]


def test_the_same_recipe_twice_gives_the_same_adapter_bit_for_bit(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe = recipe_file(RECIPE.replace("alpha: 8", "alpha: 8, dropout: 0.1"))
    assert weights(train(recipe, tmp_path / "1")) == weights(train(recipe, tmp_path / "2"))
    other = train(recipe, tmp_path / "3", "-s", "train.seed=1")
    assert weights(other) != weights(tmp_path / "1")


def test_evaluating_in_between_does_not_change_what_is_learned(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe = recipe_file(RECIPE.replace("compute_dtype: float32", "compute_dtype: bfloat16"))
    often = train(recipe, tmp_path / "often", "-s", "eval.every=1")
    assert weights(often) == weights(train(recipe, tmp_path / "once"))
    assert sum(line["kind"] == "eval" for line in metrics(often)) == 6


def test_json_events_end_in_the_result(recipe_file: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe_file()), "-o", str(tmp_path / "run"), "--json"]) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err == ""
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert events[-1]["event"] == "result"
    assert events[-1]["artifact"] == str(tmp_path / "run/adapter")


def test_a_dry_run_plans_without_weights_and_writes_nothing(
    recipe_file: Recipe, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    recipe = recipe_file()
    run = tmp_path / "run"
    command = ["train", str(recipe), "-s", f"model.base={bare}", "-o", str(run)]
    assert main([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not run.exists()
    assert (plan["steps"], plan["rows"], plan["shape"]["trainable"]) == (6, 24, 8_192)
    assert plan["memory_bytes"] == total(plan["memory"]) > 0
    assert plan["checkpointing"] == "off"
    assert plan["memory"]["4-bit weights"] == 73_728 // 2
    assert main(command) == 5, "the same folder cannot train: it has no weights"


@pytest.mark.parametrize("kind", ["none", "nf4", "fp4"])
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw"])
def test_every_quantization_trains_with_every_optimizer(
    recipe_file: Recipe, tmp_path: Path, kind: str, optimizer: str
) -> None:
    options = ["-s", f"quantization.type={kind}", "-s", f"train.optimizer={optimizer}"]
    losses = [line["loss"] for line in metrics(train(recipe_file(), tmp_path / "run", *options))]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_saves_a_model_that_transformers_loads(
    recipe_file: Recipe, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    text = RECIPE.replace("lora: {{r: 4, alpha: 8}}", "lora: null").replace(
        "compute_dtype: float32", f"type: none, compute_dtype: {dtype}"
    )
    run = train(recipe_file(text), tmp_path / "run", "-s", "train.lr=1e-3")
    losses = [line["loss"] for line in metrics(run)]
    assert losses[-1] < losses[0]
    tuned = AutoModelForCausalLM.from_pretrained(run / "model")
    assert not torch.equal(tuned.model.embed_tokens.weight, make_llama().model.embed_tokens.weight)
    capsys.readouterr()
    assert main(["eval", str(run), "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["loss"] == pytest.approx(losses[-1], rel=1e-3 if dtype == "float32" else 2e-2)
    assert main(["chat", str(run), "-p", "q1", "--max-tokens", "3", "-q"]) == 0


def test_the_best_values_are_kept_and_patience_ends_the_run(recipe_file: Recipe, tmp_path: Path) -> None:
    options = ["train.steps=30", "train.lr=0.5", "train.max_grad_norm=null", "eval.every=1", "eval.patience=1"]
    flags = [part for option in [*options, "eval.keep_best=true"] for part in ("-s", option)]
    run = train(recipe_file(), tmp_path / "run", *flags)
    losses = [line["loss"] for line in metrics(run) if line["kind"] == "eval"]
    best = losses.index(min(losses))
    assert len(losses) == best + 2 < 30
    again = train(recipe_file(), tmp_path / "again", *flags[:-2], "-s", "eval.keep_best=false")
    assert weights(again) != weights(run), "without keep_best the last values are saved"
    assert f"{min(losses):.4f}" in (run / "adapter/README.md").read_text()


def test_checkpoints_are_verified_adapters_of_which_the_newest_stay(recipe_file: Recipe, tmp_path: Path) -> None:
    run = train(recipe_file(), tmp_path / "run", "-s", "save.every=1")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000005", "step-000006"]
    state = json.loads((run / "checkpoints/step-000005/state.json").read_text())
    assert (state["step"], state["total_steps"]) == (5, 6)
    assert main(["eval", str(run), "--adapter", str(run / "checkpoints/step-000005"), "-q"]) == 0


def test_epochs_draw_every_row_that_often(recipe_file: Recipe, tmp_path: Path) -> None:
    text = RECIPE.replace("steps: 6", "epochs: 2").replace("batch_size: 4,", "batch_size: 6,")
    run = train(recipe_file(text), tmp_path / "run")
    assert [line["rows"] for line in metrics(run) if line["kind"] == "step"] == [6, 6, 6, 6, 6, 6, 4]


def test_a_run_that_failed_before_its_first_step_may_be_started_again(
    recipe_file: Recipe, tmp_path: Path, base: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: -40_000 if file.suffix == ".safetensors" else None])
    run = tmp_path / "run"
    assert main(["train", str(recipe_file()), "-o", str(run), "-s", f"model.base={broken}"]) == 5
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    train(recipe_file(), run)
    assert main(["train", str(recipe_file()), "-o", str(run)]) == 10


def test_rows_that_repeat_the_text_of_special_tokens_still_train(recipe_file: Recipe, tmp_path: Path) -> None:
    rows = chat_rows(12)
    rows[0]["messages"][0]["content"] = "</s><|assistant|>"
    train(recipe_file(rows=rows), tmp_path / "run")


def test_the_plain_engine_trains_to_the_same_losses_and_says_that_it_is_plain(
    recipe_file: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file()
    fast = metrics(train(recipe, tmp_path / "fast"))
    plain, options = tmp_path / "plain", ("-s", "model.engine=plain", "-s", "train.packing=false")
    assert main(["train", str(recipe), "-o", str(plain), *options]) == 0
    said = capsys.readouterr().err
    assert "the model's own forward" in said
    assert "without packed rows" not in said, "nobody asked for them"
    assert main(["train", str(recipe), "-o", str(tmp_path / "padded"), *options[:2]]) == 0
    assert "note: without packed rows: model.engine is plain" in capsys.readouterr().err
    losses = [[line["loss"] for line in found if line["kind"] == "step"] for found in (fast, metrics(plain))]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_checkpointing_changes_no_bit_of_the_adapter_so_that_auto_may_choose(
    recipe_file: Recipe, tmp_path: Path
) -> None:
    recipe, modes = recipe_file(), ("on", "off", "auto")
    options = ("-s", "lora.dropout=0.1", "-s", "quantization.compute_dtype=bfloat16")
    runs = [train(recipe, tmp_path / m, *options, "-s", f"train.gradient_checkpointing={m}") for m in modes]
    assert len({weights(run) for run in runs}) == 1
    assert json.loads((runs[2] / "plan.json").read_text())["checkpointing"] == "off", "a tiny run keeps everything"
