"""From messages to token ids, in the two ways there are: a chat template, or plain text.

Knows the tokenizer and its template; nothing of loss or files. Invariant: `turn(m)` is `prompt(m[:-1])`, token for
token, and an answer that ends with an end-of-turn token. What the model is prompted with at inference is what it saw in
training, and what ends its turn there was a target here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.conversation import Conversation, Message
from qlora_cli.data.formats import RowError
from qlora_cli.data.pieces import Layout, Marks, encode_texts, ids_of
from qlora_cli.data.render import Renderer, Tools
from qlora_cli.data.templates import Chosen, apply_template, no_template
from qlora_cli.errors import DataError

_MEND = "choose another data.template, or mend the template in the base's tokenizer files"
SAID = frozenset({"tool_calls", "reasoning_content"})
"""Fields of an answer that are something it says."""
_IN_TEXT = "take it out of the text"
_WITH_TOOLS = "set data.template to one that renders it (chatml and llama3 render tools), or remove it from the row"


class Answer(NamedTuple):
    """An assistant's turn in a row: position of the message, its first token, the place behind its end-of-turn."""

    message: int
    start: int
    stop: int


class Row(NamedTuple):
    """Token ids [T] int32, and the answers among them."""

    ids: NDArray[np.int32]
    answers: list[Answer]


class TurnEncoder(Protocol):
    """Encodes the turns of a conversation."""

    stop_ids: frozenset[int]
    """Tokens that end the model's turn: the template's end-of-turn token and the tokenizer's EOS."""

    bos_id: int | None
    """The token that a row may begin with."""

    lead: str
    """What the template writes between a prompt and what the answer says: a space, in some."""

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Token ids of everything that precedes the next assistant turn."""

    def turn(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[list[int], list[int]]:
        """Token ids of what precedes the last message, an assistant's, and of it with its end-of-turn token."""

    def rows(self, conversations: Sequence[Conversation]) -> list[Row | None]:
        """Many conversations at once, up to the last answer of each: the row that `turn` would make, or None where it
        takes `turn` itself (several rows, a refusal, a token across a border). No state is kept between calls."""


