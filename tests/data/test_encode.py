"""Token lists and masks, literally. Tokens in brackets carry loss; Ċ is a newline."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from qlora_cli.data.conversation import Conversation, Message
from qlora_cli.data.encode import LossOn, encode, encode_many
from qlora_cli.data.formats import RowError
from qlora_cli.data.templates import TEMPLATES
from qlora_cli.data.turns import TurnEncoder, turn_encoder
from tests.conftest import TEMPLATE, make_tokenizer
from tests.data.conftest import ALTERNATING, THINKING, marked, metaspace, talk, with_bos, with_merge, with_tokens


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


@pytest.mark.parametrize("answer", ["a</s>b", "a</s>", "</s>"])
def test_an_answer_that_spells_out_the_end_of_a_turn_is_refused(tokenizer: Any, answer: str) -> None:
    with pytest.raises(RowError, match="an answer holds the end-of-turn token, </s>"):
        rows(talk("u: q", f"a: {answer}"), tokenizer)


def test_a_text_that_ends_in_eos_gets_no_second_one(tokenizer: Any) -> None:
    turns = turn_encoder(tokenizer, "none", "text")
    once, twice = (encode(talk(text), turns, "all")[0].ids.tolist() for text in ("a: ab", "a: ab</s>"))
    assert once == twice


def test_an_empty_answer_is_its_end_of_turn(tokenizer: Any) -> None:
    assert rows(talk("u: q", "a: "), tokenizer) == ["<s> <|user|> Ċ q </s> Ċ <|assistant|> Ċ [</s>]"]


LOSS_CASES: list[tuple[LossOn, str]] = [
    ("assistant", "<s> q [a] [</s>] r [b] [</s>]"),
    ("completion", "<s> q [a] [</s>] [r] [b] [</s>]"),
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


def silent(conversation: Conversation, *positions: int) -> Conversation:
    """The conversation, with `train` False at some positions."""
    turns = enumerate(conversation.messages)
    return Conversation(tuple(Message(m.role, m.content, i not in positions) for i, m in turns))


SILENT: list[tuple[LossOn, tuple[int, ...], str]] = [
    ("assistant", (1,), "<s> q a </s> r [b] [</s>]"),
    ("assistant", (0, 2), "<s> q [a] [</s>] r [b] [</s>]"),
    ("last", (3,), "<s> q a </s> r b </s>"),
    ("completion", (1,), "<s> q a </s> [r] [b] [</s>]"),
    ("completion", (2,), "<s> q [a] [</s>] r [b] [</s>]"),
    ("all", (0,), "<s> q [a] [</s>] [r] [b] [</s>]"),
    ("all", (2, 3), "[<s>] [q] [a] [</s>] r b </s>"),
]


@pytest.mark.parametrize(("loss_on", "positions", "expected"), SILENT)
def test_a_message_that_is_not_trained_on_never_carries_loss(
    loss_on: LossOn, positions: tuple[int, ...], expected: str
) -> None:
    conversation = silent(talk("u: q", "a: a", "u: r", "a: b"), *positions)
    assert rows(conversation, with_bos(), loss_on, "none") == [expected]


def test_completion_begins_with_the_answer_that_a_rewritten_row_is_made_for() -> None:
    made = rows(talk("u: q", "a: x</think>a", "u: r", "a: b"), make_tokenizer(THINKING), "completion")
    assert made[1] == "<|user|> q </s> <|assistant|> a </s> <|user|> r </s> <|assistant|> [b] [</s>]"


STRADDLING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}:{{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
MARKLESS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
EMPTY_BLOCK = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think></think>{% endif %}"
)
ENCODERS: dict[str, TurnEncoder] = {
    "chat": turn_encoder(make_tokenizer(TEMPLATE), "auto", "messages"),
    "bos": turn_encoder(with_bos(), "auto", "messages"),
    "plain": turn_encoder(make_tokenizer(TEMPLATE), "none", "messages"),
    "plain bos": turn_encoder(with_bos(), "none", "messages"),
    "thinking": turn_encoder(make_tokenizer(THINKING), "auto", "messages"),
    "alternating": turn_encoder(make_tokenizer(ALTERNATING), "auto", "messages"),
    "merging": turn_encoder(with_merge(":", "a", STRADDLING), "auto", "messages"),
    "newlines merge": turn_encoder(with_merge("\u010a", "a", TEMPLATE), "auto", "messages"),
    "without marks": turn_encoder(make_tokenizer(MARKLESS), "auto", "messages"),
    "empty think block": turn_encoder(make_tokenizer(EMPTY_BLOCK), "auto", "messages"),
    "overlapping": turn_encoder(with_tokens("</s>b", "a<|user|>"), "auto", "messages"),
    "overlapped": turn_encoder(with_tokens("a<|user|>", "<|user|>b", "b<|"), "auto", "messages"),
    "stripping": turn_encoder(with_tokens(AddedToken("<|im_end|>", lstrip=True, rstrip=True)), "auto", "messages"),
    "metaspace first": turn_encoder(metaspace("first", TEMPLATE), "auto", "messages"),
    "metaspace always": turn_encoder(metaspace("always", TEMPLATE), "auto", "messages"),
    "metaspace alpaca": turn_encoder(metaspace("first", TEMPLATES["alpaca"]), "auto", "messages"),
    "metaspace plain": turn_encoder(metaspace("always", None), "none", "messages"),
} | {name: turn_encoder(make_tokenizer(None), name, "messages") for name in TEMPLATES}

WORDS = st.lists(
    st.sampled_from(
        ["a", "b", "c", " ", "\n", ":", "</s>", "<|user|>", "<|im_end|>", "<think>", "</think>", "é", "<|", "<s>"]
    ),
    max_size=6,
).map("".join)
MESSAGES = st.builds(
    Message, st.sampled_from(["user", "assistant", "user", "assistant", "system"]), WORDS, st.booleans()
)
TALKS = st.lists(st.lists(MESSAGES, min_size=1, max_size=6).map(lambda m: Conversation(tuple(m))), max_size=4)


@pytest.mark.parametrize("name", list(ENCODERS))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(talks=TALKS, loss_on=st.sampled_from(["assistant", "completion", "last", "all"]))
def test_many_at_once_are_encoded_as_one_by_one(name: str, talks: list[Conversation], loss_on: LossOn) -> None:
    turns = ENCODERS[name]
    for conversation, made in zip(talks, encode_many(talks, turns, loss_on), strict=True):
        if isinstance(made, RowError):
            with pytest.raises(RowError) as caught:
                encode(conversation, turns, loss_on)
            assert str(made) == str(caught.value)
            continue
        expected = encode(conversation, turns, loss_on)
        assert [(row.ids.tolist(), row.loss.tolist()) for row in expected] == [
            (ids.tolist(), loss.tolist()) for ids, loss in made
        ]
        assert all((str(ids.dtype), str(loss.dtype)) == ("int32", "bool") for ids, loss in made)


def test_a_tokenizer_with_a_truncation_left_set_encodes_whole_rows() -> None:
    tokenizer = make_tokenizer()
    turns = turn_encoder(tokenizer, "auto", "messages")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    ((made,),) = [rows for rows in encode_many([talk("u: q", "a: ab")], turns, "assistant") if isinstance(rows, list)]
    assert made[0].tolist() == [1, 3, 203, 85, 2, 203, 4, 203, 69, 70, 2]
