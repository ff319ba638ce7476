"""The shipped recipes are valid, complete and found by name; the reference made of the schema is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_cli.recipe import fields, library, reference
from qlora_cli.recipe.load import load_recipe

FILES = sorted(path for path in library.recipes_dir().rglob("*") if path.is_file())
GUANACO = {
    "llama2-7b-guanaco": ("meta-llama/Llama-2-7b-hf", 2e-4, 0.1),
    "llama2-13b-guanaco": ("meta-llama/Llama-2-13b-hf", 2e-4, 0.05),
    "llama-33b-guanaco": ("huggyllama/llama-30b", 1e-4, 0.05),
    "llama-65b-guanaco": ("huggyllama/llama-65b", 1e-4, 0.05),
}
PAPER = {
    "quantization.type": "nf4",
    "quantization.double_quant": True,
    "quantization.compute_dtype": "bfloat16",
    "lora.r": 64,
    "lora.alpha": 16,
    "lora.targets": "all-linear",
    "data.train": "timdettmers/openassistant-guanaco",
    "data.format": "text",
    "data.loss_on": "all",
    "data.max_length": 512,
    "data.eval_split": 1024,
    "train.steps": 1875,
    "train.batch_size": 16,
    "train.micro_batch_size": 1,
    "train.group_by_length": True,
    "train.betas": (0.9, 0.999),
    "train.weight_decay": 0,
    "train.schedule": "constant",
    "train.warmup_ratio": 0,
    "train.max_grad_norm": 0.3,
    "train.gradient_checkpointing": "on",
    "eval.every": 187,
    "save.every": 500,
}


def value_of(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def test_ten_recipes_are_shipped_and_nothing_else_stands_beside_them() -> None:
    assert len(FILES) == 10
    assert [path.stem for path in FILES] == sorted(library.shipped())
    assert {path.suffix for path in FILES} == {".yaml"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_says_what_it_is_for(path: Path) -> None:
    loaded = load_recipe(path.stem)
    assert loaded.path == path
    lines = loaded.text.splitlines()
    assert lines[0] == "# yaml-language-server: $schema=../docs/recipe.schema.json"
    assert [line for line in lines if line.startswith("# For: ")]
    assert [line for line in lines if line.startswith("# Source: ")]


@pytest.mark.parametrize("name", GUANACO)
def test_the_guanaco_recipes_hold_the_values_of_the_paper(name: str) -> None:
    recipe = load_recipe(name).recipe
    base, rate, dropout = GUANACO[name]
    wanted = {**PAPER, "model.base": base, "train.lr": rate, "lora.dropout": dropout}
    assert {key: value_of(recipe, key) for key in wanted} == wanted


def test_the_chat_recipes_train_on_answers_in_the_models_own_template() -> None:
    names = [name for name in library.shipped() if name.endswith("-chat")]
    assert len(names) == 5
    for name in names:
        data = load_recipe(name).recipe.data
        assert (data.format, data.template, data.loss_on) == ("messages", "auto", "assistant")


def test_a_name_is_found_and_an_unknown_one_is_not() -> None:
    assert library.find("tiny-demo") == library.recipes_dir() / "tiny-demo.yaml"
    assert library.find("tiny-dmo") is None
    assert library.near("here/tiny-dmo.yaml")[0] == "tiny-demo"
    assert library.near("?") == list(library.shipped())


def test_the_json_schema_knows_every_key_and_extends() -> None:
    schema = reference.json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == {"extends", *fields.keys_of(fields.recipe_schema())}
    assert schema["anyOf"][0] == {"required": ["extends"]}
    assert schema["anyOf"][1]["required"] == ["model"]
    assert not [name for name, section in schema["$defs"].items() if "required" in section]
    assert "required" in fields.recipe_schema()


def test_the_reference_has_a_row_for_every_key() -> None:
    rows = [line for line in reference.recipe_markdown().splitlines() if line.startswith("| `")]
    of_a_source = fields.keys_of(fields.at(("data", "sources", "any")))
    assert len(rows) == len(fields.leaves()) + 1 + len(of_a_source)
    named = {row.split("`")[1] for row in rows}
    assert named == {"extends", *of_a_source, *(key.rsplit(".", 1)[-1] for key in fields.leaves())}
