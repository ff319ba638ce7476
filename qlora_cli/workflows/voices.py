"""Who speaks: a base, or one of the adapters on it, each through the template that it was trained with.

Sees a model, its adapters and their recipes. Invariant: who speaks is encoded and stopped by its own voice, and the
cache of a conversation never outlives the weights that it was computed with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_cli.data.conversation import Message
from qlora_cli.data.turns import turn_encoder
from qlora_cli.generation.decoder import Completion, Decoder, Finish
from qlora_cli.generation.sampling import Decoding, model_decoding
from qlora_cli.model.adapter import load_into, parted, read_adapter, token_ids
from qlora_cli.model.decode import FastDecoding
from qlora_cli.model.lora import stored_in
from qlora_cli.model.switch import Adapters
from qlora_cli.model.tokens import TokenSwitch
from qlora_cli.recipe.schema import LoraSection
from qlora_cli.workflows.events import Emit
from qlora_cli.workflows.locate import Found, Loaded, load_bare, tokenizer_of
from qlora_cli.workflows.text import TextStream
from qlora_cli.workflows.voice import Voice, complete, room


def voice_of(found: Found, tokenizer: Any) -> Voice:
    """The voice of what was found."""
    data = found.recipe.data
    return Voice(tokenizer, turn_encoder(tokenizer, data.template, data.format))


class Stack:
    """The adapters of a bare base, each with its layers and its new tokens, of which at most one is in use."""

    def __init__(self, loaded: Loaded) -> None:
        self._dtype = loaded.dtype
        self._layers, self._tokens = Adapters(loaded.model, loaded.dtype), TokenSwitch(loaded.model)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order they were added."""
        return self._layers.names

    @property
    def active(self) -> str | None:
        """The one in use."""
        return self._layers.active

    def add(self, name: str, lora: LoraSection, folder: Path) -> None:
        """Takes in the adapter of a folder; the one in use stays so. Raises `ModelError` where it does not fit."""
        config, tensors = read_adapter(folder)
        layers, tokens = parted(tensors)
        load_into({}, tokens, folder, self._tokens.add(name, token_ids(config, folder), stored_in(lora, self._dtype)))
        self._layers.add(name, lora, layers, folder)

    def use(self, name: str | None) -> None:
        """Puts adapter `name` in place; None leaves the bare base."""
        self._layers.use(name)
        self._tokens.use(name)


class Voices:
    """A loaded base with its adapters. The bare base answers in the template of the adapter that spoke last, so that
    the adapter is all that differs."""

    def __init__(self, adapters: Stack, model: Any, voices: Mapping[str | None, Voice]) -> None:
        self._adapters, self._model, self._voices = adapters, model, voices
        self.voice = next(iter(voices.values()))
        self._decoder: Decoder | None = None
        self._fast: FastDecoding | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters'."""
        return self._adapters.names

    @property
    def active(self) -> str | None:
        """The adapter that speaks; None for the bare base."""
        return self._adapters.active

    def use(self, name: str | None) -> None:
        """Lets adapter `name`, or the bare base, speak from now on."""
        if name != self.active:
            self._adapters.use(name)
            self._take(self._voices[name] if name is not None else self.voice)

    def _take(self, voice: Voice) -> None:
        if self._decoder is not None:
            self._decoder.forget()
        if voice.turns.stop_ids != self.voice.turns.stop_ids:
            self._decoder = None
        self.voice = voice

    @contextmanager
    def returning(self) -> Iterator[None]:
        """Whoever speaks within, afterwards it is as it was before."""
        active, voice = self.active, self.voice
        try:
            yield
        finally:
            self.use(active)
            self._take(voice)

    def defaults(self) -> Decoding:
        """How the model's own generation config says to decode."""
        return model_decoding(self._model)

    @property
    def finish(self) -> Finish:
        """How the last answer went."""
        return (self._decoder and self._decoder.last) or Finish()

    def room(self, used: int) -> int:
        """Positions left for an answer. `DataError` where there are none."""
        return room(self._model.config, used)

    def stream(self, messages: Sequence[Message], decoding: Decoding) -> Iterator[str]:
        """Pieces of the answer, each once it can no longer change (a character may take several tokens)."""
        prompt, lead = self.voice.prompt(messages), self.voice.turns.lead
        for piece in self._pieces(prompt, decoding):
            said, lead = (piece.removeprefix(lead), "") if piece else (piece, lead)
            if said:
                yield said

    def _pieces(self, prompt: Sequence[int], decoding: Decoding) -> Iterator[str]:
        limit = min(decoding.max_new_tokens, self.room(len(prompt)))
        text = TextStream(self.voice.text)
        self._hurry()
        if self._decoder is None:
            self._decoder = Decoder(self._model, self.voice.turns.stop_ids)
        for token in self._decoder.stream(prompt, replace(decoding, max_new_tokens=limit)):
            yield text.add(token)
        yield text.rest()

    def _hurry(self) -> None:
        """Makes the packed copies, once: they are kept through changes of adapter and stop tokens."""
        if self._fast is None:
            self._fast = FastDecoding.of(self._model)

    def complete(self, prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int) -> Iterator[Completion]:
        """See `complete`."""
        self._hurry()
        return complete(self._model, prompts, self.voice, decoding, batch_size)


def load_voices(found: Mapping[str | None, Found], emit: Emit, allow_changed_base: bool) -> Voices:
    """Loads what was found: a model as it is (under the name None), or adapters of one base, by their names, of which
    the first one speaks."""
    first = next(iter(found.values()))
    loaded = load_bare(first, emit, allow_changed_base, [each.adapter for each in found.values() if each is not first])
    adapters = Stack(loaded)
    voices = {}
    for name, each in found.items():
        voices[name] = voice_of(each, loaded.tokenizer if each is first else tokenizer_of(each))
        if name is not None:
            assert each.adapter is not None and each.recipe.lora is not None, "a name stands for an adapter"
            adapters.add(name, each.recipe.lora, each.adapter)
    adapters.use(next(iter(found)))
    return Voices(adapters, loaded.model, voices)
