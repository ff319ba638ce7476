"""Rows and limits, literally: `x` is a token that carries loss, ids count up from 10, and 2 ends every answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.encode import Encoded
from qlora_cli.data.fit import Fitted, fit, shorten
from qlora_cli.data.formats import RowError

BOS = 1


def row_of(loss: str, bos: bool = False) -> Encoded:
    """A row with `x` where a token carries loss; perhaps BOS in front."""
    wanted = np.array([letter == "x" for letter in loss])
    ends = [wanted[i] and (i + 1 == len(loss) or not wanted[i + 1]) for i in range(len(loss))]
    made = [2 if end else 10 + i for i, end in enumerate(ends)]
    return Encoded(np.array([BOS, *made[1:]] if bos else made, np.int32), wanted, "here")


def fitted(row: Encoded, **limits: Any) -> Fitted:
    """What is left of it under some limits."""
    usual: dict[str, Any] = {"max_length": 99, "too_long": "drop", "stop_ids": {2}, "bos_id": BOS}
    return fit(row, **(usual | limits))


def shown(found: Fitted) -> list[tuple[list[int], str]]:
    """Ids and loss of every row."""
    return [(row.ids.tolist(), "".join("x" if flag else "." for flag in row.loss)) for row in found.rows]


SHORTENED = [
    ("..xxx..xxx", 9, [10, 11, 12, 13, 2, 15, 16, 17, 2], "..xxx..xx"),  # through an answer: its last token gives way
    ("..xxx..xxx", 8, [10, 11, 12, 13, 2], "..xxx"),  # all that fits of an answer is its end: the answer goes
    ("..xxx..xxx", 7, [10, 11, 12, 13, 2], "..xxx"),  # through a prompt: the prompt goes
    ("..xxx..xxx", 5, [10, 11, 12, 13, 2], "..xxx"),  # at the end of an answer
    ("..xxx..xxx", 4, [10, 11, 12, 2], "..xx"),
    ("..xxx..xxx", 3, [], ""),
    ("..xxx..xxx", 2, [], ""),
    ("..xxx..xxx", 0, [], ""),
    (".......xxx", 5, [], ""),
    ("xxxxx", 3, [10, 11, 2], "xxx"),
    ("xxxxx", 1, [], ""),
]


@pytest.mark.parametrize(("loss", "length", "ids", "left"), SHORTENED)
def test_a_shortened_row_ends_in_a_supervised_end_of_turn_or_is_empty(
    loss: str, length: int, ids: list[int], left: str
) -> None:
    short = shorten(row_of(loss), length, {2})
    assert short.ids.tolist() == ids
    assert "".join("x" if flag else "." for flag in short.loss) == left
    assert short.where == "here"


def test_a_row_within_the_limits_stays_as_it_is() -> None:
    row = row_of("..xxx")
    found = fitted(row, max_length=5, source_max_length=2, target_max_length=3)
    assert found == Fitted((row,), cut=False)


def test_a_row_without_a_target_is_none_though_nothing_is_cut() -> None:
    assert fitted(row_of(".....")) == Fitted((), cut=False)
    assert fitted(row_of("x")) == Fitted((), cut=False)  # the first token is never predicted


def test_longer_rows_are_dropped_or_an_error() -> None:
    assert fitted(row_of("..xxx"), max_length=4) == Fitted((), cut=True)
    with pytest.raises(RowError, match=r"5 tokens, more than data.max_length \(4\)"):
        fitted(row_of("..xxx"), max_length=4, too_long="error")


def test_the_end_is_cut_with_the_end_of_turn_kept() -> None:
    found = fitted(row_of("..xxx..xxx"), max_length=4, too_long="truncate")
    assert (shown(found), found.cut) == ([([10, 11, 12, 2], "..xx")], True)


BEHEADED = [
    ("..xxx..xxx", False, 7, [(13, 2, 15, 16, 17, 18, 2)], "....xxx"),  # what is left of an answer has no loss
    ("..xxx..xxx", False, 8, [(12, 13, 2, 15, 16, 17, 18, 2)], "xxx..xxx"),
    ("..xxx..xxx", False, 3, [(17, 18, 2)], "xxx"),
    ("..xxx..xxx", False, 2, [], ""),  # the last answer would not be whole
    ("..xxx..xxx", True, 7, [(1, 2, 15, 16, 17, 18, 2)], "....xxx"),
    ("..xxx..xxx", True, 4, [(1, 17, 18, 2)], ".xxx"),
    ("..xxx..xxx", True, 3, [], ""),
    ("xxxxxx", False, 3, [(13, 14, 2)], "xxx"),  # a text may lose its beginning
    (".xxxxx", True, 3, [(1, 14, 2)], ".xx"),
]


@pytest.mark.parametrize(("loss", "bos", "length", "ids", "left"), BEHEADED)
def test_the_start_is_cut_with_the_last_answer_whole(
    loss: str, bos: bool, length: int, ids: list[tuple[int, ...]], left: str
) -> None:
    row = row_of(loss, bos)
    found = fitted(row, max_length=length, too_long="truncate", truncate="start")
    assert shown(found) == [(list(each), left) for each in ids]
    assert found.cut


def test_a_text_is_split_into_pieces_of_which_every_token_is_predicted_once() -> None:
    found = fitted(row_of("xxxxxxxx"), max_length=4, too_long="split")
    assert shown(found) == [
        ([10, 11, 12, 13], "xxxx"),
        ([13, 14, 15, 16], ".xxx"),
        ([16, 2], ".x"),
    ]
    assert not found.cut
    assert sum(row.targets for row in found.rows) == row_of("xxxxxxxx").targets


def test_a_text_that_fits_is_one_piece_and_one_token_is_no_piece() -> None:
    assert shown(fitted(row_of(".xxx"), max_length=4, too_long="split")) == [([10, 11, 12, 2], ".xxx")]
    assert fitted(row_of(".xxx"), max_length=1, too_long="split") == Fitted((), cut=True)


def test_what_is_no_text_is_not_split() -> None:
    with pytest.raises(RowError, match=r"5 tokens, more than .* not all of them carry loss") as caught:
        fitted(row_of("..xxx"), max_length=4, too_long="split")
    assert "drop or truncate" in caught.value.fix


SOURCES = [
    ("....xxx", False, 2, [12, 13, 14, 15, 2], "..xxx"),
    ("....xxx", True, 2, [1, 13, 14, 15, 2], "..xxx"),
    ("....xxx", True, 1, [13, 14, 15, 2], ".xxx"),  # no room for BOS beside another token
    ("....xxx...xx", False, 3, [11, 12, 13, 14, 15, 2, 17, 18, 19, 20, 2], "...xxx...xx"),  # of the first answer
    ("xxxx", False, 1, [10, 11, 12, 2], "xxxx"),
]


@pytest.mark.parametrize(("loss", "bos", "limit", "ids", "left"), SOURCES)
def test_a_limit_of_the_source_cuts_its_start(loss: str, bos: bool, limit: int, ids: list[int], left: str) -> None:
    found = fitted(row_of(loss, bos), source_max_length=limit)
    assert shown(found) == [(ids, left)]
    assert found.cut == (len(ids) < len(loss))


TARGETS = [
    ("..xxxx", 3, [10, 11, 12, 13, 2], "..xxx"),
    ("..xxxx.xx.xxxx", 2, [10, 11, 12, 2, 16, 17, 2, 19, 20, 2], "..xx.xx.xx"),
    ("..xxxx.xx", 1, None, None),
    (".xxxxx", 4, [10, 11, 12, 13, 2], ".xxxx"),  # a text is one answer
]


@pytest.mark.parametrize(("loss", "limit", "ids", "left"), TARGETS)
def test_a_limit_of_the_target_cuts_the_end_of_each_answer(
    loss: str, limit: int, ids: list[int] | None, left: str | None
) -> None:
    found = fitted(row_of(loss), target_max_length=limit)
    assert shown(found) == ([(ids, left)] if ids is not None else [])
    assert found.cut


def test_limits_of_source_and_target_come_before_that_of_the_row() -> None:
    found = fitted(row_of("....xxxx"), max_length=5, source_max_length=2, target_max_length=3, too_long="error")
    assert shown(found) == [([12, 13, 14, 15, 2], "..xxx")]


def test_the_row_itself_is_left_alone() -> None:
    row = row_of("..xxx..xxx")
    ids, loss = row.ids.copy(), row.loss.copy()
    for changes in (
        {"truncate": "end"},
        {"truncate": "start"},
        {"source_max_length": 1, "target_max_length": 2},
    ):
        fitted(row, **({"max_length": 6, "too_long": "truncate"} | changes))
    assert (row.ids == ids).all()
    assert (row.loss == loss).all()


LIMIT = st.one_of(st.none(), st.integers(1, 8))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    loss=st.lists(st.booleans(), min_size=1, max_size=20),
    bos=st.booleans(),
    length=st.integers(1, 20),
    side=st.sampled_from(["end", "start"]),
    source=LIMIT,
    target=LIMIT,
)
def test_every_answer_that_remains_ends_in_a_supervised_end_of_turn(
    loss: list[bool], bos: bool, length: int, side: str, source: int | None, target: int | None
) -> None:
    row = row_of("".join("x" if flag else "." for flag in loss), bos)
    found = fitted(
        row,
        max_length=length,
        too_long="truncate",
        truncate=side,
        source_max_length=source,
        target_max_length=target,
    )
    for left in found.rows:
        assert len(left) <= length
        assert left.targets
        ends = np.flatnonzero(left.loss & ~np.append(left.loss[1:], False))
        assert (left.ids[ends] == 2).all() or (bos and loss[0] and ends[0] == 0)
    assert found.cut == (sum(map(len, found.rows)) < len(row)) or not found.rows
