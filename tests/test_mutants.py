"""The negative controls of scripts/battery/mutants.py fit the program, and some of them are run."""

from __future__ import annotations

from pathlib import Path

import pytest
from battery import mutants
from battery.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_changes_stands_there_once_and_its_test_exists(mutant: Mutant) -> None:
    assert (ROOT / "qlora_cli" / mutant.file).read_text().count(mutant.old) == 1
    file, _, name = mutant.test.partition("::")
    text = (ROOT / "tests" / file).read_text()
    assert not name or f"def {name.partition('[')[0]}(" in text


def test_there_are_enough_of_them() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12


def test_some_mutants_are_noticed_and_one_that_changes_nothing_is_not(tmp_path: Path) -> None:
    found = mutants.run(full=False, work=tmp_path, seed=1)
    assert (found["count"], found["failures"]) == (2, [])
    harmless = Mutant("a comment", "training/state.py", "CODE_BOOKS = (", "CODE_BOOKS = (  # codes\n", MUTANTS[0].test)
    assert mutants.passes(tmp_path / "mutant", [harmless.test], harmless)
