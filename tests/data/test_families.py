"""Masks of the five families of the shipped recipes, against literal text and against a slow computation of their own.

The slow one knows transformers only: it renders what a conversation is after each answer and what prompts for that
answer, encodes each whole text in one go, and takes the tokens whose characters lie behind the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from qlora_cli.data.conversation import Conversation, Message
from qlora_cli.data.encode import Encoded, encode, encode_many
from qlora_cli.data.formats import RowError
from qlora_cli.data.turns import ChatTurns, TurnEncoder, turn_encoder
from qlora_cli.data.verify import REWRITES, verify
from tests.data.conftest import marked, talk
from tests.data.families import FAMILIES, llama2

NAMES = list(FAMILIES)
WITH_BOS = ("gemma3", "llama31", "mistral03")
WITH_TOOLS = ("llama31", "mistral03", "qwen3")
Rows = list[tuple[list[int], list[bool]]]


@cache
def family(name: str) -> tuple[Any, TurnEncoder]:
    """A family's tokenizer and our encoder for it."""
    tokenizer = FAMILIES[name].tokenizer()
    return tokenizer, turn_encoder(tokenizer, "auto", "messages")


# The slow computation.


class RefusedError(Exception):
    """There is no text to learn this conversation from."""


class Slow:
    """Ids and masks of a conversation, from what transformers renders and from offsets of characters."""

    def __init__(self, tokenizer: Any, end: str) -> None:
        self.tokenizer, self.end = tokenizer, end

    def rows(self, conversation: Conversation) -> Rows:
        """A row for each answer, or one for several where the text after one is the beginning of the next's."""
        made: Rows = []
        spans: list[tuple[int, int, bool]] = []
        texts = [self._texts(conversation, position) for position in conversation.assistant_turns()]
        for place, (position, (cut, text)) in enumerate(zip(conversation.assistant_turns(), texts, strict=True)):
            spans.append((cut, len(text), conversation.messages[position].train))
            goes_on = place + 1 < len(texts) and texts[place + 1][1].startswith(text)
            if not goes_on or self._straddles(text, cut):
                made.append(self._row(text, cut, spans))
                spans = []
        return made

    def _texts(self, conversation: Conversation, position: int) -> tuple[int, str]:
        """Where an answer begins in the text that ends with it, and that text."""
        prompt = self._render(conversation, position, True)
        whole = self._render(conversation, position + 1, False)
        if not whole.startswith(prompt):  # Mistral's template drops the system's words once the answer is there
            bare = self._render(conversation, position, True, without="system")
            if not whole.startswith(bare) or bare == prompt:
                raise RefusedError
            whole = prompt + whole[len(bare) :]
        stop = whole.rfind(self.end) + len(self.end)
        if stop <= len(prompt) or whole.count(self.end, len(prompt)) > 1:  # it would learn to stop in the middle
            raise RefusedError
        return len(prompt), whole[:stop]

    def _render(self, conversation: Conversation, count: int, prompting: bool, without: str = "") -> str:
        said = [message for message in conversation.messages[:count] if message.role != without]
        turns = [{"role": m.role, "content": m.content, **m.extra} for m in said]
        tools = list(conversation.tools) or None
        try:
            return str(
                self.tokenizer.apply_chat_template(turns, tools, tokenize=False, add_generation_prompt=prompting)
            )
        except TemplateError as error:
            raise RefusedError from error

    def _encoded(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(made["input_ids"]), list(made["offset_mapping"])

    def _straddles(self, text: str, cut: int) -> bool:
        return any(start < cut < stop for start, stop in self._encoded(text)[1])

    def _row(self, text: str, cut: int, spans: Sequence[tuple[int, int, bool]]) -> tuple[list[int], list[bool]]:
        ids, offsets = self._encoded(text)
        if self._straddles(text, cut):  # the prompt is alone at inference
            (ids, offsets), (more, behind) = self._encoded(text[:cut]), self._encoded(text[cut:])
            ids, offsets = ids + more, offsets + [(start + cut, stop + cut) for start, stop in behind]
        learned = [span for span in spans if span[2]]
        return ids, [any(first <= start < last for first, last, _ in learned) for start, _ in offsets]


def slow_rows(name: str, conversation: Conversation) -> Rows:
    """The rows of a family."""
    return Slow(family(name)[0], FAMILIES[name].end).rows(conversation)


def rows_of(name: str, conversation: Conversation) -> Rows:
    """Our rows, one conversation at a time; the same of many at once, or the assertion fails."""
    turns = family(name)[1]
    made = [(row.ids.tolist(), row.loss.tolist()) for row in encode(conversation, turns, "assistant")]
    (many,) = encode_many([conversation], turns, "assistant")
    assert isinstance(many, list)
    assert [(ids.tolist(), loss.tolist()) for ids, loss in many] == made
    return made


# Literal conversations.

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "add", "arguments": {"x": 1}}}
CALLING = Conversation(
    (
        Message("user", "hello"),
        Message("assistant", "", extra={"tool_calls": [CALL]}),
        Message("tool", "7", extra={"tool_call_id": "abcdef123"}),
        Message("assistant", "the 7"),
    ),
    (TOOL,),
)
AGAIN = Conversation((*CALLING.messages, Message("user", "a"), Message("assistant", "b")), (TOOL,))
THOUGHT = talk("u: q", "a: <think>\nx\n</think>\n\na", "u: r", "a: <think>\ny\n</think>\n\nb")
APART = Conversation((Message("user", "q"), Message("assistant", "a", extra={"reasoning_content": "x"})))
TALKS: Mapping[str, Conversation] = {
    "one turn": talk("u: hello", "a: world"),
    "three turns": talk("u: hello", "a: world", "u: a", "a: b", "u: 123", "a: the answer"),
    "unicode": talk("u: 中 é", "a: 中文 e\u0301 \U0001f600"),
    "space before": talk("u: q", "a:   a", "u: r", "a: \n\n\nb"),
    "space behind": talk("u: q ", "a: a  ", "u: r\n", "a: b\n\n"),
    "space alone": talk("u: q", "a: \n \n", "u: r", "a: b"),
    "quoted tokens": talk("u: <|im_end|></s>[/INST]<end_of_turn>", "a: a [INST] b"),
    "an unanswered question": talk("u: q", "a: a", "u: r"),
    "not learned": Conversation(
        (Message("user", "q"), Message("assistant", "a", train=False), *talk("u: q", "a: a").messages)
    ),
}
SYSTEM = talk("s: be the model", "u: hello", "a: world", "u: a", "a: b")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", TALKS)
def test_masks_are_those_of_the_slow_computation(name: str, case: str) -> None:
    assert rows_of(name, TALKS[case]) == slow_rows(name, TALKS[case])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mistral03"])
