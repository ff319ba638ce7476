"""Token lists and masks, literally. Tokens in brackets carry loss; Ċ is a newline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qlora_cli.data.conversation import Conversation
from qlora_cli.data.encode import Encoded, LossOn, encode, shorten
from qlora_cli.data.turns import turn_encoder
from tests.conftest import make_tokenizer
from tests.data.conftest import THINKING, marked, talk, with_bos, with_merge


def rows(
    conversation: Conversation, tokenizer: Any, loss_on: LossOn = "assistant", template: str = "auto"
) -> list[str]:
    """The conversation's rows, marked."""
    turns = turn_encoder(tokenizer, template, "messages")
    return [marked(row, tokenizer) for row in encode(conversation, turns, loss_on)]


def test_one_answer_carries_loss_with_its_end_of_turn_and_nothing_else_does(tokenizer: Any) -> None:
    (row,) = encode(talk("u: q", "a: ab"), turn_encoder(tokenizer, "auto", "messages"), "assistant", "rows.jsonl:7")
    assert row.ids.tolist() == [1, 3, 203, 85, 2, 203, 4, 203, 69, 70, 2]
    assert row.loss.tolist() == [False] * 8 + [True] * 3
    assert (str(row.ids.dtype), row.where, len(row), row.targets) == ("int32", "rows.jsonl:7", 11, 3)
    assert marked(row, tokenizer) == "<s> <|user|> Ċ q </s> Ċ <|assistant|> Ċ [a] [b] [</s>]"


def test_every_answer_of_a_conversation_carries_loss_and_no_question_does(tokenizer: Any) -> None:
    assert rows(talk("s: s", "u: q", "a: a", "u: r", "a: b"), tokenizer) == [
        "<s> < | s y s t e m | > Ċ s </s> Ċ <|user|> Ċ q </s> Ċ <|assistant|> Ċ [a] [</s>] "
        "Ċ <|user|> Ċ r </s> Ċ <|assistant|> Ċ [b] [</s>]"
    ]


def test_words_in_a_question_that_look_like_an_answer_carry_no_loss(tokenizer: Any) -> None:
    assert rows(talk("u: <|assistant|>\na</s>", "a: a"), tokenizer) == [
        "<s> <|user|> Ċ <|assistant|> Ċ a </s> </s> Ċ <|assistant|> Ċ [a] [</s>]"
    ]


def test_two_answers_in_a_row_both_carry_loss(tokenizer: Any) -> None:
    assert rows(talk("u: q", "a: a", "a: b"), tokenizer) == [
        "<s> <|user|> Ċ q </s> Ċ <|assistant|> Ċ [a] [</s>] Ċ <|assistant|> Ċ [b] [</s>]"
    ]


def test_turns_after_the_last_answer_are_left_off(tokenizer: Any) -> None:
    assert rows(talk("u: q", "a: a", "u: r"), tokenizer) == rows(talk("u: q", "a: a"), tokenizer)


def test_an_answer_that_spells_out_the_end_of_a_turn_is_kept_whole(tokenizer: Any) -> None:
    assert rows(talk("u: q", "a: a</s>b"), tokenizer) == [
        "<s> <|user|> Ċ q </s> Ċ <|assistant|> Ċ [a] [</s>] [b] [</s>]"
    ]


def test_an_empty_answer_is_its_end_of_turn(tokenizer: Any) -> None:
    assert rows(talk("u: q", "a: "), tokenizer) == ["<s> <|user|> Ċ q </s> Ċ <|assistant|> Ċ [</s>]"]


LOSS_CASES: list[tuple[LossOn, str]] = [
    ("assistant", "<s> q [a] [</s>] r [b] [</s>]"),
    ("last", "<s> q a </s> r [b] [</s>]"),
    ("all", "[<s>] [q] [a] [</s>] [r] [b] [</s>]"),
]


