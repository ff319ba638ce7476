"""Mutated rows and files through the whole way of the data: a few of the cases that `scripts/fuzz_data.py` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fuzz_data
import pytest

from qlora_cli.data.dataset import Setting, load_data
from qlora_cli.data.formats import FORMATS
from qlora_cli.errors import DataError
from qlora_cli.recipe.data_schema import DataSection
from tests.conftest import write_jsonl

COUNT = 300


def test_every_mutated_row_is_encoded_or_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    tally = fuzz_data.run(0, range(COUNT), longest=10_000)
    assert (tally.tracebacks, tally.broken, capsys.readouterr().err) == (0, 0, "")
    assert sum(tally.cases.values()) == COUNT
    assert min(tally.rows["encoded"], tally.rows["cannot be read"], tally.rows["named in a refusal"]) > 100
    assert {name.split(":")[0] for name in tally.cases} == {"row", "text", "packed", "encoding", "long"}


def test_the_cases_are_of_every_kind_and_the_same_each_time(tmp_path: Path) -> None:
    once = [fuzz_data.make_case(1, number, tmp_path, longest=10_000) for number in range(COUNT)]
    first = [case.path.read_bytes() for case in once]
    again = [fuzz_data.make_case(1, number, tmp_path, longest=10_000) for number in range(COUNT)]
    assert once == again
    assert [case.path.read_bytes() for case in again] == first
    assert {case.path.suffix for case in once} >= {*fuzz_data.SUFFIXES, ".gz", ".zst"}
    assert {case.keys["format"] for case in once} == {*FORMATS, "auto"}
    for name, values in fuzz_data.CHOICES.items():
        assert {case.keys[name] for case in once} >= set(values)


def refused(path: Path, rows: list[Any], **keys: Any) -> tuple[fuzz_data.Case, DataError]:
    """A case, and what it was refused with."""
    case = fuzz_data.Case(0, "row", write_jsonl(path, rows), {"format": "text", "on_bad_row": "error", **keys})
    with pytest.raises(DataError) as caught:
        load_data(DataSection(train=str(case.path), **case.keys), Setting(fuzz_data.tokenizer_for("none")))
    return case, caught.value


def test_a_refusal_counts_only_if_it_names_the_file_and_can_be_printed(tmp_path: Path) -> None:
    case, error = refused(tmp_path / "a.jsonl", [{"text": i} for i in range(12)])
    assert fuzz_data.check_refusal(case, error) == "DataError, FILE:LINE"
    assert fuzz_data.named(error) == 12
    for what, where in (("no name", ""), ("no line", str(case.path))):
        with pytest.raises(fuzz_data.BrokenError):
            fuzz_data.check_refusal(case, DataError.of([*error.problems[:1], *DataError(what, where=where).problems]))


def test_a_row_that_is_lost_without_its_place_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 1}])
    keys = {"format": "text", "on_bad_row": "skip", "max_length": 8, "template": "none"}
    data = load_data(DataSection(train=str(path), **keys), Setting(fuzz_data.tokenizer_for("none")))  # type: ignore[arg-type]
    case = fuzz_data.Case(0, "row", path, keys, rows=2)
    assert fuzz_data.check_counts(case, data) == {"encoded": 1, "cannot be read": 1}
    monkeypatch.setattr(type(data), "lost_rows", lambda self: iter(()))
    with pytest.raises(fuzz_data.BrokenError, match="0 bad rows are listed of 1"):
        fuzz_data.check_counts(case, data)
