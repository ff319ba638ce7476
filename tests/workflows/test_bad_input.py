"""What a user can get wrong before training: one error, its exit code, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_cli.cli.app import main
from qlora_cli.errors import MachineError
from qlora_cli.model.device import Machine, compute_dtype
from tests.conftest import RECIPE, chat_rows

from .conftest import Refuse, set_base


def test_a_recipe_that_does_not_exist_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    error = refuse(3, recipe=tmp_path / "mine.yaml")
    assert str(tmp_path / "mine.yaml") in error


def test_a_misspelt_key_is_named_with_its_place_and_the_nearest_key(
    refuse: Refuse, recipe_file: Callable[..., Path]
) -> None:
    path = recipe_file(RECIPE.replace("alpha: 8", "alhpa: 8"))
    error = refuse(3, recipe=path)
    assert error.startswith(f"error: {path}:3:14: lora.alhpa")
    assert "alpha" in error.replace("alhpa", "")


def test_all_problems_of_a_recipe_are_told_at_once(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(RECIPE.replace("r: 4, alpha: 8", "r: four, alhpa: 8"))
    assert main(["train", str(path), "-o", str(tmp_path / "run")]) == 3
    assert capsys.readouterr().err.count("error: ") == 2
    assert not (tmp_path / "run").exists()


DATA: list[tuple[bytes | None, str, str]] = [
    (None, "", "no such file"),
    (b"", "", "has no rows"),
    (b'{"messages": [\n', ":2", "not JSON"),
    (b'{"messages": "\xff"}\n', ":2", "not UTF-8"),
    (b"[]\n", ":2", "a row must be a JSON object"),
    (b'{"text": "a"}\n', ":2", "field `messages` is missing (the row has: `text`)"),
    (b'{"messages": 7}\n', ":2", "field `messages` must be a list of messages, but is a number"),
    (b'{"messages": [{"role": "user", "content": 7}]}\n', ":2", "messages[0].content must be text, but is a number"),
    (b'{"messages": [{"role": "bot", "content": ""}]}\n', ":2", "messages[0].role is `bot`"),
]


@pytest.mark.parametrize(("content", "line", "what"), DATA, ids=[what[:30] for _, _, what in DATA])
def test_rows_that_cannot_be_used_are_named_by_file_and_line(
    refuse: Refuse, tmp_path: Path, content: bytes | None, line: str, what: str
) -> None:
    path = tmp_path / "mine.jsonl"
    if content is not None:
        good = json.dumps(chat_rows(1)[0]).encode() + b"\n"
        path.write_bytes(good + content if line else content)
    error = refuse(4, "-s", f"data.train={path}")
    assert error.startswith(f"error: {path}{line}")
    assert what in error


def test_a_conversation_that_the_template_refuses_is_named_by_file_and_line(
    refuse: Refuse, broken: Path, tmp_path: Path
) -> None:
    text = (broken / "chat_template.jinja").read_text()
    strict = "{% if messages[0].content == 'q2' %}{{ raise_exception('not that one') }}{% endif %}"
    (broken / "chat_template.jinja").write_text(strict + text)
    error = refuse(4, *set_base(broken))
    assert f"{tmp_path / 'rows.jsonl'}:3: the chat template refuses this conversation: not that one" in error


def test_no_supervised_token_left_is_refused(refuse: Refuse) -> None:
    error = refuse(4, "-s", "data.max_length=4")
    assert "0 supervised tokens are left of 24 rows" in error
    assert "data.max_length (4)" in error


TARGETS = [("[q_porj]", "did you mean q_proj?"), ("'.*nothing'", "all-linear"), ("'['", "not a regular expression")]


@pytest.mark.parametrize(("targets", "help_text"), TARGETS)
def test_targets_that_match_no_layer_are_refused(refuse: Refuse, targets: str, help_text: str) -> None:
    error = refuse(3, "-s", f"lora.targets={targets}")
    assert "lora.targets" in error
    assert help_text in error


def test_rows_longer_than_the_models_positions_are_refused(refuse: Refuse) -> None:
    error = refuse(3, "-s", "data.max_length=129")
    assert "data.max_length is 129" in error
    assert "was trained for 128 positions" in error
    assert "--set data.max_length=128" in error


def test_a_batch_that_micro_batches_do_not_divide_is_refused(refuse: Refuse) -> None:
    error = refuse(3, "-s", "train.batch_size=5")
    assert "train.batch_size" in error
    assert "train.micro_batch_size" in error


def test_a_batch_that_processes_do_not_divide_is_refused(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    error = refuse(3)
    assert "train.batch_size is 4, not a multiple of train.micro_batch_size (2) x processes (3)" in error
    assert "a multiple of 6" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_absent_is_refused(refuse: Refuse) -> None:
    error = refuse(6, "-s", "model.device=cuda")
    assert "model.device is cuda, but no CUDA device is present" in error
    assert "-s model.device=cpu" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_type_in_which_the_machine_does_not_compute_is_refused(refuse: Refuse) -> None:
    error = refuse(6, "-s", "quantization.compute_dtype=float16")
    assert "quantization.compute_dtype is float16" in error
    assert "bfloat16 and float32" in error


def test_a_type_that_contradicts_the_device_of_the_recipe_is_refused(refuse: Refuse) -> None:
    error = refuse(3, "-s", "model.device=cpu", "-s", "quantization.compute_dtype=float16")
    assert "needs a CUDA device, but model.device is cpu" in error


OLD_GPU = Machine(torch.device("cuda", 0), "Old GPU", ("float16", "float32"), "float16")


def test_bfloat16_on_a_device_without_it_is_refused_and_auto_takes_what_there_is() -> None:
    with pytest.raises(MachineError) as caught:
        compute_dtype("bfloat16", OLD_GPU)
    problem = caught.value.problems[0]
    assert problem.what == "quantization.compute_dtype is bfloat16, but Old GPU does not compute in it"
    assert problem.why == "it computes in float16 and float32"
    assert problem.fix == "set quantization.compute_dtype to auto or float16"
    assert caught.value.exit_code == 6
    assert compute_dtype("auto", OLD_GPU) == torch.float16


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_an_output_directory_that_holds_something_is_refused_and_left_as_it_was(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").mkdir()
    (run / "adapter" / "mine.bin").write_bytes(b"\x00mine")
    (run / "status.json").write_text('{"state": "finished", "step": 6}')
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", str(recipe_file()), "-o", str(run), *option]) == 10
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {run} is not empty")
    assert captured.err.count("error: ") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert len(before) == 2


def test_an_unknown_command_and_an_unknown_option_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["trian"], ["train"], ["train", "tiny-demo", "--fast"]):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert (captured.out, "Traceback" in captured.err) == ("", False)
