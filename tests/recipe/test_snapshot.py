"""The resolved recipe reads back equal, and says where each value came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_cli.recipe import library
from qlora_cli.recipe.load import LoadedRecipe, load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.snapshot import read_resolved, resolved_yaml

from .conftest import MINIMAL, Load

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
POSITIVE = st.floats(min_value=1e-300, max_value=1e300) | st.integers(1, 10**17)
SHARE = st.floats(min_value=0, max_value=1, exclude_max=True)


def test_every_value_is_written_with_its_origin(load: Load) -> None:
    lines = resolved_yaml(load(MINIMAL, "lora.targets=[q, v]", "data.columns={messages: 'a: b'}")).splitlines()
    assert lines[1:3] == ["model:", "  base: b  # mine.yaml:1"]
    assert "  targets: [q, v]  # --set lora.targets" in lines
    assert '  columns: {messages: "a: b"}  # --set data.columns' in lines
    assert "  lr: 0.0002  # default" in lines
    assert lines[-1] == "output: null  # default"


def test_every_shipped_recipe_reads_back_equal(tmp_path: Path) -> None:
    names = list(library.shipped())
    assert names
    for name in names:
        loaded = load_recipe(name)
        (tmp_path / "resolved.yaml").write_text(resolved_yaml(loaded), encoding="utf-8")
        assert read_resolved(tmp_path / "resolved.yaml") == loaded.recipe


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    values: dict[str, Any] = {
        "model": {"base": draw(WORDS), "revision": draw(st.none() | WORDS)},
        "lora": draw(
            st.fixed_dictionaries({"alpha": POSITIVE, "targets": WORDS | st.lists(WORDS, min_size=1).map(tuple)})
        ),
        "data": {"train": draw(WORDS), "columns": draw(st.dictionaries(st.just("messages"), WORDS))},
        "train": {"epochs": draw(POSITIVE), "lr": draw(st.floats(1e-300, 1)), "betas": (draw(SHARE), draw(SHARE))},
        "output": draw(st.none() | WORDS),
    }
    if draw(st.booleans()):
        values |= {"lora": None, "quantization": {"type": "none"}}
    return Recipe.model_validate(values)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(recipes(), WORDS)
def test_a_resolved_recipe_always_reads_back_equal(load: Load, recipe: Recipe, origin: str) -> None:
    origins = dict.fromkeys([*load(MINIMAL).origins, "lora"], origin)
    loaded = LoadedRecipe(recipe, Path("mine.yaml"), "", origins, ())
    Path("resolved.yaml").write_bytes(resolved_yaml(loaded).encode())
    assert read_resolved("resolved.yaml") == recipe


def test_sources_are_written_a_line_each_and_read_again(load: Load, tmp_path: Path) -> None:
    text = (
        "model: {base: b}\ntrain: {steps: 1}\ndata:\n  mix: interleave\n  sources:\n"
        "    first one: {path: 'rows/*.jsonl: # \"x\"', weight: 2, columns: {prompt: a}, format: alpaca}\n"
        "    b: {path: owner/rows, config: c, take: 3, shuffle: true}\n"
    ).replace("columns: {prompt: a}", "columns: {instruction: a}")
    loaded = load(text)
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(loaded))
    assert read_resolved(tmp_path / "resolved.yaml") == loaded.recipe
    assert len(loaded.recipe.data.sources) == 2
