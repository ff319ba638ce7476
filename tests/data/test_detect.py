"""Detection: a format is named where one alone fits, and refused where two do."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_cli.data.formats import FORMATS, Detected, RowError, detect, fitting
from tests.data.format_cases import ASSISTANT, GOOD, USER

PLAINEST = {name: row for name, row, _ in reversed(GOOD)}
HUMAN = "### Human: q### Assistant: a"

AMBIGUOUS: list[tuple[list[dict[str, Any]], tuple[str, ...]]] = [
    ([{"text": "They write ### Human: before a turn"}], ("text", "guanaco")),
    ([{"text": HUMAN}, {"text": "plain"}], ("text", "guanaco")),
    ([{"text": "The syntax:\n<human>: q\n<bot>: a"}], ("text", "chip2")),
    ([{"text": HUMAN}, {"text": "<human>: q\n<bot>: a"}], ("text", "guanaco", "chip2")),
    (
        [{"prompt": "q", "completion": "a<|endoftext|>"}, {"prompt": "q", "completion": "a"}],
        ("prompt-completion", "self-instruct"),
    ),
    (
        [{"input": "q", "output": "a"}, {"input": "x", "output": "a", "instruction": "q"}],
        ("alpaca", "longform"),
    ),
    ([{"instruction": "q", "input": "", "output": "a", "text": "q a"}], ("alpaca", "text")),
    ([{"messages": [USER, ASSISTANT], "text": "q a"}], ("messages", "text")),
    ([{"prompt": "q", "completion": "a", "messages": [USER, ASSISTANT]}], ("messages", "prompt-completion")),
    ([{"input": "q", "output": "a", "text": HUMAN}], ("guanaco", "longform")),
]


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_of_each_format_is_detected_as_itself(name: str) -> None:
    assert detect([PLAINEST[name]] * 3) == Detected(name, f"rows have {FORMATS[name].shape}")


def test_the_reason_is_what_the_rows_have() -> None:
    assert detect([PLAINEST["sharegpt"]]).why == "rows have `conversations` with `from` and `value`"
    assert detect([PLAINEST["self-instruct"]]).why == (
        "rows have `prompt` and `completion` that ends with `<|endoftext|>`"
    )


@pytest.mark.parametrize(("rows", "names"), AMBIGUOUS)
def test_rows_that_two_formats_fit_are_refused_with_the_names_of_both(
    rows: list[dict[str, Any]], names: tuple[str, ...]
) -> None:
    with pytest.raises(RowError) as caught:
        detect(rows)
    ways = " or as ".join(f"{name} ({FORMATS[name].shape})" for name in names)
    assert str(caught.value) == f"the rows can be read as {ways}"
    assert caught.value.fix == "set " + " or ".join(f"data.format: {name}" for name in names)


def test_optional_fields_do_not_make_another_format() -> None:
    rows = [{"instruction": "q", "input": "x", "output": "a"}, {"instruction": "q", "output": "a"}]
    assert detect(rows).name == "alpaca"
    assert detect([{"messages": [USER, ASSISTANT], "prompt": "q", "tools": None}]).name == "messages"
    assert detect([{"prompt": [USER], "completion": [ASSISTANT]}]).name == "prompt-completion"


def test_fields_of_no_format_are_named_with_what_each_format_needs() -> None:
    with pytest.raises(RowError) as caught:
        detect([{"question": "q", "answer": "a"}, {"question": "q", "hint": None}])
    assert str(caught.value) == "the rows have the shape of no format (they have: `answer`, `hint`, `question`)"
    for name, shape in FORMATS.items():
        assert f"{name} needs {shape.shape}" in caught.value.fix


def test_a_format_that_one_row_breaks_is_named_with_the_row_and_the_field() -> None:
    broken = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": 7}]}
    with pytest.raises(RowError) as caught:
        detect([PLAINEST["sharegpt"], broken])
    assert str(caught.value) == (
        "the rows have the shape of no format (they have: `conversations`); "
        "not sharegpt: row 2: conversations[1].value must be text, but is a number"
    )


def test_formats_that_fail_for_one_reason_are_named_together() -> None:
    with pytest.raises(RowError) as caught:
        detect([{"text": 7}])
    assert str(caught.value).endswith("; not text, guanaco, chip2: row 1: field `text` must be text, but is a number")


def test_rows_of_two_formats_have_none() -> None:
    with pytest.raises(RowError, match=r"no format .* not messages: row 2: .* not alpaca: row 1: "):
        detect([PLAINEST["messages"], PLAINEST["alpaca"]])


def test_without_rows_there_is_nothing_to_detect() -> None:
    with pytest.raises(RowError, match="there are no rows"):
        detect([])


def test_a_row_fits_the_formats_that_can_read_it() -> None:
    assert fitting({"instruction": "q", "output": "a", "text": "t"}) == ("alpaca", "text")
    assert fitting({"text": HUMAN}) == ("guanaco",)
    assert fitting({"instruction": "q", "output": 7}) == ()
    assert fitting({"question": "q"}) == ()


@pytest.mark.parametrize(
    ("row", "narrow", "wide"),
    [
        ({"instruction": "q", "input": "x", "output": "a"}, "alpaca", "longform"),
        ({"text": HUMAN}, "guanaco", "text"),
        ({"text": "<human>: q\n<bot>: a"}, "chip2", "text"),
        ({"prompt": "q", "completion": "a<|endoftext|>"}, "self-instruct", "prompt-completion"),
    ],
)
def test_a_format_gives_way_to_one_that_knows_more_of_the_row(row: dict[str, Any], narrow: str, wide: str) -> None:
    assert FORMATS[narrow].fits(row)
    assert FORMATS[wide].fits(row)
    assert fitting(row) == (narrow,)


def test_every_format_that_another_gives_way_to_has_a_row_above() -> None:
    assert {shape.over for shape in FORMATS.values()} == {"", "longform", "text", "prompt-completion"}
    assert [name for name, shape in FORMATS.items() if shape.over] == ["alpaca", "guanaco", "self-instruct", "chip2"]
