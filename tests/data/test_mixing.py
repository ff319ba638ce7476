"""Which rows are trained on and held out, and how often each comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.dataset import Setting, TokenData, load_data
from qlora_cli.errors import DataError
from qlora_cli.recipe.data_schema import DataSection
from tests.conftest import write_jsonl


class Sources:
    """Writes sources of text rows and loads them."""

    def __init__(self, place: Path, tokenizer: Any) -> None:
        self.place, self.tokenizer = place, tokenizer

    def __call__(self, texts: dict[str, list[str]], seed: int = 0, **keys: Any) -> TokenData:
        sources = {}
        for name, rows in texts.items():
            path = write_jsonl(self.place / f"{name}.jsonl", [{"text": text} for text in rows])
            sources[name] = {"path": str(path), **keys.pop(name, {})}
        section = DataSection.model_validate({"sources": sources, "format": "text"} | keys)
        return load_data(section, Setting(self.tokenizer, seed))

    def texts(self, rows: Any) -> list[str]:
        return [self.tokenizer.decode(row.ids, skip_special_tokens=True).strip() for row in rows]


@pytest.fixture
def load(tmp_path: Path, tokenizer: Any) -> Sources:
    return Sources(tmp_path, tokenizer)


def named(letter: str, count: int) -> list[str]:
    return [f"{letter}{i}" for i in range(count)]


def test_concat_has_every_row_of_every_source_once(load: Sources) -> None:
    data = load({"a": named("a", 3), "b": named("b", 2)})
    assert sorted(load.texts(data.train)) == ["a0", "a1", "a2", "b0", "b1"]


def test_a_weight_says_how_often_rows_come_in_a_concatenation(load: Sources) -> None:
    data = load({"a": named("a", 4), "b": named("b", 4)}, a={"weight": 2.5}, b={"weight": 0.5})
    found = load.texts(data.train)
    counts = [found.count(text) for text in named("a", 4)]
    assert sorted(counts) == [2, 2, 3, 3]
    assert len([text for text in found if text.startswith("b")]) == 2
    assert data.receipt.sources[0].kept == 4


@pytest.mark.parametrize(("stop", "expected"), [("first_exhausted", (2, 6)), ("all_exhausted", (4, 12))])
def test_interleaving_keeps_the_proportion_of_the_weights(load: Sources, stop: str, expected: tuple[int, int]) -> None:
    data = load({"a": named("a", 4), "b": named("b", 6)}, b={"weight": 3.0}, mix="interleave", stop=stop)
    found = load.texts(data.train)
    assert tuple(sum(text.startswith(letter) for text in found) for letter in "ab") == expected
    if stop == "all_exhausted":
        assert set(found) == {*named("a", 4), *named("b", 6)}


def test_skip_and_take_choose_rows_in_the_order_of_the_file(load: Sources) -> None:
    data = load({"a": named("a", 10)}, a={"skip": 3, "take": 4})
    assert load.texts(data.train) == ["a3", "a4", "a5", "a6"]
    assert data.receipt.sources[0].read == 4


def test_take_of_a_shuffled_source_is_a_sample_that_follows_the_seed(load: Sources) -> None:
    samples = [
        load.texts(load({"a": named("a", 60)}, seed, a={"take": 12, "shuffle": True}).train) for seed in (0, 0, 1)
    ]
    assert samples[0] == samples[1] != samples[2]
    assert len(set(samples[0])) == 12
    assert samples[0] != named("a", 12)
    receipt = load({"a": named("a", 60)}, a={"take": 12, "shuffle": True}).receipt.sources[0]
    assert (receipt.read, receipt.kept, receipt.left_out) == (60, 12, 48)


def test_skip_and_take_of_a_shuffled_source_share_no_row(load: Sources) -> None:
    rows = {"a": named("a", 30)}
    first = load.texts(load(rows, a={"take": 10, "shuffle": True}).train)
    rest = load.texts(load(rows, a={"skip": 10, "shuffle": True}).train)
    assert sorted(first + rest) == sorted(named("a", 30))


def test_duplicates_are_counted_across_sources_and_dropped_where_asked(load: Sources) -> None:
    rows = {"a": ["x", "y", "x"], "b": ["y", "z"]}
    kept, dropped = load(rows), load(rows, duplicates="drop")
    assert [source.duplicate for source in kept.receipt.sources] == [1, 1]
    assert sorted(load.texts(kept.train)) == ["x", "x", "y", "y", "z"]
    assert sorted(load.texts(dropped.train)) == ["x", "y", "z"]
    assert [source.dropped for source in dropped.receipt.sources] == [{"duplicate": 1}, {"duplicate": 1}]


def test_rows_that_are_held_out_too_are_never_trained_on(load: Sources, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": "a1"}, {"text": "new"}])
    data = load({"a": named("a", 3)}, eval=str(held))
    assert load.texts(data.train) == ["a0", "a2"]
    assert load.texts(data.held_out) == ["a1", "new"]
    assert data.receipt.sources[0].overlap == 1
    assert data.receipt.sources[0].dropped == {"also held out": 1}


def test_each_lost_row_is_listed_with_its_place_and_reasons(load: Sources, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": "x"}])
    data = load({"a": ["x", "y", "y", "long" * 9]}, eval=str(held), max_length=12)
    path = tmp_path / "a.jsonl"
    assert list(data.lost_rows()) == [
        {"where": f"{path}:1", "counts": ["also held out"]},
        {"where": f"{path}:3", "counts": ["duplicate"]},
        {"where": f"{path}:4", "counts": ["longer than 12 tokens"]},
    ]


def test_skipped_bad_rows_are_listed_with_what_is_wrong(load: Sources, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"text": 5}\nnot json\n')
    section = DataSection(train=str(path), format="text", on_bad_row="skip")
    data = load_data(section, Setting(load.tokenizer))
    lost = list(data.lost_rows())
    assert [row["where"] for row in lost] == [f"{path}:2", f"{path}:3"]
    assert all(row["counts"] == ["cannot be read"] and row["what"] for row in lost)
    assert data.receipt.sources[0].bad == 2


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"duplicate": 0}, "duplicate: 1 of 4 rows (25.00%), at most 0 are allowed"),
        ({"dropped": "20%"}, "dropped: 1 of 4 rows (25.00%), at most 20% are allowed"),
    ],
)
def test_more_losses_than_the_limit_stop_the_run(load: Sources, limits: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        load({"a": ["x", "y", "y", "long" * 9]}, limits=limits, max_length=12)
    assert caught.value.problems[0].what == words
    assert caught.value.exit_code == 4


def test_losses_up_to_the_limit_are_let_through(load: Sources) -> None:
    data = load({"a": ["x", "y", "y", "long" * 9]}, limits={"duplicate": 1, "dropped": "25%", "cut": 0}, max_length=12)
    assert len(data.train) == 3


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from(named("r", 12)), min_size=1, max_size=30),
    st.sampled_from([1, 3, 0.2, 0.5]),
    st.sampled_from(["keep", "drop"]),
)
def test_equal_rows_never_fall_on_both_sides_and_all_are_counted(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, rows: list[str], wanted: int | float, duplicates: str
) -> None:
    load = Sources(tmp_path_factory.getbasetemp(), tokenizer)
    try:
        data = load({"a": rows}, eval_split=wanted, duplicates=duplicates)
    except DataError as error:
        assert "distinct rows" in str(error) or "left" in str(error)
        return
    train, held = load.texts(data.train), load.texts(data.held_out)
    assert not set(train) & set(held)
    source = data.receipt.sources[0]
    assert source.read == source.kept + source.held_out + sum(source.dropped.values()) == len(rows)
    assert set(train) | set(held) == set(rows)
    assert np.all(data.train.lengths == [len(row) for row in data.train])
