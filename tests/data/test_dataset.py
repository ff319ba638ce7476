"""From a file to encoded rows: what is dropped, cut and held out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.dataset import Setting, TokenData, load_data, load_held_out
from qlora_cli.data.encode import Encoded
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import DataSection
from tests.conftest import make_tokenizer, write_jsonl
from tests.data.conftest import ALTERNATING, THINKING, marked, with_bos

Load = Callable[..., TokenData]


@pytest.fixture
def load(tmp_path: Path, tokenizer: Any) -> Load:
    """A function that writes rows and loads them under the given keys of `data`."""

    def run(rows: Sequence[Any], with_tokenizer: Any = None, **keys: Any) -> TokenData:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        section = DataSection.model_validate({"train": str(path), "format": "text"} | keys)
        return load_data(section, Setting(with_tokenizer or tokenizer))

    return run


def texts(rows: Sequence[Encoded], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows]


def lines(rows: Sequence[Encoded]) -> list[int]:
    return [int(row.where.rsplit(":", 1)[1]) for row in rows]


def numbered(count: int) -> list[dict[str, str]]:
    return [{"text": f"row {i}"} for i in range(count)]


FORMATS = [
    ("text", {"text": "ab"}, "<s> [a] [b] [</s>]"),
    ("prompt-completion", {"prompt": "q", "completion": "ab"}, "<s> q [a] [b] [</s>]"),
    (
        "messages",
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "<s> <|user|> Ċ q </s> Ċ <|assistant|> Ċ [a] [</s>]",
    ),
    (
        "alpaca",
        {"instruction": "q", "input": "x", "output": "a"},
        "<s> <|user|> Ċ q Ċ Ċ x </s> Ċ <|assistant|> Ċ [a] [</s>]",
    ),
]


@pytest.mark.parametrize(("row_format", "row", "expected"), FORMATS)
def test_a_row_of_each_format_becomes_these_tokens(load: Load, row_format: str, row: Any, expected: str) -> None:
    tokenizer = with_bos()
    data = load([row], tokenizer, format=row_format)
    assert [marked(encoded, tokenizer) for encoded in data.train] == [expected]


def test_columns_of_another_name_are_read(load: Load, tokenizer: Any) -> None:
    keys = {"format": "prompt-completion", "columns": {"prompt": "input", "completion": "output"}}
    data = load([{"input": "q", "output": "a"}], **keys)
    assert [marked(row, tokenizer) for row in data.train] == ["q [a] [</s>]"]


def test_a_row_longer_than_the_limit_is_dropped_and_counted(load: Load) -> None:
    data = load([{"text": "abc"}, {"text": "abcd"}, {"text": "ab"}], max_length=4)
    assert lines(data.train) == [1, 3]
    assert data.receipt.sources[0].dropped == {"longer than 4 tokens": 1}


def test_a_row_longer_than_the_limit_is_cut_and_keeps_its_end_of_turn(load: Load, tokenizer: Any) -> None:
    data = load([{"text": "abc"}, {"text": "abcdef"}], max_length=4, too_long="truncate")
    assert [marked(row, tokenizer) for row in data.train] == ["[a] [b] [c] [</s>]", "[a] [b] [c] [</s>]"]
    source = data.receipt.sources[0]
    assert (source.kept, source.cut, source.dropped) == (2, 1, {})


def test_a_row_whose_prompt_fills_the_limit_is_dropped_not_taught_as_silence(load: Load) -> None:
    rows = [
        {"prompt": "qqq", "completion": "ab"},
        {"prompt": "q" * 9, "completion": "a"},
        {"prompt": "q", "completion": "a"},
    ]
    data = load(rows, format="prompt-completion", max_length=4, too_long="truncate")
    source = data.receipt.sources[0]
    assert lines(data.train) == [3]
    assert (source.kept, source.cut, source.dropped) == (1, 0, {"no answer within 4 tokens": 2})


def test_with_the_error_policy_every_row_that_is_too_long_is_named(load: Load, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load([{"text": "abcd"}, {"text": "a"}, {"text": "abcde"}], max_length=4, too_long="error")
    assert [str(problem).splitlines()[0] for problem in caught.value.problems] == [
        f"{tmp_path / 'rows.jsonl'}:1: 5 tokens, more than data.max_length (4)",
        f"{tmp_path / 'rows.jsonl'}:3: 6 tokens, more than data.max_length (4)",
    ]


def test_nothing_left_to_train_on_is_refused(load: Load) -> None:
    with pytest.raises(DataError, match="0 supervised tokens are left of 2 rows"):
        load([{"text": "abcd"}, {"text": "abcde"}], max_length=4)


def test_holding_every_row_out_is_refused(load: Load) -> None:
    with pytest.raises(DataError, match=r"eval_split is 3, but .* has only 3 distinct rows"):
        load(numbered(3), eval_split=3)


@pytest.mark.parametrize("blank", ["", "  ", "\n\t"])
def test_an_answer_of_nothing_but_space_is_dropped_and_counted(load: Load, blank: str) -> None:
    data = load([{"text": blank}, {"text": "a"}])
    assert lines(data.train) == [2]
    assert data.receipt.sources[0].dropped == {"an answer is empty": 1}


def test_rows_that_differ_only_in_columns_the_model_never_sees_stay_on_one_side(load: Load) -> None:
    rows = [{"text": f"t{i % 5}", "id": i} for i in range(20)]
    data = load(rows, eval_split=2)
    assert data.receipt.sources[0].held_out == 8
    assert {row.ids.tobytes() for row in data.train} & {row.ids.tobytes() for row in data.held_out} == set()


def test_unanswered_last_turns_are_left_off_and_counted(load: Load, tokenizer: Any) -> None:
    answered = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    open_ended = {"messages": [*answered, {"role": "user", "content": "r"}]}
    data = load([{"messages": answered}, open_ended], format="messages")
    first, second = (marked(row, tokenizer) for row in data.train)
    assert first == second
    assert data.receipt.sources[0].trailing_turns == 1


def reasoning(length: int) -> dict[str, Any]:
    """Two answers, the second of which has `length` letters; `THINKING` makes two rows of it."""
    turns = [("user", "q"), ("assistant", "x</think>a"), ("user", "r"), ("assistant", "b" * length)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_a_conversation_that_loses_one_of_its_sequences_is_kept_and_counted_as_cut(load: Load) -> None:
    data = load([reasoning(1), reasoning(30), reasoning(2)], make_tokenizer(THINKING), format="messages", max_length=16)
    assert lines(data.train) == [1, 1, 2, 3, 3]
    source, split = data.receipt.sources[0], data.receipt.train
    assert (source.read, source.kept, source.cut, source.dropped) == (3, 3, 1, {})
    assert (split.rows, split.sequences) == (3, 5)


def test_a_conversation_that_loses_all_of_its_sequences_is_dropped_once(load: Load) -> None:
    short = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    data = load([reasoning(30), short], make_tokenizer(THINKING), format="messages", max_length=8)
    source = data.receipt.sources[0]
    assert (source.read, source.kept, source.cut, source.dropped) == (2, 1, 0, {"longer than 8 tokens": 1})


def test_bad_rows_of_both_splits_are_named_together_in_the_order_of_the_file(load: Load) -> None:
    with pytest.raises(DataError) as caught:
        load([{"text": i} if i % 2 else {"text": str(i)} for i in range(12)], eval_split=0.5)
    assert [problem.where.rsplit(":", 1)[1] for problem in caught.value.problems] == ["2", "4", "6", "8", "10", "12"]


def test_a_row_that_the_template_refuses_is_named_by_file_and_line(load: Load, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    bad = {"messages": [{"role": "assistant", "content": "a"}, *good["messages"]]}
    with pytest.raises(DataError) as caught:
        load([good, bad], make_tokenizer(ALTERNATING), format="messages")
    (problem,) = caught.value.problems
    assert problem.where == f"{tmp_path / 'rows.jsonl'}:2"
    assert problem.what == "the chat template refuses this conversation: roles must alternate user/assistant"


def test_a_row_of_another_format_is_named_with_the_format_it_fits(load: Load) -> None:
    with pytest.raises(DataError) as caught:
        load([{"instruction": "q", "output": "a"}], format="prompt-completion")
    assert caught.value.problems[0].fix == "the row looks like data.format: alpaca"


def test_a_row_that_fits_no_format_is_pointed_to_columns(load: Load) -> None:
    with pytest.raises(DataError) as caught:
        load([{"question": "q"}], format="text")
    assert "data.columns" in caught.value.problems[0].fix


def test_the_rows_held_out_depend_on_content_alone(load: Load, tokenizer: Any) -> None:
    rows = numbered(40)
    once = load(rows, eval_split=7)
    mixed: list[Any] = random.Random(0).sample(rows, len(rows))
    again = load(mixed, eval_split=7)
    held = set(texts(once.held_out, tokenizer))
    assert len(held) == 7
    assert set(texts(again.held_out, tokenizer)) == held
    assert lines(once.held_out) != lines(again.held_out)
    assert set(texts(once.train, tokenizer)) | held == {row["text"] for row in rows}


def test_the_order_of_keys_in_a_row_does_not_move_it(load: Load) -> None:
    rows = [{"text": f"row {i}", "id": i} for i in range(20)]
    turned = [{"id": row["id"], "text": row["text"]} for row in rows]
    assert lines(load(rows, eval_split=5).held_out) == lines(load(turned, eval_split=5).held_out)


def test_equal_rows_are_on_the_same_side(load: Load, tokenizer: Any) -> None:
    data = load(numbered(12) * 3, eval_split=4)
    held, trained = texts(data.held_out, tokenizer), texts(data.train, tokenizer)
    assert not set(held) & set(trained)
    assert (len(held), len(set(held)), len(trained)) == (12, 4, 24)


def test_a_share_holds_out_about_that_share(load: Load) -> None:
    data = load(numbered(1000), eval_split=0.1)
    assert len(data.train) + len(data.held_out) == 1000
    assert 70 <= len(data.held_out) <= 130


def test_a_share_of_few_rows_holds_out_one_at_least(load: Load) -> None:
    assert len(load(numbered(3), eval_split=0.001).held_out) == 1


def test_rows_keep_their_side_when_a_file_with_a_share_grows(load: Load, tokenizer: Any) -> None:
    before, after = load(numbered(200), eval_split=0.2), load(numbered(400), eval_split=0.2)
    held, trained = texts(before.held_out, tokenizer), texts(before.train, tokenizer)
    assert held
    assert set(held) < set(texts(after.held_out, tokenizer))
    assert set(trained) < set(texts(after.train, tokenizer))


def test_evaluation_reads_the_very_rows_that_training_held_out(load: Load, tmp_path: Path, tokenizer: Any) -> None:
    rows = numbered(30)
    data = load(rows, eval_split=6)
    section = DataSection(train=str(tmp_path / "rows.jsonl"), format="text", eval_split=6)
    again, hashes, _ = load_held_out(section, Setting(tokenizer))
    assert [row.ids.tolist() for row in again] == [row.ids.tolist() for row in data.held_out]
    assert len(again) == 6
    assert hashes == {source.source: source.sha256 for source in data.receipt.sources}


def test_held_out_rows_may_have_a_file_of_their_own(load: Load, tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "held.jsonl", numbered(3))
    data = load(numbered(5), eval=str(path))
    assert [len(data.train), len(data.held_out)] == [2, 3]  # what is held out is not trained on
    first, second = data.receipt.sources
    assert (first.read, first.kept, first.overlap, second.read, second.held_out) == (5, 2, 3, 3, 3)
    section = DataSection(train="-", format="text", eval=str(path))
    held, hashes, _ = load_held_out(section, Setting(tokenizer))
    assert texts(held, tokenizer) == ["row 0", "row 1", "row 2"]
    assert hashes == {str(path): second.sha256}


def test_a_file_of_held_out_rows_that_are_all_too_long_is_refused_wherever_it_is_read(
    load: Load, tmp_path: Path, tokenizer: Any
) -> None:
    path = write_jsonl(tmp_path / "held.jsonl", [{"text": "abcdef"}])
    with pytest.raises(DataError, match="no held-out row is left"):
        load([{"text": "a"}], eval=str(path), max_length=4)
    with pytest.raises(DataError, match="no held-out row is left"):
        load_held_out(DataSection(train="-", format="text", eval=str(path), max_length=4), Setting(tokenizer))


def test_evaluating_without_held_out_rows_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the recipe holds no rows out"):
        load_held_out(DataSection(train="rows.jsonl"), Setting(tokenizer))


def test_the_tokens_that_end_a_turn_come_with_the_data(load: Load) -> None:
    assert load([{"text": "a"}]).stop_ids == {2}
