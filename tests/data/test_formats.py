"""Row formats: which rows become conversations, and what is said of those that do not."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_cli.data.conversation import Conversation, Message
from qlora_cli.data.formats import FORMATS, RowError, fitting, renamed
from qlora_cli.recipe.rules import FIELDS
from qlora_cli.recipe.schema import DataSection
from tests.data.bad_rows import BAD
from tests.data.format_cases import ASSISTANT, CALL, GOOD, USER

PLAINEST = {name: row for name, row, _ in reversed(GOOD)}


@pytest.mark.parametrize(("name", "row", "conversation"), GOOD)
def test_a_row_becomes_its_conversation(name: str, row: dict[str, Any], conversation: Conversation) -> None:
    assert FORMATS[name].build(row) == conversation


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_a_row_of_another_shape_is_refused_with_the_field_that_is_wrong(
    name: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RowError) as caught:
        FORMATS[name].build(row)
    assert str(caught.value) == reason


def test_each_format_has_a_good_and_a_bad_row() -> None:
    assert len(FORMATS) == 12
    assert set(FORMATS) == {case[0] for case in GOOD} == {case[0] for case in BAD}


def test_what_a_template_reads_is_passed_on_untouched() -> None:
    turn = {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "r"}
    row = {"messages": [USER, turn], "tools": [CALL]}
    built = FORMATS["messages"].build(row)
    assert built.messages[1].extra["tool_calls"] is turn["tool_calls"]
    assert built.tools[0] is CALL
    assert built.messages[1].as_dict() == turn


def test_the_fields_of_a_format_are_those_whose_absence_it_refuses() -> None:
    removals = [(name, field) for name, shape in FORMATS.items() for field in shape.fields]
    assert len(removals) == 16
    for name, field in removals:
        with pytest.raises(RowError, match=f"field `{field}` is missing"):
            FORMATS[name].build({key: value for key, value in PLAINEST[name].items() if key != field})


def test_schema_rules_and_formats_know_the_same_formats_and_fields() -> None:
    words = set(get_args(DataSection.model_fields["format"].annotation))
    assert words - {"auto"} == set(FORMATS) == set(FIELDS)
    for name, shape in FORMATS.items():
        assert sorted(FIELDS[name]) == sorted(shape.fields + shape.optional)


# Anything that JSON can say, and the words that formats look for.
WORDS = [
    *["role", "content", "user", "assistant", "tool", "system", "type", "text", "train", "name", "arguments", "tools"],
    *["from", "value", "human", "gpt", "function_call", "tool_calls", "prompter", "replies", "rank", "deleted"],
    *["instances", "instruction_with_input", "output", "### Human: q### Assistant: a", "<human>: q\n<bot>: a"],
    *["\n\nHuman: q\n\nAssistant: a", "<|endoftext|>", '{"name": "f", "arguments": {}}', "[]", "[1]", ""],
]
TEXTS = st.sampled_from(WORDS) | st.text(st.characters(), max_size=6)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)
RAW_TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "prompter"]) | VALUES,
        "from": st.sampled_from(["human", "gpt", "function_call"]) | VALUES,
        **dict.fromkeys(("content", "value", "text", "train", "tool_calls", "name", "rank", "deleted"), VALUES),
        **dict.fromkeys(("replies", "weight", "instruction_with_input", "output"), VALUES),
    },
)
FIELD_VALUES = VALUES | st.lists(RAW_TURNS, max_size=3) | RAW_TURNS


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_any_field_becomes_a_conversation_or_is_refused_in_words_that_can_be_printed(
    name: str, data: st.DataObject
) -> None:
    fields = [*FORMATS[name].fields, *FORMATS[name].optional]
    row = {**PLAINEST[name], **data.draw(st.dictionaries(st.sampled_from(fields), FIELD_VALUES))}
    try:
        built = FORMATS[name].build(row)
    except RowError as error:
        assert str(error).encode()
        assert len(str(error)) < 1200
    else:
        assert any(turn.role == "assistant" and turn.train for turn in built.messages)
        assert json.dumps([turn.as_dict() for turn in built.messages], ensure_ascii=False).encode()
    assert set(fitting(row)) <= set(FORMATS)


def test_replies_a_hundred_levels_deep_become_a_conversation_of_as_many_turns() -> None:
    node: dict[str, Any] = {"text": "a", "role": "assistant"}
    for level in range(99):
        node = {"text": "x", "role": "prompter" if level % 2 == 0 else "assistant", "replies": [node]}
    assert len(FORMATS["oasst"].build({"prompt": node}).messages) == 100


def test_columns_are_renamed_to_fields_and_other_columns_stay() -> None:
    columns = {"prompt": "input", "completion": "output"}
    assert renamed({"input": "q", "output": "a", "id": 1}, columns) == {"prompt": "q", "completion": "a", "id": 1}


def test_columns_may_trade_places() -> None:
    assert renamed({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1}


def test_a_column_that_a_row_lacks_is_named_even_where_the_field_is_there_under_its_own_name() -> None:
    with pytest.raises(RowError, match=r"column `input` is missing \(the row has: `output`, `prompt`\)"):
        renamed({"prompt": "q", "output": "a"}, {"prompt": "input", "completion": "output"})


@pytest.mark.parametrize("field", ["input", "tools", "system"])
def test_only_an_optional_field_may_lack_its_column(field: str) -> None:
    row = {"ask": "q", "output": "a"}
    assert renamed(row, {"instruction": "ask", field: "context"}) == {"instruction": "q", "output": "a"}


def test_without_columns_a_row_is_left_as_it_is() -> None:
    row = {"text": "a"}
    assert renamed(row, {}) is row


def test_conversations_under_another_name_are_read_by_columns() -> None:
    row = renamed({"conversations": [USER, ASSISTANT]}, {"messages": "conversations"})
    assert FORMATS["messages"].build(row).messages == (Message("user", "q"), Message("assistant", "a"))