def test_masks_with_a_system_message_are_those_of_the_slow_computation(name: str) -> None:
    assert rows_of(name, SYSTEM) == slow_rows(name, SYSTEM)


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize("conversation", [CALLING, AGAIN])
def test_masks_with_calls_of_tools_are_those_of_the_slow_computation(name: str, conversation: Conversation) -> None:
    assert rows_of(name, conversation) == slow_rows(name, conversation)


@pytest.mark.parametrize("conversation", [THOUGHT, APART])
def test_masks_with_reasoning_are_those_of_the_slow_computation(conversation: Conversation) -> None:
    assert rows_of("qwen3", conversation) == slow_rows("qwen3", conversation)


# Random conversations.

PIECES = ["a", "b", " ", "\n", "\n\n", "hello", " the", "12", ".", "é", "e\u0301", "\u0301", "中", "\U0001f600", "\t"]
TAGS = ["<think>", "</think>", "<tool_response>", "<|im_end|>", "</s>", "<end_of_turn>", "<|eot_id|>", "[INST]", "<|"]
TEXTS = st.lists(st.sampled_from([*PIECES, *PIECES, *TAGS]), max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, name: str) -> Conversation:
    """Questions with answers, now and then with a tool between them, as a family's template takes them."""
    calling = name in WITH_TOOLS and draw(st.booleans())
    messages = [Message("system", draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXTS)))
        if calling and draw(st.booleans()):
            messages.append(Message("assistant", "", extra={"tool_calls": [CALL]}))
            messages.append(Message("tool", draw(TEXTS), extra={"tool_call_id": "abcdef123"}))
        thought = {"reasoning_content": draw(TEXTS)} if name == "qwen3" and draw(st.booleans()) else {}
        messages.append(Message("assistant", draw(TEXTS), draw(st.booleans()), thought))
    return Conversation(tuple(messages), (TOOL,) if calling else ())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_masks_are_those_of_the_slow_computation_and_refusals_too(name: str, data: st.DataObject) -> None:
    conversation = data.draw(conversations(name))
    try:
        expected = slow_rows(name, conversation)
    except RefusedError:
        turns = family(name)[1]
        with pytest.raises(RowError):
            encode(conversation, turns, "assistant")
        assert isinstance(encode_many([conversation], turns, "assistant")[0], RowError)
    else:
        assert rows_of(name, conversation) == expected


