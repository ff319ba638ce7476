"""`qlora chat`: answers from a base model, with or without an adapter.

Sees a model and its template. Invariant: a turn is encoded by the very code that encoded the training rows, and ends
where a training row's answer ended.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from qlora_cli.data.conversation import Message
from qlora_cli.data.formats import RowError
from qlora_cli.data.turns import TurnEncoder, turn_encoder
from qlora_cli.errors import DataError
from qlora_cli.generation.stream import Decoding, complete_all, stream
from qlora_cli.training.guard import memory_guard
from qlora_cli.workflows.events import Emit, Stage
from qlora_cli.workflows.locate import Loaded, find, load_model

__all__ = ["Decoding", "Talk", "open_talk"]


class Talk:
    """A loaded model that answers conversations."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._history: list[Message] = []
        data = loaded.recipe.data
        self._turns: TurnEncoder = turn_encoder(loaded.tokenizer, data.template, data.format)

    def say(self, text: str, decoding: Decoding) -> Iterator[str]:
        """Pieces of the answer to the next turn of this conversation."""
        self._history.append(Message("user", text))
        pieces = []
        for piece in self._stream(self._history, decoding):
            pieces.append(piece)
            yield piece
        self._history.append(Message("assistant", "".join(pieces)))

    def _stream(self, messages: Sequence[Message], decoding: Decoding) -> Iterator[str]:
        """Text, each piece once it can no longer change (a character may take several tokens)."""
        ids: list[int] = []
        shown = ""
        prompt = self._prompt(messages)
        room = self._room(len(prompt))
        limited = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, room))
        for token in stream(self._loaded.model, prompt, self._turns.stop_ids, limited):
            ids.append(token)
            text = self._text(ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text
        yield self._text(ids)[len(shown) :]

    def answer_all(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to many prompts, each a conversation of its own."""
        encoded = [self._prompt([Message("user", prompt)]) for prompt in prompts]
        answers = complete_all(self._loaded.model, encoded, self._turns.stop_ids, max_new_tokens)
        return [self._text(ids) for ids in answers]

    def _room(self, used: int) -> int:
        """Positions left for an answer."""
        positions = getattr(self._loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and used >= positions:
            raise DataError(
                f"the conversation has {used:,} tokens, and the model was trained for {positions:,} positions",
                fix="start a new conversation",
            )
        return positions - used if positions is not None else sys.maxsize

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        try:
            return self._turns.prompt(messages)
        except RowError as error:
            raise DataError(str(error), fix="start a new conversation") from error

    def _text(self, ids: list[int]) -> str:
        text: str = self._loaded.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def open_talk(target: str | None, adapter: Path | None, emit: Emit) -> Talk:
    """The model that `target` (a run, an adapter folder or a model) and `adapter` name."""
    found = find(target, adapter)
    emit(Stage(f"loading {found.recipe.model.base}{f' with {found.adapter}' if found.adapter else ''}"))
    with memory_guard("loading the model"):
        return Talk(load_model(found, emit))
