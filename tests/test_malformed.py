"""Malformed and fuzzed input: a part of what `scripts/reliability` gives to the command line, and its own judgement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from battery import fuzzed_recipes, malformed

from qlora_cli.recipe.load import LoadedRecipe


def test_malformed_input_of_every_kind_is_refused_as_documented(tmp_path: Path) -> None:
    found = malformed.run(False, tmp_path, 0)
    assert found["failures"] == []
    assert (found["passed"], found["count"] >= 20) == (True, True)
    assert found["figure"] == f"{found['count']} of {found['count']} refused as documented"


def test_the_table_has_at_least_150_cases_of_which_no_two_have_one_name() -> None:
    names = [case.name for case in malformed.cases()]
    assert len(names) >= 150
    assert len(set(names)) == len(names)
    kinds = {name.split(":")[0] for name in names}
    assert kinds == {"recipe", "override", "rows", "adapter", "run", "model", "output"}
    assert {case.name.split(":")[0] for case in malformed.sample(malformed.cases(), 0)} == kinds


CASE = malformed.Case("recipe: x", 3, "train mine.yaml", "mine.yaml:3:", lambda place: None)
GOOD = "reading ...\nerror: mine.yaml:3:8: lora.r: wrong\n  fix: mend it\n"


def test_what_it_said_must_be_one_error_that_names_the_place() -> None:
    assert malformed.told(CASE, 3, "", GOOD) == []
    for code, out, err in (
        (5, "", GOOD),
        (3, "done", GOOD),
        (3, "", GOOD + GOOD),
        (3, "", ""),
        (3, "", "Traceback (most recent call last):\n" + GOOD),
        (3, "", GOOD.replace(":3:", ":4:")),
        (3, "", "mine.yaml:3:\nerror: something\n"),
    ):
        assert len(malformed.told(CASE, code, out, err)) >= 1, (code, out, err)


def test_what_is_left_must_be_what_was_there_but_for_the_record_of_a_run_that_failed(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a")
    before = malformed.snapshot(tmp_path)
    assert malformed.left(CASE, before, before) == []
    (tmp_path / "mine.yaml").write_text("b")
    assert malformed.left(CASE, before, malformed.snapshot(tmp_path)) == ["changed or removed: ['mine.yaml']"]
    (tmp_path / "mine.yaml").unlink()
    assert malformed.left(CASE, before, malformed.snapshot(tmp_path)) == ["changed or removed: ['mine.yaml']"]
    (tmp_path / "mine.yaml").write_text("a")
    (tmp_path / "my-out").mkdir()
    (tmp_path / "my-out" / "status.json").write_text("{}")
    after = malformed.snapshot(tmp_path)
    assert malformed.left(CASE, before, after) == ["left behind: ['my-out', 'my-out/status.json']"]
    begun = replace(CASE, begun=True)
    assert malformed.left(begun, before, after) == []
    (tmp_path / "my-out" / "adapter").mkdir()
    assert malformed.left(begun, before, malformed.snapshot(tmp_path)) == ["left behind: ['my-out/adapter']"]


def test_no_fuzzed_recipe_ends_in_a_traceback(tmp_path: Path) -> None:
    found = fuzzed_recipes.run(False, tmp_path, 0)
    assert found["failures"] == []
    assert (found["passed"], found["count"]) == (True, 200)


@pytest.mark.parametrize("slip", [KeyError, AssertionError, RecursionError])
def test_what_the_loader_lets_through_is_told_with_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slip: type[Exception]
) -> None:
    load = fuzzed_recipes.load_recipe

    def slipping(path: Path, overrides: list[str]) -> LoadedRecipe:
        loaded = load(path, overrides)
        if loaded.recipe.lora is None:
            raise slip("slipped")
        return loaded

    monkeypatch.setattr(fuzzed_recipes, "load_recipe", slipping)
    monkeypatch.setattr(
        fuzzed_recipes, "valid", lambda: [fuzzed_recipes.MINIMAL + "lora: null\nquantization: {type: none}\n"]
    )
    found = fuzzed_recipes.run(False, tmp_path, 0)
    assert not found["passed"]
    assert f"{slip.__name__}: " in found["failures"][0]
    assert "lora: null" in found["failures"][0]


def test_a_problem_without_a_place_or_with_what_moves_a_cursor_is_found() -> None:
    wrong = fuzzed_recipes.Problem("what", where="mine.yaml:1:1")
    fuzzed_recipes.check(wrong)
    for each in (replace(wrong, where=""), replace(wrong, what=""), replace(wrong, why="x" * 20_001)):
        with pytest.raises(fuzzed_recipes.BrokenError, match="without a place, without words or without end"):
            fuzzed_recipes.check(each)
    object.__setattr__(wrong, "why", "\x1b[2J")
    with pytest.raises(fuzzed_recipes.BrokenError, match="control characters"):
        fuzzed_recipes.check(wrong)
