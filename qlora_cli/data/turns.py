"""From messages to token ids, in the two ways there are: a chat template, or plain text.

Knows the tokenizer and its template; nothing of loss or files. Invariant: `turn(m)` is `prompt(m[:-1])`, token for
token, and an answer that ends with an end-of-turn token. What the model is prompted with at inference is what it saw in
training, and what ends its turn there was a target here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from qlora_cli.data.conversation import Message
from qlora_cli.data.formats import RowError
from qlora_cli.errors import DataError

ALPACA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% else %}### Response:\n{{ message.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


class TurnEncoder(Protocol):
    """Encodes the turns of a conversation."""

    stop_ids: frozenset[int]
    """Tokens that end the model's turn: the template's end-of-turn token and the tokenizer's EOS."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of everything that precedes the next assistant turn."""

    def turn(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids of what precedes the last message, an assistant's, and of it with its end-of-turn token."""


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
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos is not None and bos in tokenizer("").input_ids[:1] else []
        self.stop_ids = frozenset({self._eos})

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """See `TurnEncoder.prompt`."""
        ids = list(self._start)
        for message in messages:
            ids += self._tokenizer(message.content, add_special_tokens=False).input_ids
            ids += [self._eos] if message.role == "assistant" else []
        return ids

    def turn(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """See `TurnEncoder.turn`."""
        before = self.prompt(messages[:-1])
        return before, self.prompt(messages)[len(before) :]


class ChatTurns:
    """Turns as a chat template renders them."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the base model's tokenizer has no chat template",
                why="`messages` rows need one to become text",
                fix="take the instruction-tuned variant as model.base, or set data.template: alpaca",
            )
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        eos = tokenizer.eos_token_id
        self._end = self._probe_end_of_turn()
        self.stop_ids = frozenset({self._end} | ({eos} if eos is not None else set()))

    def _probe_end_of_turn(self) -> int:
        """The first special token behind an answer. What may follow it (a line break, an EOS behind the whole
        conversation) belongs to no turn."""
        probe = (Message("user", "a"), Message("assistant", "b"))
        fix = "choose another data.template, or mend the template in the base's tokenizer files"
        try:
            ids = self._split(probe)[1]
        except RowError as error:
            raise DataError(f"a question and its answer cannot be rendered: {error}", fix=fix) from error
        spoken = [i for i, token in enumerate(ids) if token not in self._special and self._says_something(token)]
        ends = [token for token in ids[spoken[-1] + 1 :] if token in self._special] if spoken else []
        if not ends:
            raise DataError(
                "the chat template ends an assistant turn without a special token",
                why="the model would never learn to stop",
                fix=fix,
            )
        return ends[0]

    def _says_something(self, token: int) -> bool:
        return bool(self._tokenizer.decode([token]).strip())

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """See `TurnEncoder.prompt`."""
        return self._ids(self._render(messages, generation=True)) if messages else []

    def turn(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """See `TurnEncoder.turn`."""
        before, turn = self._split(messages)
        ends = [position for position, token in enumerate(turn) if token == self._end]
        if not ends:
            raise RowError("the chat template did not end this assistant turn with its end-of-turn token")
        return before, turn[: ends[-1] + 1]

    def _split(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids before the last turn and of it. Where a token would straddle the border, the two are encoded apart,
        since at inference the prompt is encoded alone."""
        whole = self._render(messages, generation=False)
        head = self._render(messages[:-1], generation=True) if len(messages) > 1 else _opening(whole, messages[0])
        if not whole.startswith(head):
            raise RowError("the chat template renders the prompt otherwise once the answer is there")
        before, ids = self._ids(head), self._ids(whole)
        return (before, ids[len(before) :]) if ids[: len(before)] == before else (before, self._ids(whole[len(head) :]))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
        except (TemplateError, TypeError, ValueError) as error:  # what a template's own expressions raise
            raise RowError(f"the chat template refuses this conversation: {error}") from error


def _opening(whole: str, message: Message) -> str:
    """What a template puts before the first turn: the text up to its content. (No template renders nothing at all.)"""
    return whole[: max(0, whole.find(message.content.strip()))]


def turn_encoder(tokenizer: Any, template: str, row_format: str) -> TurnEncoder:
    """The encoder that `data.template` asks for. `alpaca` is set on the tokenizer, so that it is saved with it."""
    choice = _resolve(template, row_format, bool(tokenizer.chat_template))
    if choice == "none":
        return PlainTurns(tokenizer)
    if choice == "alpaca":
        tokenizer.chat_template = ALPACA_TEMPLATE
    return ChatTurns(tokenizer)


def _resolve(template: str, row_format: str, has_template: bool) -> str:
    automatic = {"messages": "tokenizer", "alpaca": "tokenizer" if has_template else "alpaca"}
    return automatic.get(row_format, "none") if template == "auto" else template