class PlainTurns:
    """Contents one after the other, BOS before the first where the tokenizer has the habit, EOS after each answer."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token",
                why="without one as a target, the model would never learn to stop",
                fix="use a chat template (data.template), or set eos_token in the base's tokenizer_config.json",
            )
        self._tokenizer = tokenizer
        self._eos: int = tokenizer.eos_token_id
        self.lead = ""
        self.bos_id: int | None = tokenizer.bos_token_id
        self._start = [self.bos_id] if self.bos_id in tokenizer("").input_ids[:1] else []
        self.stop_ids = frozenset({self._eos})

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """See `TurnEncoder.prompt`."""
        _refuse_tools(messages, tools)
        contents = [ids_of(self._tokenizer, message.content) for message in messages]
        return self._joined(messages, contents)[0]

    def turn(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[list[int], list[int]]:
        """See `TurnEncoder.turn`."""
        before = self.prompt(messages[:-1], tools)
        return before, self.prompt(messages, tools)[len(before) :]

    def rows(self, conversations: Sequence[Conversation]) -> list[Row | None]:
        """See `TurnEncoder.rows`."""
        texts = {message.content for conversation in conversations for message in conversation.messages}
        ids = encode_texts(self._tokenizer, texts)
        return [self._row(conversation, ids) for conversation in conversations]

    def _row(self, conversation: Conversation, ids: Mapping[str, list[int]]) -> Row | None:
        turns = conversation.assistant_turns()
        if not turns or conversation.tools or any(message.extra for message in conversation.messages):
            return None
        messages = conversation.messages[: turns[-1] + 1]
        joined, answers = self._joined(messages, [ids[message.content] for message in messages])
        return Row(np.array(joined, np.int32), answers)

    def _joined(self, messages: Sequence[Message], contents: Sequence[Sequence[int]]) -> tuple[list[int], list[Answer]]:
        ids, answers = list(self._start), list[Answer]()
        for position, (message, content) in enumerate(zip(messages, contents, strict=True)):
            start = len(ids)
            ids.extend(content)
            if message.role == "assistant":
                ids.extend([] if list(content[-1:]) == [self._eos] else [self._eos])
                answers.append(Answer(position, start, len(ids)))
        return ids, answers


def _refuse_tools(messages: Sequence[Message], tools: Tools) -> None:
    """Plain text would leave them out without a word."""
    named = sorted({name for message in messages for name in message.extra} | ({"tools"} if tools else set()))
    if named:
        fix = "set data.template to one that renders them (the tokenizer's own, chatml, llama3)"
        raise RowError(f"plain text has no place for {', '.join(f'`{name}`' for name in named)}", fix)


class ChatTurns:
    """Turns as a chat template renders them."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise no_template(tokenizer)
        self.tokenizer = tokenizer
        self._render = Renderer(tokenizer)
        self._proven = False  # that the tokenizer does no more than its backend, which the first texts show
        self._special = set(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        eos = tokenizer.eos_token_id
        head, whole = self._probe()
        before = self._before(Message("assistant", ""), (Message("user", "a"),), ())
        self.lead = before.removeprefix(head) if before.startswith(head) else ""
        self._end = self._end_of_turn(self._apart(head, whole)[1])
        self.bos_id: int | None = tokenizer.bos_token_id
        self.stop_ids = frozenset({self._end} | ({eos} if eos is not None else set()))
        self._marks = Marks.of(tokenizer, self._end, whole)

    def _probe(self) -> tuple[str, str]:
        """A question, and it with a short answer (with reasoning, where the template takes none without)."""
        question, plain, reasoned = Message("user", "a"), Message("assistant", "b"), Message("assistant", "r</think>b")
        try:
            try:
                return self._texts((question, plain), ())
            except _NoReasoningError:
                return self._texts((question, reasoned), ())
        except RowError as error:
            raise DataError(f"a question and its answer cannot be rendered: {error}", fix=_MEND) from error

    def _end_of_turn(self, ids: Sequence[int]) -> int:
        """The first special token behind an answer. What may follow it (a line break, an EOS behind the whole
        conversation) belongs to no turn."""
        spoken = [i for i, token in enumerate(ids) if token not in self._special and self._says_something(token)]
        ends = [token for token in ids[spoken[-1] + 1 :] if token in self._special] if spoken else []
        if not ends:
            raise DataError(
                "the chat template ends an assistant turn without a special token",
                why="the model would never learn to stop",
                fix=_MEND,
            )
        return ends[0]

    def _says_something(self, token: int) -> bool:
        return bool(self.tokenizer.decode([token]).strip())

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """See `TurnEncoder.prompt`."""
        return self._ids(self._render(messages, True, tools)) if messages else []

    def turn(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[list[int], list[int]]:
        """See `TurnEncoder.turn`."""
        before, turn = self._apart(*self._texts(messages, tools))
        ends = [position for position, token in enumerate(turn) if token == self._end]
        if not ends:
            raise RowError("the chat template did not end this assistant turn with its end-of-turn token")
        if len(ends) > 1:  # where the model would learn to stop
            raise RowError(f"an answer holds the end-of-turn token, {self.tokenizer.decode([self._end])}", _IN_TEXT)
        return before, turn[: ends[-1] + 1]

    def rows(self, conversations: Sequence[Conversation]) -> list[Row | None]:
        """See `TurnEncoder.rows`."""
        plans = [self._plan(conversation) for conversation in conversations]
        ids = encode_texts(self.tokenizer, (text for plan in plans if plan for text in plan.texts), self._proven)
        rows = [self._row(plan, ids) for plan in plans]
        checked = next(((plan.text, row.ids) for plan, row in zip(plans, rows, strict=True) if plan and row), None)
        if checked and not self._proven:
            if self._ids(checked[0]) != checked[1].tolist():  # it does more than its backend
                return [None] * len(conversations)
            self._proven = bool(self.tokenizer.is_fast)
        return rows

    def _plan(self, conversation: Conversation) -> Layout | None:
        """Where the answers stand in the text of the whole conversation, if one text holds them all."""
        if self._marks is None:
            return None
        layout = Layout(self._marks)
        for position in conversation.assistant_turns():
            try:
                head, whole = self._texts(conversation.messages[: position + 1], conversation.tools)
            except RowError:
                return None
            if not layout.add(position, head, whole):
                return None
        return layout if layout.text else None

    def _row(self, layout: Layout | None, ids: Mapping[str, list[int]]) -> Row | None:
        found = layout.find(ids) if layout else None
        return Row(found[0], [Answer(*span) for span in found[1]]) if found else None

    def _apart(self, head: str, whole: str) -> tuple[list[int], list[int]]:
        """Ids before the last turn and of it. Where a token would straddle the border, the two are encoded apart,
        since at inference the prompt is encoded alone."""
        before, ids = self._ids(head), self._ids(whole)
        return (before, ids[len(before) :]) if ids[: len(before)] == before else (before, self._ids(whole[len(head) :]))

    def _texts(self, messages: Sequence[Message], tools: Tools) -> tuple[str, str]:
        """The text that prompts for the last turn, and that text with the turn behind it."""
        whole = self._render(messages, False, tools)
        self._check_heard(messages, tools, whole)
        head = self._render(messages[:-1], True, tools) if len(messages) > 1 else self._opening(messages[0], tools)
        if whole.startswith(head):
            return head, whole
        spoken = [message for message in messages if message.role != "system"]
        if 1 < len(spoken) < len(messages):  # some templates write the system's words only while they prompt
            bare = self._render(spoken[:-1], True, tools)
            if whole.startswith(bare):
                return head, head + whole[len(bare) :]
        return head, head + _after_think_block(head, whole)

    def _check_heard(self, messages: Sequence[Message], tools: Tools, whole: str) -> None:
        """Refuses what the template would leave out without a word."""
        last = messages[-1]
        if tools and self._render(messages, False) == whole:
            raise RowError("the chat template has no place for `tools`", _WITH_TOOLS)
        for name in sorted(name for name in SAID if str(last.extra.get(name) or "").strip()):
            rest = {key: value for key, value in last.extra.items() if key != name}
            if self._render([*messages[:-1], replace(last, extra=rest)], False, tools) == whole:
                raise RowError(f"the chat template has no place for `{name}`", _WITH_TOOLS)

    def _opening(self, message: Message, tools: Tools) -> str:
        """What the template puts before an answer that nothing precedes: all that does not depend on what it says."""
        return self._before(message, (), tools).rstrip(" ")

    def _before(self, answer: Message, asked: Sequence[Message], tools: Tools) -> str:
        """What of an answer's text and what precedes it does not depend on what the answer says."""
        says = [replace(answer, content=mark, extra={}) for mark in ("\ue000", "\ue001")]
        texts = [self._render([*asked, each], False, tools) for each in says]
        return os.path.commonprefix(texts)  # noqa: RUF071 - of characters

    def _ids(self, text: str) -> list[int]:
        return ids_of(self.tokenizer, text)


class _NoReasoningError(RowError):
    """The prompt opens a block of reasoning, and the answer has none to close it."""


def _after_think_block(head: str, whole: str) -> str:
    """The answer, where the prompt ends in a <think> block that the template leaves out once the answer is there.

    Prompt and answer then make the row: that is what the model will have written behind such a prompt. It must fit: an
    empty block is for an answer without reasoning, and an open one for reasoning that goes on and is closed.
    """
    start = head.rfind("<think>")
    block, rest = head[max(0, start) :], whole[max(0, start) :]
    if start < 0 or not whole.startswith(head[:start]) or not re.fullmatch(r"<think>\s*(</think>\s*)?", block):
        raise RowError("the chat template renders the prompt otherwise once the answer is there")
    reasons = rest.lstrip().startswith("<think>")
    if "</think>" in block and reasons:
        raise RowError("the chat template's prompt holds an empty <think> block, but this answer has reasoning")
    if "</think>" not in block and (reasons or "</think>" not in rest):
        raise _NoReasoningError(
            "the chat template's prompt opens a <think> block, but keeps no reasoning of this answer"
        )
    return rest


def turn_encoder(tokenizer: Any, template: str, row_format: str, new_tokens: Sequence[str] = ()) -> TurnEncoder:
    """The encoder that `data.template` asks for. The template is set on the tokenizer, so that it is saved with it."""
    return encoder_of(tokenizer, apply_template(tokenizer, template, row_format, new_tokens))


def encoder_of(tokenizer: Any, chosen: Chosen) -> TurnEncoder:
    """The encoder of the template that `apply_template` chose."""
    return PlainTurns(tokenizer) if chosen.name == "none" else ChatTurns(tokenizer)
