"""What `qlora data` finds: rows as the model sees them, and what became of each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_cli.errors import DataError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.workflows.data import Preview, Wanted, preview
from qlora_cli.workflows.events import Event
from qlora_cli.workflows.seen import Piece, pieces_of
from tests.conftest import chat_rows, make_tokenizer, write_jsonl

Show = Callable[..., Preview]
TRAILING = "\N{REPLACEMENT CHARACTER}"


def answered(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [
    answered("q1", "a"),
    answered("x" * 80, "b"),
    {"nothing": 1},
    answered("q1", "a"),
    answered("q5", " "),
    answered("q6", "c"),
]
PLAIN = ["data.eval_split=null", "data.cache=false", "data.on_bad_row=skip"]


@pytest.fixture
def show(recipe_file: Callable[..., Path]) -> Show:
    """A function that previews rows with the tiny recipe: nothing held out, bad rows skipped."""

    def run(wanted: Wanted, *overrides: str, rows: Sequence[Any] = ROWS) -> Preview:
        return preview(load_recipe(str(recipe_file(rows=rows)), [*PLAIN, *overrides]), wanted, lambda event: None)

    return run


def lines(found: Preview) -> list[int]:
    return [int(row.where.rpartition(":")[2]) for row in found.rows]


def test_the_sample_begins_with_the_first_row_and_is_spread_evenly(show: Show) -> None:
    assert lines(show(Wanted(3), rows=chat_rows(24))) == [1, 9, 17]
    assert lines(show(Wanted(100), rows=chat_rows(4))) == [1, 2, 3, 4]
    assert lines(show(Wanted(0), rows=chat_rows(4))) == []


def test_the_sample_holds_no_row_twice_where_an_epoch_does(show: Show, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", chat_rows(3))
    sources = f"data.sources={{few: {{path: {path}, weight: 3.0}}}}"
    assert lines(show(Wanted(3), "data.train=null", sources)) == [1, 2, 3]


def test_the_sample_can_be_of_held_out_rows(show: Show) -> None:
    found = show(Wanted(100, held_out=True), "data.eval_split=2", rows=chat_rows(12))
    assert [row.fate.became for row in found.rows] == ["held out", "held out"]
    kept = show(Wanted(100), "data.eval_split=2", rows=chat_rows(12))
    assert sorted(lines(found) + lines(kept)) == list(range(1, 13))


def test_the_sample_can_be_of_a_file_of_held_out_rows(show: Show, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [answered("h", "a"), answered("x" * 80, "b")])
    found = show(Wanted(5, held_out=True, lost=5), f"data.eval={held}", rows=chat_rows(4))
    assert [(row.where, row.fate.became) for row in found.rows] == [(f"{held}:1", "held out")]
    assert list(found.lost) == [{"where": f"{held}:2", "counts": ["longer than 64 tokens"]}]


def test_held_out_rows_that_do_not_exist_are_an_error(show: Show) -> None:
    with pytest.raises(DataError, match="the recipe holds no rows out"):
        show(Wanted(1, held_out=True))


def test_a_row_has_its_ids_its_tokens_and_its_targets(show: Show) -> None:
    (row,) = show(Wanted(places=[("rows.jsonl", 1)])).rows
    assert row.ids == (1, 3, 203, 85, 21, 2, 203, 4, 203, 69, 2)
    assert row.tokens == ("<s>", "<|user|>", "Ċ", "q", "1", "</s>", "Ċ", "<|assistant|>", "Ċ", "a", "</s>")
    assert row.loss == (*[False] * 9, True, True)
    assert row.pieces == (Piece("<s><|user|>\nq1</s>\n<|assistant|>\n", False), Piece("a</s>", True))


def test_the_first_token_is_never_marked_since_nothing_predicts_it(show: Show) -> None:
    (row,) = show(Wanted(1), "data.loss_on=all", rows=chat_rows(1)).rows
    assert row.loss == (False, *[True] * (len(row.ids) - 1))
    assert sum(row.loss) == show(Wanted(), "data.loss_on=all", rows=chat_rows(1)).receipt.train.supervised_tokens


@pytest.mark.parametrize(
    ("line", "fate", "text"),
    [
        (1, "train", "<s><|user|>\nq1</s>\n<|assistant|>\na</s>"),
        (2, "dropped: longer than 64 tokens", f"<s><|user|>\n{'x' * 80}</s>\n<|assistant|>\nb</s>"),
        (4, "train: duplicate", "<s><|user|>\nq1</s>\n<|assistant|>\na</s>"),
        (5, "dropped: an answer is empty", "<s><|user|>\nq5</s>\n<|assistant|>\n </s>"),
    ],
)
def test_a_row_is_shown_with_what_became_of_it(show: Show, line: int, fate: str, text: str) -> None:
    (row,) = show(Wanted(places=[("rows.jsonl", line)])).rows
    assert (row.fate.line(), "".join(piece.text for piece in row.pieces)) == (fate, text)


def test_a_row_that_cannot_be_read_is_shown_as_it_stands_with_what_is_wrong(show: Show) -> None:
    (row,) = show(Wanted(places=[("rows.jsonl", 3)])).rows
    assert row.fate.line().startswith("dropped: cannot be read (field `messages` is missing")
    assert (row.ids, row.values) == ((), '{"nothing": 1}')


def test_a_line_that_is_no_json_is_shown_with_what_is_wrong(show: Show, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "broken.jsonl", [answered("q", "a")])
    path.write_text(path.read_text() + "{oops\n")
    (row,) = show(Wanted(places=[("broken.jsonl", 2)]), f"data.train={path}").rows
    assert row.fate.became == "dropped"
    assert row.fate.what
    assert (row.ids, row.values) == ((), "")


def test_duplicates_that_are_dropped_and_overlap_are_told_apart(show: Show, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [ROWS[5]])
    places = [("rows.jsonl", 4), ("rows.jsonl", 6), ("held.jsonl", 1)]
    found = show(Wanted(places=places), "data.duplicates=drop", f"data.eval={held}")
    assert [row.fate.line() for row in found.rows] == ["dropped: duplicate", "dropped: also held out", "held out"]
    assert all(row.ids for row in found.rows)


def test_a_row_that_was_cut_is_shown_as_it_is_trained_on(show: Show) -> None:
    (row,) = show(
        Wanted(places=[("rows.jsonl", 6)]), "data.target_max_length=2", rows=[*ROWS[:5], answered("q", "abc")]
    ).rows
    assert (row.fate.line(), row.pieces[-1]) == ("train: cut", Piece("a</s>", True))


def test_rows_left_out_by_skip_and_take_say_so(show: Show, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", chat_rows(4))
    sources = f"data.sources={{few: {{path: {path}, shuffle: true, take: 1}}}}"
    places = [("few.jsonl", line) for line in (1, 2, 3, 4)]
    found = show(Wanted(places=places), "data.train=null", sources)
    assert sorted(row.fate.became for row in found.rows) == ["left out", "left out", "left out", "train"]


def test_every_piece_of_a_row_that_was_split_is_shown(show: Show, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "abcdefghi"}])
    places = [("text.jsonl", 1)]
    shape = ["data.format=text", "data.too_long=split", "data.max_length=6"]
    found = show(Wanted(places=places), f"data.train={path}", *shape)
    assert [(row.part, row.parts) for row in found.rows] == [(1, 2), (2, 2)]
    assert [row.pieces for row in found.rows] == [
        (Piece("a", False), Piece("bcdef", True)),
        (Piece("f", False), Piece("ghi</s>", True)),
    ]


def test_a_row_of_a_compressed_file_is_read_again_when_it_was_dropped(show: Show, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    (row,) = show(Wanted(places=[(str(path), 5)]), f"data.train={path}").rows
    assert (row.fate.line(), row.pieces[-1]) == ("dropped: an answer is empty", Piece(" </s>", True))


def test_a_file_may_be_named_by_the_end_of_its_path_or_in_another_way(show: Show, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for name in (str(path), "rows.jsonl", f"{tmp_path.name}/rows.jsonl", f"{tmp_path}/../{tmp_path.name}/rows.jsonl"):
        assert [row.where for row in show(Wanted(places=[(name, 1)])).rows] == [f"{path}:1"]


def test_places_that_are_not_in_the_data_are_one_error_that_names_files_and_lines(show: Show, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        show(Wanted(places=[("rows.jsonl", 7), ("rows.jsonl", 1), ("ows.jsonl", 1)]))
    known = f"{tmp_path / 'rows.jsonl'} (1 to 6)"
    assert [str(problem) for problem in caught.value.problems] == [
        f"rows.jsonl:7: no row that was read begins there\n  fix: name one of {known}",
        f"ows.jsonl:1: the data has no such file\n  fix: name one of {known}",
    ]


def test_lost_rows_are_listed_with_their_reasons_and_counted_beyond_the_list(show: Show) -> None:
    found = show(Wanted(lost=2))
    where = [row["where"].rpartition(":")[2] for row in found.lost]
    assert (where, [row["counts"] for row in found.lost], found.all_lost) == (
        ["2", "3"],
        [["longer than 64 tokens"], ["cannot be read"]],
        4,
    )
    assert show(Wanted()).lost == ()


def test_rows_are_shown_where_a_limit_refuses_them_and_the_refusal_comes_last(show: Show) -> None:
    found = show(Wanted(1, lost=9), "data.limits.dropped=2")
    assert (lines(found), len(found.lost)) == ([1], 4)
    assert "dropped: 3 of 6 rows (50.00%), at most 2 are allowed" in str(found.refusal)
    assert show(Wanted(), "data.limits.dropped=3").refusal is None


def test_what_load_data_refuses_is_refused_unchanged(show: Show) -> None:
    with pytest.raises(DataError, match="0 supervised tokens are left of 1 rows"):
        show(Wanted(1), rows=ROWS[1:2])
    with pytest.raises(DataError, match=r"rows\.jsonl:3: field `messages` is missing"):
        show(Wanted(1), "data.on_bad_row=error")


def test_a_tokenizer_is_enough(show: Show, tmp_path: Path) -> None:
    folder = tmp_path / "weightless"
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert lines(show(Wanted(1), f"model.base={folder}")) == [1]


def test_the_receipt_says_how_well_rows_are_packed(show: Show) -> None:
    assert show(Wanted(), "train.packing=false", rows=chat_rows(8)).receipt.packing is None
    share = show(Wanted(), "train.packing=true", rows=chat_rows(8)).receipt.packing
    assert share is not None
    assert 0.5 < share <= 1.0


def test_what_it_does_is_told(recipe_file: Callable[..., Path]) -> None:
    told: list[Event] = []
    path = recipe_file()
    preview(load_recipe(str(path), PLAIN), Wanted(), told.append)
    assert told[0].line() == f"reading {path.with_name('rows.jsonl')} ..."


def pieces(text: str, marks: str) -> list[tuple[str, bool]]:
    """Pieces of `text` in the tiny tokenizer, whose tokens are bytes; `marks` has a + for each byte with loss."""
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(marks)
    loss = np.array([mark == "+" for mark in marks])
    return [(piece.text, piece.supervised) for piece in pieces_of(tokenizer.decode, ids, loss)]


def test_a_blank_that_a_decoder_strips_at_the_beginning_stays_between_runs() -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    tokenizer.decoder = decoders.Metaspace()
    found = list(pieces_of(tokenizer.decode, [0, 1, 0], np.array([False, True, True])))
    assert found == [Piece("a", False), Piece(" b a", True)]


@pytest.mark.parametrize(
    ("text", "marks", "expected"),
    [
        ("ab cd", "--+++", [("ab", False), (" cd", True)]),
        ("ab", "++", [("ab", True)]),
        ("日本", "---+++", [("日", False), ("本", True)]),
        ("日本a", "----+++", [("日", False), ("本a", True)]),
        ("a日b", "-++--", [("a", False), ("", True), ("日b", False)]),
        ("", "", []),
    ],
)
def test_runs_are_decoded_together_and_no_character_is_torn(
    text: str, marks: str, expected: list[tuple[str, bool]]
) -> None:
    found = pieces(text, marks)
    assert found == expected
    assert TRAILING not in "".join(piece for piece, _ in found)