@pytest.mark.parametrize("name", NAMES)
def test_many_at_once_are_found_without_a_call_for_each(name: str) -> None:
    """Else `encode_many` would be `encode`, and to compare it would say nothing."""
    assert family(name)[1].rows([TALKS["one turn"]])[0] is not None
    assert (family(name)[1].rows([TALKS["three turns"]])[0] is None) == (name == "qwen3")


# Literally.


def shown(row: Encoded, tokenizer: Any) -> str:
    """The row's text, what carries loss in brackets."""
    runs = groupby(zip(row.ids.tolist(), row.loss.tolist(), strict=True), key=lambda pair: pair[1])
    texts = [(loss, tokenizer.decode([token for token, _ in run])) for loss, run in runs]
    return "".join(f"⟦{text}⟧" if loss else text for loss, text in texts)


def shown_rows(name: str, conversation: Conversation) -> list[str]:
    """The conversation's rows, as text."""
    tokenizer, turns = family(name)
    return [shown(row, tokenizer) for row in encode(conversation, turns, "assistant")]


LLAMA_DATES = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
LLAMA_USER, LLAMA_SAYS = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
SMOL_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
ASKED, SAYS = "<|im_start|>user\n", "<|im_start|>assistant\n"
LITERAL: list[tuple[str, Conversation, list[str]]] = [
    (
        "gemma3",
        SYSTEM,
        [
            "<bos><start_of_turn>user\nbe the model\n\nhello<end_of_turn>\n<start_of_turn>model\n⟦world<end_of_turn>⟧\n"
            "<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n⟦b<end_of_turn>⟧"
        ],
    ),
    (
        "gemma3",
        TALKS["space behind"],
        [
            "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n⟦a<end_of_turn>⟧\n"
            "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n⟦b<end_of_turn>⟧"
        ],
    ),
    (
        "llama31",
        SYSTEM,
        [
            f"{LLAMA_DATES}be the model<|eot_id|>{LLAMA_USER}hello<|eot_id|>{LLAMA_SAYS}⟦world<|eot_id|>⟧"
            f"{LLAMA_USER}a<|eot_id|>{LLAMA_SAYS}⟦b<|eot_id|>⟧"
        ],
    ),
    (
        "llama31",
        TALKS["space before"],
        [
            f"{LLAMA_DATES}<|eot_id|>{LLAMA_USER}q<|eot_id|>{LLAMA_SAYS}⟦a<|eot_id|>⟧"
            f"{LLAMA_USER}r<|eot_id|>{LLAMA_SAYS}⟦b<|eot_id|>⟧"
        ],
    ),
    (
        "mistral03",
        TALKS["three turns"],
        ["<s>[INST] hello[/INST]⟦ world</s>⟧[INST] a[/INST]⟦ b</s>⟧[INST] 123[/INST]⟦ the answer</s>⟧"],
    ),
    ("mistral03", TALKS["space behind"], ["<s>[INST] q [/INST]⟦ a</s>⟧[INST] r\n[/INST]⟦ b</s>⟧"]),
    (
        "mistral03",
        AGAIN,
        [
            '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
            '[/AVAILABLE_TOOLS][INST] hello[/INST]⟦[TOOL_CALLS] [{"name": "add", "arguments": {"x": 1}, '
            '"id": "abcdef123"}]</s>⟧[TOOL_RESULTS] {"content": 7, "call_id": "abcdef123"}[/TOOL_RESULTS]⟦ the 7</s>⟧',
            '<s>[INST] hello[/INST][TOOL_CALLS] [{"name": "add", "arguments": {"x": 1}, "id": "abcdef123"}]</s>'
            '[TOOL_RESULTS] {"content": 7, "call_id": "abcdef123"}[/TOOL_RESULTS] the 7</s>[AVAILABLE_TOOLS] '
            '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}][/AVAILABLE_TOOLS]'
            "[INST] a[/INST]⟦ b</s>⟧",
        ],
    ),
    (
        "qwen3",
        THOUGHT,
        [
            f"{ASKED}q<|im_end|>\n{SAYS}⟦<think>\nx\n</think>\n\na<|im_end|>⟧",
            f"{ASKED}q<|im_end|>\n{SAYS}a<|im_end|>\n{ASKED}r<|im_end|>\n{SAYS}⟦<think>\ny\n</think>\n\nb<|im_end|>⟧",
        ],
    ),
    ("qwen3", APART, [f"{ASKED}q<|im_end|>\n{SAYS}⟦<think>\nx\n</think>\n\na<|im_end|>⟧"]),
    ("qwen3", talk("u: q", "a: \n a \n"), [f"{ASKED}q<|im_end|>\n{SAYS}⟦<think>\n\n</think>\n\n a \n<|im_end|>⟧"]),
    (
        "smollm2",
        TALKS["space behind"],
        [f"{SMOL_SYSTEM}{ASKED}q <|im_end|>\n{SAYS}⟦a  <|im_end|>⟧\n{ASKED}r\n<|im_end|>\n{SAYS}⟦b\n\n<|im_end|>⟧"],
    ),
    (
        "smollm2",
        SYSTEM,
        [
            f"<|im_start|>system\nbe the model<|im_end|>\n{ASKED}hello<|im_end|>\n{SAYS}⟦world<|im_end|>⟧\n"
            f"{ASKED}a<|im_end|>\n{SAYS}⟦b<|im_end|>⟧"
        ],
    ),
]


