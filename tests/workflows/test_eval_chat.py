"""`qlora eval` measures exactly what was trained, on the base that it was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli.app import main
from tests.conftest import RECIPE, chat_rows, make_llama, write_jsonl

Recipe = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(recipe_file: Recipe, tmp_path: Path) -> Path:
    """A finished run that has learned its two answers a little."""
    folder = tmp_path / "run"
    assert main(["train", str(recipe_file()), "-o", str(folder), "-q"]) == 0
    return folder


def last_json(capsys: Capture) -> dict[str, Any]:
    """The last line of stdout."""
    value: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return value


def held_out_loss(run: Path) -> float:
    """The loss of the last evaluation during training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(lines[-1]["loss"])


def test_eval_of_a_run_repeats_the_loss_that_training_measured(run: Path, capsys: Capture) -> None:
    for arguments in ([str(run)], [str(run / "adapter")], [str(run), "--adapter", str(run)]):
        capsys.readouterr()
        assert main(["eval", *arguments, "--json", "-q"]) == 0
        found = last_json(capsys)
        assert found["loss"] == pytest.approx(held_out_loss(run), rel=1e-6)
        assert (found["rows"], found["targets"]) == (4, 8)
        assert found["adapter"] == str(run / "adapter")


def test_eval_of_a_recipe_measures_its_base_and_with_an_adapter_that(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = str(tmp_path / "tiny.yaml")
    capsys.readouterr()
    assert main(["eval", recipe, "--json", "-q"]) == 0
    base = last_json(capsys)
    assert base["adapter"] is None
    assert main(["eval", recipe, "--adapter", str(run), "--json", "-q"]) == 0
    tuned = last_json(capsys)
    assert tuned["loss"] == pytest.approx(held_out_loss(run), rel=1e-6)
    assert base["loss"] > tuned["loss"] + 0.1


def test_eval_says_its_figures_in_few_lines(run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 3
    assert f"loss {held_out_loss(run):.4f}" in out
    assert "over 8 tokens of 4 rows" in out


def test_eval_without_held_out_rows_says_how_to_name_some(recipe_file: Recipe, tmp_path: Path, capsys: Capture) -> None:
    recipe = recipe_file(RECIPE.replace(", eval_split: 4", ""))
    assert main(["train", str(recipe), "-o", str(tmp_path / "run"), "-q"]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 4
    assert "data.eval" in capsys.readouterr().err


def test_a_held_out_file_is_read_apart(recipe_file: Recipe, tmp_path: Path, capsys: Capture) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", chat_rows(3))
    recipe = recipe_file(RECIPE.replace("eval_split: 4", f"eval: {held}"))
    run = tmp_path / "run"
    assert main(["train", str(recipe), "-o", str(run), "-q"]) == 0
    receipt = json.loads((run / "data_receipt.json").read_text())
    assert [(s["read"], s["kept"], s["held_out"]) for s in receipt["sources"]] == [(24, 21, 0), (3, 0, 3)]
    capsys.readouterr()
    assert main(["eval", str(run), "--json", "-q"]) == 0
    assert last_json(capsys)["loss"] == pytest.approx(held_out_loss(run), rel=1e-6)


def test_eval_and_chat_of_something_that_is_no_run_say_so(tmp_path: Path, capsys: Capture) -> None:
    assert main(["eval", str(tmp_path)]) == 5
    assert main(["chat", str(tmp_path), "-p", "hi"]) == 5
    assert main(["chat", "--adapter", str(tmp_path), "-p", "hi"]) == 5
    assert main(["chat", "-p", "hi"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("holds no adapter") == 3
    assert "Traceback" not in errors


def test_a_run_without_a_result_has_its_last_sound_checkpoint_named_which_is_taken(run: Path, capsys: Capture) -> None:
    (saved,) = (run / "checkpoints").iterdir()
    damaged = shutil.copytree(saved, saved.with_name("step-999999"))
    (damaged / "state.json").write_text("{}")
    shutil.rmtree(run / "adapter")
    assert main(["eval", str(run)]) == 5
    assert f"say the checkpoint {saved}\n" in capsys.readouterr().err
    assert main(["eval", str(saved), "--json", "-q"]) == 0
    assert last_json(capsys)["loss"] == pytest.approx(held_out_loss(run), rel=1e-6)


def test_a_base_that_changed_since_training_is_refused_unless_allowed_and_changed_data_is_said(
    recipe_file: Recipe, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    own = tmp_path / "own"
    shutil.copytree(base, own)
    run = tmp_path / "run"
    assert main(["train", str(recipe_file()), "-s", f"model.base={own}", "-o", str(run), "-q"]) == 0
    assert main(["eval", str(run)]) == 0
    assert "was trained on" not in capsys.readouterr().err
    make_llama(seed=1, rms_norm_eps=1e-5).save_pretrained(own)
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(25))
    changed = f"the base {own} is not the one that {run / 'adapter'} was trained on: "
    files = "config.json changed, model.safetensors changed"
    for command in (
        ["eval", str(run)],
        ["chat", str(run), "-p", "q"],
        ["chat", str(own), "--adapter", str(run), "-p", "q"],
    ):
        assert main(command) == 5
        captured = capsys.readouterr()
        assert f"error: {changed}{files}\n  why: " in captured.err
        assert "--allow-changed-base" in captured.err
        assert captured.out == ""
        assert main([*command, "--allow-changed-base"]) == 0
        said = capsys.readouterr().err
        assert f"note: {changed}{files}\n" in said
        rows = f"the data is no longer what {run / 'adapter'} was trained on: {tmp_path / 'rows.jsonl'} changed"
        assert (rows in said) == (command[0] == "eval")


def test_files_of_the_base_that_do_not_decide_the_result_may_change(
    recipe_file: Recipe, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    own, run = tmp_path / "own", tmp_path / "run"
    shutil.copytree(base, own)
    assert main(["train", str(recipe_file()), "-s", f"model.base={own}", "-o", str(run), "-q"]) == 0
    (own / "tokenizer_config.json").write_text("{}")
    (own / "generation_config.json").write_text("{}")
    (own / "more.json").write_text("{}")
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert "was trained on" not in capsys.readouterr().err


def test_an_adapter_without_a_record_of_its_base_is_not_known_to_fit(run: Path, capsys: Capture) -> None:
    for name in ("origin.json", "manifest.json"):
        (run / "adapter" / name).unlink(missing_ok=True)
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert "has no record of its base's files" in capsys.readouterr().err


def test_eval_of_a_run_with_another_adapter_takes_the_rows_of_the_run(
    run: Path, recipe_file: Recipe, tmp_path: Path, capsys: Capture
) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", chat_rows(3))
    text = RECIPE.replace("eval_split: 4", f"eval: {own}").replace("r: 4", "r: 2")
    other = tmp_path / "other"
    assert main(["train", str(recipe_file(text, name="other.yaml")), "-o", str(other), "-q"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--adapter", str(other), "--json", "-q"]) == 0
    found = last_json(capsys)
    assert (found["rows"], found["adapter"]) == (4, str(other / "adapter"))
    assert found["data"] == str(tmp_path / "rows.jsonl")


def test_weights_replaced_by_shards_of_other_names_are_refused(
    recipe_file: Recipe, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    own, run = tmp_path / "own", tmp_path / "run"
    shutil.copytree(base, own)
    assert main(["train", str(recipe_file()), "-s", f"model.base={own}", "-o", str(run), "-q"]) == 0
    (own / "model.safetensors").unlink()
    make_llama(seed=1).save_pretrained(own, max_shard_size="100KB")
    capsys.readouterr()
    assert main(["eval", str(run)]) == 5
    said = capsys.readouterr().err
    assert "model-00001-of-" in said
    assert "model.safetensors is missing" in said
