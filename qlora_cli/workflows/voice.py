"""A voice: a tokenizer with a template, which turns what is said into tokens and back.

Sees tokens and turns, no files. Invariant: a turn is encoded by the very code that encoded the training rows, and ends
where a training row's answer ended.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qlora_cli.data.conversation import Message
from qlora_cli.data.formats import RowError
from qlora_cli.data.turns import TurnEncoder
from qlora_cli.errors import DataError
from qlora_cli.generation.decoder import Completion, complete_all
from qlora_cli.generation.sampling import Decoding

Ended = Literal["stop token", "max_new_tokens", "positions", "interrupted"]


def how_ended(stopped: bool, tokens: int, decoding: Decoding) -> Ended:
    """What ended an answer that was not interrupted."""
    if stopped:
        return "stop token"
    return "max_new_tokens" if tokens >= decoding.max_new_tokens else "positions"


@dataclass(frozen=True)
class Voice:
    """A tokenizer with its template, and what ends a turn in it."""

    tokenizer: Any
    turns: TurnEncoder

    def text(self, ids: Sequence[int]) -> str:
        """The tokens as text, without special tokens, and as they were trained: no space is tidied away."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def answer(self, ids: Sequence[int]) -> str:
        """What an answer's tokens say, less what the template puts before every answer."""
        return self.text(ids).removeprefix(self.turns.lead)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of everything before the next answer. `DataError` for what the template refuses."""
        try:
            for message in messages:
                message.content.encode()
            return self.turns.prompt(messages)
        except RowError as error:
            raise DataError(str(error), fix="leave the system message out, or start a new conversation") from error
        except UnicodeEncodeError as error:
            raise DataError(f"the text is not Unicode: {error.reason} (character {error.start + 1})") from error


def positions(config: Any) -> int:
    """How many a model of this configuration was trained for; a very large number where it has no such limit."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)


def room(config: Any, used: int) -> int:
    """Positions that a model of this configuration has left for an answer. `DataError` where there are none."""
    there = positions(config)
    if used >= there:
        raise DataError(
            f"the conversation has {used:,} tokens, and the model was trained for {there:,} positions",
            why="past them it computes what nobody has trained, and to cut it would answer another question",
            fix="shorten it, or start a new conversation",
        )
    return there - used


def complete(
    model: Any, prompts: Sequence[Sequence[int]], voice: Voice, decoding: Decoding, batch_size: int
) -> Iterator[Completion]:
    """Answers to many prompts, in their order. Prompts whose room is less than the limit are answered alone. Each batch
    has draws of its own."""
    limits = [min(decoding.max_new_tokens, room(model.config, len(prompt))) for prompt in prompts]
    start = 0
    while start < len(prompts):
        end = start + 1
        while end < len(prompts) and limits[end] == limits[start]:
            end += 1
        limited = replace(decoding, max_new_tokens=limits[start], seed=decoding.seed + start)
        yield from complete_all(model, prompts[start:end], voice.turns.stop_ids, limited, batch_size)
        start = end