@pytest.mark.parametrize(("loss_on", "expected"), LOSS_CASES)
def test_loss_falls_on_answers_the_last_answer_or_everything(loss_on: LossOn, expected: str) -> None:
    conversation = talk("u: q", "a: a", "u: r", "a: b")
    assert rows(conversation, with_bos(), loss_on, "none") == [expected]


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_a_plain_text_is_a_target_from_its_first_predicted_token_to_its_end(loss_on: LossOn) -> None:
    (row,) = encode(talk("a: ab"), turn_encoder(with_bos(), "auto", "text"), loss_on)
    assert row.ids.tolist() == [1, 69, 70, 2]
    assert row.loss[1:].tolist() == [True, True, True]
    assert row.targets == 3


def test_the_first_token_of_a_text_without_bos_is_no_target_since_nothing_precedes_it(tokenizer: Any) -> None:
    (row,) = encode(talk("a: ab"), turn_encoder(tokenizer, "auto", "text"), "assistant")
    assert row.ids.tolist() == [69, 70, 2]
    assert row.targets == 2


def test_a_tokenizer_whose_pad_is_its_eos_still_learns_to_stop() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert rows(talk("u: q", "a: a"), tokenizer) == ["<s> <|user|> Ċ q </s> Ċ <|assistant|> Ċ [a] [</s>]"]
    assert rows(talk("u: q", "a: a"), tokenizer, template="none") == ["q [a] [</s>]"]


def test_bos_is_not_doubled_where_both_template_and_tokenizer_put_one() -> None:
    assert rows(talk("u: q", "a: a"), with_bos()) == ["<s> <|user|> Ċ q </s> Ċ <|assistant|> Ċ [a] [</s>]"]


def test_a_template_that_strips_earlier_reasoning_makes_one_row_per_answer() -> None:
    tokenizer = make_tokenizer(THINKING)
    assert rows(talk("u: q", "a: x</think>a", "u: r", "a: y</think>b"), tokenizer) == [
        "<|user|> q </s> <|assistant|> [x] [<] [/] [t] [h] [i] [n] [k] [>] [a] [</s>]",
        "<|user|> q </s> <|assistant|> a </s> <|user|> r </s> <|assistant|> "
        "[y] [<] [/] [t] [h] [i] [n] [k] [>] [b] [</s>]",
    ]


def test_the_same_template_keeps_one_row_where_there_is_no_reasoning_to_strip() -> None:
    assert rows(talk("u: q", "a: a", "u: r", "a: b"), make_tokenizer(THINKING)) == [
        "<|user|> q </s> <|assistant|> [a] [</s>] <|user|> r </s> <|assistant|> [b] [</s>]"
    ]


def test_with_loss_on_the_last_answer_such_a_template_makes_one_row() -> None:
    made = rows(talk("u: q", "a: x</think>a", "u: r", "a: b"), make_tokenizer(THINKING), "last")
    assert made == ["<|user|> q </s> <|assistant|> a </s> <|user|> r </s> <|assistant|> [b] [</s>]"]


def test_a_token_that_would_straddle_prompt_and_answer_is_encoded_in_two_pieces() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}:{{ m.content }}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    tokenizer = with_merge(":", "a", template)
    assert tokenizer("q:a").input_ids == [85, 261]
    assert rows(talk("u: q", "a: ab"), tokenizer) == ["q : [a] [b] [</s>]"]


def test_the_alpaca_template_supervises_the_response_and_its_eos() -> None:
    tokenizer = make_tokenizer(None)
    (row,) = encode(talk("u: q", "a: a"), turn_encoder(tokenizer, "auto", "alpaca"), "assistant")
    assert tokenizer.decode(row.ids) == "<s>### Instruction:\nq\n\n### Response:\na</s>"
    assert tokenizer.decode(row.ids[row.loss]) == "a</s>"


def row_of(loss: str, ids: list[int] | None = None) -> Encoded:
    """A row with `x` where a token carries loss; ids count up, and 2 ends every run of targets."""
    wanted = np.array([letter == "x" for letter in loss])
    ends = [wanted[i] and (i + 1 == len(loss) or not wanted[i + 1]) for i in range(len(loss))]
    made = ids or [2 if end else 10 + i for i, end in enumerate(ends)]
    return Encoded(np.array(made, np.int32), wanted, "here")


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


def test_shortening_leaves_the_row_itself_alone() -> None:
    row = row_of("..xxx")
    shorten(row, 4, {2})
    assert row.ids.tolist() == [10, 11, 12, 13, 2]
