"""Recipes as text on disk, loaded as the command line loads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qlora_cli.errors import Problem, RecipeError
from qlora_cli.recipe.load import LoadedRecipe, load_recipe

MINIMAL = "model: {base: b}\ndata: {train: t}\ntrain: {steps: 10}\n"

Load = Callable[..., LoadedRecipe]
Refuse = Callable[..., tuple[Problem, ...]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load(text, *overrides)`: the recipe of a file mine.yaml in the working directory."""
    monkeypatch.chdir(tmp_path)

    def from_text(text: str, *overrides: str) -> LoadedRecipe:
        Path("mine.yaml").write_bytes(text.encode())
        return load_recipe("mine.yaml", overrides)

    return from_text


@pytest.fixture
def refuse(load: Load) -> Refuse:
    """`refuse(text, *overrides)`: the problems of a recipe that must be refused."""

    def problems(text: str, *overrides: str) -> tuple[Problem, ...]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return caught.value.problems

    return problems


def heads(problems: Sequence[Problem]) -> list[str]:
    """The first line of each problem, as the console shows it after `error: `."""
    return [str(problem).splitlines()[0] for problem in problems]
