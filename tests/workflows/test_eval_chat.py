"""`qlora eval` and `qlora chat` use exactly what training used."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli.app import main
from qlora_cli.errors import DataError
from qlora_cli.workflows.chat import Decoding, open_talk
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


def test_eval_says_its_figures_in_one_line(run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
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
    assert [(s["read"], s["kept"], s["held_out"]) for s in receipt["sources"]] == [(24, 24, 0), (3, 0, 3)]
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


def test_chat_answers_on_stdout_and_only_the_answer(run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(["chat", "--adapter", str(run), "-p", "q1", "--max-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert "loading" in captured.err
    assert main(["chat", str(run), "-p", "q1", "--max-tokens", "4", "-q"]) == 0
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err) == (captured.out, "")


def test_chat_reads_turns_from_stdin_and_remembers_them(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("q1\n\nq2\n"))
    capsys.readouterr()
    assert main(["chat", str(run), "--max-tokens", "3", "-q"]) == 0
    piped = capsys.readouterr().out
    talk = open_talk(str(run), None, lambda event: None)
    said = ["".join(talk.say(turn, Decoding(max_new_tokens=3))) for turn in ("q1", "q2")]
    assert piped == "".join(f"{answer}\n" for answer in said)


def test_streamed_text_equals_the_batched_answer(run: Path) -> None:
    batched = open_talk(str(run), None, lambda event: None).answer_all(["q1", "quite another"], 6)
    for prompt, expected in zip(["q1", "quite another"], batched, strict=True):
        pieces = list(open_talk(str(run), None, lambda event: None).say(prompt, Decoding(max_new_tokens=6)))
        assert "".join(pieces) == expected


def test_the_template_saved_with_the_adapter_wins_over_a_base_that_changed(
    run: Path, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    (moved / "chat_template.jinja").write_text("{{ messages[0].content }}")
    answers = []
    for target in (base, moved):
        capsys.readouterr()
        assert main(["chat", str(target), "--adapter", str(run), "-p", "q1", "--max-tokens", "5", "-q"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_plain_completions_are_prompted_as_they_were_trained(recipe_file: Recipe, tmp_path: Path) -> None:
    rows = [{"input": f"{i} ->", "output": "ab"[i % 2]} for i in range(24)]
    text = RECIPE.replace("eval_split: 4", "format: prompt-completion, columns: {{prompt: input, completion: output}}")
    run = tmp_path / "run"
    assert main(["train", str(recipe_file(text, rows)), "-o", str(run), "-q"]) == 0
    talk = open_talk(str(run), None, lambda event: None)
    assert len(talk.answer_all(["1 ->"], 3)) == 1


def test_a_base_or_data_that_changed_since_training_is_said(
    recipe_file: Recipe, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    own = tmp_path / "own"
    shutil.copytree(base, own)
    run = tmp_path / "run"
    assert main(["train", str(recipe_file()), "-s", f"model.base={own}", "-o", str(run), "-q"]) == 0
    assert main(["eval", str(run)]) == 0
    assert "no longer" not in capsys.readouterr().err
    make_llama(seed=1).save_pretrained(own)
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(25))
    assert main(["eval", str(run)]) == 0
    said = capsys.readouterr().err
    assert f"the base is no longer what {run / 'adapter'} was trained on: model.safetensors changed" in said
    assert f"the data is no longer what {run / 'adapter'} was trained on: {tmp_path / 'rows.jsonl'} changed" in said


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


def test_weights_replaced_by_shards_of_other_names_are_noticed(
    recipe_file: Recipe, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    own, run = tmp_path / "own", tmp_path / "run"
    shutil.copytree(base, own)
    assert main(["train", str(recipe_file()), "-s", f"model.base={own}", "-o", str(run), "-q"]) == 0
    (own / "model.safetensors").unlink()
    make_llama(seed=1).save_pretrained(own, max_shard_size="100KB")
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert "the base is no longer what" in capsys.readouterr().err


def test_a_base_given_by_a_relative_path_is_found_from_elsewhere_and_never_sought_on_the_hub(
    recipe_file: Recipe, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shutil.copytree(base, tmp_path / "out/base")
    run = tmp_path / "run"
    recipe = recipe_file()
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), "-s", "model.base=out/base", "-o", str(run), "-q"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["chat", str(run), "-p", "q1", "--max-tokens", "2", "-q"]) == 0
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    assert main(["chat", str(run), "-p", "q1"]) == 5
    assert "Hub cannot" not in capsys.readouterr().err


def test_a_conversation_ends_at_the_models_last_position(run: Path) -> None:
    talk = open_talk(str(run), None, lambda event: None)
    long = "".join(talk.say("q" * 100, Decoding(max_new_tokens=500)))
    assert len(long) <= 128 - 100
    with pytest.raises(DataError, match="128 positions"):
        list(talk.say("q" * 100, Decoding()))