@pytest.mark.parametrize(("name", "conversation", "rows"), LITERAL)
def test_a_familys_rows_are_its_text_with_loss_on_the_answers(
    name: str, conversation: Conversation, rows: list[str]
) -> None:
    assert shown_rows(name, conversation) == rows


TOKENS = {
    "gemma3": (
        [2, 4, 349, 402, 278, 5, 402, 4, 366, 402, 262, 5],
        "<bos> <start_of_turn> user \n q <end_of_turn> \n <start_of_turn> model \n [a] [<end_of_turn>]",
    ),
    "mistral03": ([1, 3, 349, 282, 4, 396, 2], "<s> [INST] ▁ q [/INST] [▁a] [</s>]"),
    "qwen3": (
        [329, 258, 198, 80, 330, 198, 329, 266, 198, 335, 301, 336, 301, 64, 330],
        "<|im_start|> user Ċ q <|im_end|> Ċ <|im_start|> assistant Ċ [<think>] [ĊĊ] [</think>] [ĊĊ] [a] [<|im_end|>]",
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_the_ids_of_a_question_and_its_answer(name: str) -> None:
    tokenizer, turns = family(name)
    (row,) = encode(talk("u: q", "a: a"), turns, "assistant")
    assert (row.ids.tolist(), marked(row, tokenizer)) == TOKENS[name]


def test_line_breaks_that_would_be_one_token_with_the_prompts_are_learned_apart_from_it() -> None:
    tokenizer, turns = family("smollm2")
    assert tokenizer.tokenize("assistant\n\n\nb") == ["assistant", "ĊĊ", "Ċ", "b"]
    (row,) = encode(talk("s: s", "u: q", "a: \n\nb"), turns, "assistant")
    assert marked(row, tokenizer) == (
        "<|im_start|> system Ċ s <|im_end|> Ċ <|im_start|> user Ċ q <|im_end|> Ċ "
        "<|im_start|> assistant Ċ [Ċ] [Ċ] [b] [<|im_end|>]"
    )


def test_without_thinking_the_empty_block_is_the_prompts_and_reasoning_is_refused() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer()
    turns = turn_encoder(tokenizer, "{%- set enable_thinking = false %}" + tokenizer.chat_template, "messages")
    (row,) = encode(talk("u: q", "a: a"), turns, "assistant")
    assert shown(row, tokenizer) == f"{ASKED}q<|im_end|>\n{SAYS}<think>\n\n</think>\n\n⟦a<|im_end|>⟧"
    with pytest.raises(RowError, match="empty <think> block, but this answer has reasoning"):
        encode(APART, turns, "assistant")


TWICE = Conversation((Message("user", "q"), Message("assistant", "", extra={"tool_calls": [CALL, CALL]})), (TOOL,))
UNNAMED = Conversation(
    (Message("user", "q"), Message("assistant", "", extra={"tool_calls": [{**CALL, "id": "c1"}]})), (TOOL,)
)
REASONED = Conversation((Message("user", "q"), Message("assistant", "a", extra={"reasoning_content": "r"})))
REFUSED = [
    ("gemma3", talk("u: q", "u: r", "a: a"), "refuses this conversation: Conversation roles must alternate"),
    ("gemma3", CALLING, "the chat template has no place for `tools`"),
    ("gemma3", replace(CALLING, tools=()), "the chat template has no place for `tool_calls`"),
    ("smollm2", CALLING, "the chat template has no place for `tools`"),
    ("llama31", REASONED, "the chat template has no place for `reasoning_content`"),
    ("mistral03", talk("u: q", "a: a", "a: b"), "refuses this conversation: After the optional system message"),
    ("mistral03", UNNAMED, "refuses this conversation: Tool call IDs should be alphanumeric strings with length 9"),
    ("llama31", TWICE, "refuses this conversation: This model only supports single tool-calls at once"),
]


@pytest.mark.parametrize(("name", "conversation", "reason"), REFUSED)
def test_what_a_familys_template_cannot_say_is_refused_in_its_words(
    name: str, conversation: Conversation, reason: str
) -> None:
    turns = family(name)[1]
    with pytest.raises(RowError, match=reason):
        encode(conversation, turns, "assistant")
    (many,) = encode_many([conversation], turns, "assistant")
    assert isinstance(many, RowError)


def test_what_mistral_says_of_the_system_only_while_it_prompts_is_part_of_each_row() -> None:
    tokenizer, turns = family("mistral03")
    rows = encode(talk("s: be kind", "u: q", "a: a", "u: r", "a: b"), turns, "assistant")
    texts = [tokenizer.decode(row.ids) for row in rows]
    assert [text.count("be kind") for text in texts] == [1, 1]
    assert [tokenizer.decode(row.ids[row.loss]).strip() for row in rows] == ["a</s>", "b</s>"]


# What holds of all.


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_ends_in_one_supervised_end_of_turn_at_which_generation_stops(name: str) -> None:
    tokenizer, turns = family(name)
    end, eos = tokenizer.convert_tokens_to_ids([FAMILIES[name].end, FAMILIES[name].eos])
    assert turns.stop_ids == {end, eos}
    rows = encode(TALKS["three turns"], turns, "assistant")
    learned = [row.ids[row.loss].tolist() for row in rows]
    assert sum(ids.count(end) for ids in learned) == 3
    assert all(ids[-1] == end for ids in learned)
    assert all(eos not in ids for ids in learned if eos != end)
    assert all(row.loss[-1] and row.ids[-1] == end for row in rows)


@pytest.mark.parametrize("name", WITH_BOS)
def test_bos_is_not_doubled_by_template_and_habit(name: str) -> None:
    tokenizer, turns = family(name)
    bos = tokenizer.bos_token_id
    assert tokenizer("a").input_ids[0] == bos
    for conversation in (TALKS["three turns"], CALLING if name != "gemma3" else SYSTEM):
        (row,) = encode(conversation, turns, "assistant")
        assert row.ids.tolist().count(bos) == 1
        assert row.ids[0] == bos
        assert turns.prompt(conversation.messages[:1], conversation.tools).count(bos) == 1


@pytest.mark.parametrize("name", NAMES)
def test_each_family_is_verified_and_only_rewritten_history_is_noted(name: str) -> None:
    turns = family(name)[1]
    assert isinstance(turns, ChatTurns)
    rewritten = (REWRITES,) if name in ("qwen3", "mistral03") else ()
    assert verify(turns, [TALKS["one turn"], TALKS["unicode"], SYSTEM]) == rewritten
    assert verify(turns, [AGAIN]) == rewritten


@pytest.mark.parametrize("text", ["### Human: hello### Assistant: the answer", " a\n\n中", "b</s>a"])
def test_a_text_for_llama_2_is_what_its_tokenizer_makes_of_it_and_eos_all_learned(text: str) -> None:
    tokenizer = llama2()
    turns = turn_encoder(tokenizer, "auto", "text")
    (row,) = encode(talk(f"a: {text}"), turns, "all")
    assert row.ids.tolist() == [*tokenizer(text).input_ids, 2]
    assert row.ids[:2].tolist() == tokenizer.convert_tokens_to_ids(["<s>", tokenizer.tokenize(text)[0]])
    assert row.loss.all()
    assert verify(turns, [talk(f"a: {text}")]) == ()
