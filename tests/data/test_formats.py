"""Row formats: which rows become conversations, and what is said of those that do not."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from qlora_cli.data.conversation import Conversation, Message
from qlora_cli.data.formats import FORMATS, RowError, fitting, renamed
from qlora_cli.recipe.rules import FIELDS
from qlora_cli.recipe.schema import DataSection

ASK, SAY = Message("user", "q"), Message("assistant", "a")

CASES: list[tuple[str, dict[str, Any], tuple[Message, ...]]] = [
    ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, (ASK, SAY)),
    (
        "messages",
        {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}], "id": 3},
        (Message("system", "s"), SAY),
    ),
    ("prompt-completion", {"prompt": "q", "completion": "a", "other": None}, (ASK, SAY)),
    ("alpaca", {"instruction": "q", "output": "a"}, (ASK, SAY)),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, (ASK, SAY)),
    ("alpaca", {"instruction": "q", "input": None, "output": "a"}, (ASK, SAY)),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a"}, (Message("user", "q\n\nx"), SAY)),
    ("text", {"text": "a"}, (SAY,)),
]

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"text": "a", "id": 1}, "field `messages` is missing (the row has: `id`, `text`)"),
    ("messages", {}, "field `messages` is missing (the row has: no fields)"),
    ("messages", {"messages": "hi"}, "field `messages` must be a list of messages, but is str"),
    ("messages", {"messages": []}, "field `messages` must be a list of messages, but is empty"),
    ("messages", {"messages": ["hi"]}, "messages[0] must be an object with `role` and `content`, but is str"),
    ("messages", {"messages": [{"role": "user"}]}, "messages[0].content is missing (it has: role)"),
    ("messages", {"messages": [{"role": 1, "content": "q"}]}, "messages[0].role must be text, but is a number"),
    (
        "messages",
        {"messages": [{"role": "user", "content": "q"}, {"role": "human", "content": "q"}]},
        "messages[1].role is `human`; known roles are system, user, assistant",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "q"}]},
        "field `messages` has no assistant turn: there is nothing to learn in it",
    ),
    ("prompt-completion", {"prompt": "q"}, "field `completion` is missing (the row has: `prompt`)"),
    (
        "prompt-completion",
        {"prompt": ["q"], "completion": "a"},
        "field `prompt` must be text, but is a list",
    ),
    ("alpaca", {"instruction": "q", "output": 7}, "field `output` must be text, but is a number"),
    ("alpaca", {"instruction": "q", "input": {"a": 1}, "output": "a"}, "field `input` must be text, but is an object"),
    ("text", {"text": None}, "field `text` must be text, but is null"),
    ("text", {"text": True}, "field `text` must be text, but is a boolean"),
    ("text", {"text": "a\ud83d"}, "field `text` is not Unicode text: surrogates not allowed (character 2)"),
    (
        "messages",
        {"messages": [{"role": "assistant", "content": "\udc00"}]},
        "messages[0].content is not Unicode text: surrogates not allowed (character 1)",
    ),
]


@pytest.mark.parametrize(("name", "row", "messages"), CASES)
def test_a_row_becomes_its_messages(name: str, row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    assert FORMATS[name].build(row) == Conversation(messages)


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_a_row_of_another_shape_is_refused_with_the_field_that_is_wrong(
    name: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RowError) as caught:
        FORMATS[name].build(row)
    assert str(caught.value) == reason


def test_the_schema_and_the_table_name_the_same_formats_and_each_has_a_good_and_a_bad_row() -> None:
    words = get_args(DataSection.model_fields["format"].annotation)
    assert set(words) == set(FORMATS) == {case[0] for case in CASES} == {case[0] for case in BAD}


def test_the_fields_of_a_format_are_those_whose_absence_it_refuses() -> None:
    rows = {name: row for name, row, _ in CASES}
    removals = [(name, field) for name, shape in FORMATS.items() for field in shape.fields]
    assert len(removals) == 6
    for name, field in removals:
        with pytest.raises(RowError, match=f"field `{field}` is missing"):
            FORMATS[name].build({key: value for key, value in rows[name].items() if key != field})


def test_a_row_fits_the_formats_whose_fields_it_has() -> None:
    assert fitting({"instruction": "q", "output": "a", "text": "t"}) == ("alpaca", "text")
    assert fitting({"input": "q", "output": "a"}) == ()


def test_columns_are_renamed_to_fields_and_other_columns_stay() -> None:
    columns = {"prompt": "input", "completion": "output"}
    assert renamed({"input": "q", "output": "a", "id": 1}, columns) == {"prompt": "q", "completion": "a", "id": 1}


def test_columns_may_trade_places() -> None:
    assert renamed({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1}


def test_a_column_that_a_row_lacks_is_named_even_where_the_field_is_there_under_its_own_name() -> None:
    with pytest.raises(RowError, match=r"column `input` is missing \(the row has: `output`, `prompt`\)"):
        renamed({"prompt": "q", "output": "a"}, {"prompt": "input", "completion": "output"})


def test_only_the_optional_input_of_alpaca_may_lack_its_column() -> None:
    row = {"ask": "q", "output": "a"}
    assert renamed(row, {"instruction": "ask", "input": "context"}) == {"instruction": "q", "output": "a"}


def test_without_columns_a_row_is_left_as_it_is() -> None:
    row = {"text": "a"}
    assert renamed(row, {}) is row


def test_schema_rules_and_formats_know_the_same_formats_and_fields() -> None:
    assert set(get_args(DataSection.model_fields["format"].annotation)) == set(FORMATS) == set(FIELDS)
    assert len(FORMATS) == 4
    for name, shape in FORMATS.items():
        optional = set(FIELDS[name]) - set(shape.fields)
        assert set(shape.fields) <= set(FIELDS[name])
        assert optional == ({"input"} if name == "alpaca" else set())
