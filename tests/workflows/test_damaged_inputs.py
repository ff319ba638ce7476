"""Damaged runs and bases: whatever a file holds, chat and eval say which one it is and end with exit code 5."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.cli.app import main
from qlora_cli.errors import ModelError
from qlora_cli.files import write_manifest
from qlora_cli.model.adapter import CONFIG, WEIGHTS
from qlora_cli.workflows.locate import base_folder, find, origin_of
from tests.conftest import RECIPE, chat_rows, make_llama, save_base, write_jsonl

Capture = pytest.CaptureFixture[str]
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_jsonl(folder / "rows.jsonl", chat_rows(24))
    (folder / "tiny.yaml").write_text(RECIPE.format(base=base, data=data))
    assert main(["train", str(folder / "tiny.yaml"), "-o", str(folder / "run"), "-q"]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def refused(capsys: Capture) -> Callable[..., str]:
    """A function that runs a command, asserts its exit code and one error, and returns that."""

    def call(*command: str, code: int = 5) -> str:
        capsys.readouterr()
        status = main([*command])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert (status, captured.out) == (code, ""), captured.err
        assert captured.err.count("error: ") == 1
        return captured.err[captured.err.index("error: ") :]

    return call


Refused = Callable[..., str]


def chat(target: Path | str) -> list[str]:
    return ["chat", str(target), "-p", "q", "--max-new-tokens", "2"]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_adapter_with_values_that_are_not_finite_is_refused_with_the_tensors_named(
    run: Path, refused: Refused
) -> None:
    weights = run / "adapter" / WEIGHTS
    tensors = load_file(weights)
    name = min(tensors)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, weights)
    write_manifest(run / "adapter")
    for command in (chat(run), ["eval", str(run)]):
        error = refused(*command)
        assert f"1 tensors hold values that are not finite: {name}\n" in error


@pytest.mark.parametrize("name", ["recipe.yaml", "origin.json", "tokenizer.json", CONFIG, WEIGHTS])
def test_damage_is_told_as_damage_before_anything_is_read(run: Path, name: str, refused: Refused) -> None:
    path = run / "adapter" / name
    path.write_bytes(path.read_bytes()[:-9] + b"\xff{[specaal")
    for command in (chat(run), ["eval", str(run)]):
        assert f"{run / 'adapter'} is damaged: {name}" in refused(*command)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"base": ["model.safetensors"]}, "base"),
        ({"base": "model.safetensors"}, "base"),
        ({"base": None}, "base"),
        ({"base": {"model.safetensors": 7}}, "base.model.safetensors"),
        ({"base_folder": 7}, "base_folder"),
        ({"data": 7}, "data"),
        ({"compute_dtype": 7}, "compute_dtype"),
        ({"compute_dtype": "float8"}, "compute_dtype"),
    ],
)
def test_an_origin_of_another_shape_is_refused_with_its_key(run: Path, values: Any, key: str, refused: Refused) -> None:
    origin = run / "adapter/origin.json"
    change(origin, **values)
    write_manifest(run / "adapter")
    assert f"{origin} is not as qlora wrote it: {key}: " in refused(*chat(run))
    with pytest.raises(ModelError, match="is not as qlora wrote it"):
        origin_of(run / "adapter")


@pytest.mark.parametrize("name", ["origin.json", CONFIG, "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [DEEP, "[]", "7", "{"])
def test_a_record_that_is_no_object_is_refused(run: Path, name: str, text: str, refused: Refused) -> None:
    (run / "adapter" / name).write_text(text)
    write_manifest(run / "adapter")
    assert "tokenizer" in (error := refused(*chat(run))) or str(run / "adapter" / name) in error


def test_a_manifest_nested_without_end_is_damage(run: Path, refused: Refused) -> None:
    (run / "adapter/manifest.json").write_text(DEEP)
    assert "manifest.json cannot be read" in refused(*chat(run))


@pytest.mark.parametrize("target", ["adapter", "base"])
def test_a_tokenizer_of_another_schema_is_refused(run: Path, base: Path, target: str, refused: Refused) -> None:
    folder = run / "adapter" if target == "adapter" else Path(shutil.copytree(base, run.parent / "own"))
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"special"', '"specaal"'))
    write_manifest(run / "adapter")
    assert "its tokenizer cannot be loaded" in refused(*chat(run if target == "adapter" else folder))


def test_an_end_token_that_is_a_number_is_refused(run: Path, refused: Refused) -> None:
    change(run / "adapter/tokenizer_config.json", eos_token=5)
    write_manifest(run / "adapter")
    assert "its tokenizer cannot be loaded" in refused(*chat(run))


def test_a_recipe_without_an_adapter_beside_one_is_refused(run: Path, refused: Refused) -> None:
    recipe = run / "adapter/recipe.yaml"
    head, _, rest = recipe.read_text().partition("lora:\n")
    recipe.write_text(f"{head}lora: null\n{rest[rest.index('data:') :]}".replace("type: nf4", "type: none"))
    write_manifest(run / "adapter")
    assert "has no lora section" in refused(*chat(run))


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("config.json", {"quantization_config": 3}, ""),
        ("config.json", {"dtype": "float7"}, ""),
        ("config.json", {"rope_parameters": {"rope_type": "nope", "rope_theta": 10_000.0}}, "nope"),
        ("generation_config.json", {"temperature": "hot", "do_sample": True}, "generation_config.json"),
        ("generation_config.json", {"temperature": -1.0, "do_sample": True}, "generation_config.json"),
        ("generation_config.json", {"temperature": 1e-40, "do_sample": True}, "temperature is 1e-40"),
        ("generation_config.json", {"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300"),
        ("generation_config.json", {"repetition_penalty": "x"}, "generation_config.json"),
        ("generation_config.json", {"top_k": 1.5, "do_sample": True}, "generation_config.json"),
        ("generation_config.json", {"do_sample": "yes"}, "do_sample is 'yes'"),
    ],
)
def test_values_of_a_base_that_mean_nothing_are_refused(
    base: Path, tmp_path: Path, name: str, values: Any, said: str, refused: Refused
) -> None:
    own = Path(shutil.copytree(base, tmp_path / "own"))
    change(own / name, **values)
    assert said in refused(*chat(own))


@pytest.mark.parametrize("text", ["[]", "{", DEEP])
def test_a_generation_config_that_cannot_be_read_is_not_passed_over(
    base: Path, tmp_path: Path, text: str, refused: Refused
) -> None:
    own = Path(shutil.copytree(base, tmp_path / "own"))
    (own / "generation_config.json").write_text(text)
    assert str(own / "generation_config.json") in refused(*chat(own))


def test_a_given_setting_takes_the_place_of_one_that_is_out_of_range(base: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(base, tmp_path / "own"))
    change(own / "generation_config.json", temperature=1e-40, do_sample=True)
    assert main([*chat(own), "--temperature", "0"]) == 0


def test_a_base_whose_logits_are_not_numbers_answers_nothing(tmp_path: Path, refused: Refused) -> None:
    own = save_base(tmp_path / "own")
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(own)
    rows = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q"}, {"prompt": "longer"}])
    prompts = ["chat", str(own), "--prompts", str(rows), "--max-new-tokens", "2"]
    for command in (chat(own), prompts, [*chat(own), "--temperature", "1"], [*prompts, "--temperature", "1"]):
        error = refused(*command, code=9)
        assert "logits are not finite" in error
        assert "  why: " in error and "  fix: " in error


@pytest.mark.parametrize("name", ["n" * 300, "n" * 5000, "n/" * 2500, "a name", "./n", "~nobody_here/n"])
def test_names_that_no_file_can_have_are_no_such_thing(run: Path, name: str, refused: Refused) -> None:
    for command in (chat(name), ["chat", "--adapter", name, "-p", "q"], ["eval", str(run), "--adapter", name]):
        assert "no such" in refused(*command)
    assert "no such" in refused("chat", name, "--adapter", str(run), "-p", "q")
    if "/" in name:  # which a run, a folder or a Hub id may have
        error = refused("eval", name)
        assert "no such run" in error
        assert "a recipe (.yaml)" in error
    else:
        assert "no such recipe" in refused("eval", name, code=3)


def test_a_named_base_is_never_exchanged_for_the_recorded_one(run: Path, refused: Refused) -> None:
    assert "no/such/base: no such run" in refused("chat", "no/such/base", "--adapter", str(run), "-p", "q")


def test_another_folder_of_the_bases_relative_name_does_not_hide_the_trained_base(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "there/out/base")
    (tmp_path / "there/rows.jsonl").write_text((trained.parent / "rows.jsonl").read_text())
    monkeypatch.chdir(tmp_path / "there")
    recipe = (trained.parent / "tiny.yaml").read_text().replace(str(base), "out/base")
    (tmp_path / "there/r.yaml").write_text(recipe)
    assert main(["train", "r.yaml", "-o", str(tmp_path / "run"), "-q"]) == 0
    save_base(tmp_path / "elsewhere/out/base", seed=7)
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = base_folder(find(str(tmp_path / "run"), None))
    assert found.path == tmp_path / "there/out/base"
    assert main(chat(tmp_path / "run")) == 0
    shutil.rmtree(tmp_path / "there")
    assert base_folder(find(str(tmp_path / "run"), None)).path == Path("out/base")


def test_the_quantization_of_the_run_may_be_said_again(run: Path) -> None:
    assert main([*chat(run), "--quantization", "nf4"]) == 0
    assert main([*chat(run), "--quantization", "fp4"]) == 5
