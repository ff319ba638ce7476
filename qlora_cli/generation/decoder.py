"""Tokens from a model and a prompt, one by one or for many prompts at once.

Knows a causal model and token ids; nothing of templates or files. Invariant: an answer ends at one of the given stop
tokens, which is not part of it, or at the limit; and a `Decoder`'s key-value cache holds exactly the ids it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from qlora_cli.generation.cache import continues, grow_in_place
from qlora_cli.generation.sampling import Decoding, check_logits, choose
from qlora_cli.model.decode import FastDecoding, evaluating
from qlora_cli.model.segments import usual_attention


@dataclass(frozen=True)
class Finish:
    """How an answer came about: whether a stop token ended it (or the limit), its tokens, the prompt's, how many of
    those the cache already held, and the seconds to the first token and in all, the reader's own time not counted."""

    stopped: bool = False
    tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Completion:
    """An answer, and whether a stop token ended it rather than the limit."""

    ids: list[int]
    stopped: bool


class Decoder:
    """Streams answers and keeps the key-value cache of the conversation, so that a next prompt costs only what is new
    in it. One stream at a time."""

    def __init__(self, model: Any, stop_ids: frozenset[int]) -> None:
        self._model, self._stop_ids = model, stop_ids
        self._fast = FastDecoding.of(model)
        self._ids: list[int] = []
        self._cache: Any = None
        self.last: Finish | None = None

    @property
    def held(self) -> list[int]:
        """The ids that the cache holds."""
        return self._ids.copy()

    @property
    def packed_bytes(self) -> int:
        """What the packed copies of the weights take."""
        return self._fast.bytes

    def forget(self) -> None:
        """Drops the cache: the weights that it was computed with are no longer the model's, say."""
        self._ids, self._cache = [], None

    def stream(self, prompt: Sequence[int], decoding: Decoding) -> Iterator[int]:
        """Yields new token ids one by one; `last` tells how it has gone so far."""
        started, ids = perf_counter(), list(prompt)
        generator = torch.Generator(self._model.device).manual_seed(decoding.seed)
        with self._or_forget():
            finish = self.last = Finish(prompt_tokens=len(ids), reused_tokens=self._rewind(ids))
        self._fast.find_adapters()
        with evaluating(self._model):
            for count in range(1, decoding.max_new_tokens + 1):
                token = choose(self._logits(ids), ids, decoding, generator)
                seconds = perf_counter() - started
                if token in self._stop_ids:
                    self.last = replace(finish, stopped=True, seconds=seconds)
                    return
                ids.append(token)
                first = finish.first_seconds or seconds
                finish = self.last = replace(finish, tokens=count, first_seconds=first, seconds=seconds)
                yield token
                started = perf_counter() - seconds

    @contextmanager
    def _or_forget(self) -> Iterator[None]:
        """Drops the cache if what happens within is interrupted: it could hold part of a token."""
        try:
            yield
        except BaseException:
            self.forget()
            raise

    def _rewind(self, ids: list[int]) -> int:
        """Cuts the cache back to what `ids` begin with, short of the last one, whose logits are wanted."""
        common = min(_common(self._ids, ids), len(ids) - 1)
        surplus = len(self._ids) - common
        if common <= 0 or not continues(self._cache, surplus):
            self.forget()
        elif surplus:
            self._cache.crop(-surplus)
            del self._ids[common:]
        return len(self._ids)

    def _logits(self, ids: list[int]) -> Tensor:
        """[V] after the last of `ids`; what the cache does not hold of them is fed."""
        held = len(self._ids)
        if self._ids != ids[:held]:
            raise RuntimeError("another stream of this decoder has begun")
        new = torch.tensor([ids[held:]], device=self._model.device)
        with self._or_forget(), self._fast.on():
            output = self._model(input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = grow_in_place(getattr(output, "past_key_values", None))
            self._ids = [] if self._cache is None else ids.copy()
            logits: Tensor = output.logits[0, -1].float()
            check_logits(logits)
        return logits


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def complete_all(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: frozenset[int], decoding: Decoding, batch_size: int = 32
) -> Iterator[Completion]:
    """Completions in the order of `prompts`, computed in batches padded at the left. What is drawn depends on the
    seed, the prompts and the batch size only."""
    if not prompts:
        return
    fast, config = FastDecoding.of(model), _generation_config(decoding, stop_ids)
    fast.find_adapters()
    for start in range(0, len(prompts), batch_size):
        with torch.random.fork_rng(), evaluating(model), usual_attention(model), fast.on():
            torch.manual_seed(decoding.seed + start)
            rows = _complete_batch(model, prompts[start : start + batch_size], config)
        for row in rows:
            end = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
            yield Completion(row[:end], stopped=end < len(row))


def _generation_config(decoding: Decoding, stop_ids: frozenset[int]) -> GenerationConfig:
    """`decoding` for transformers; what it does not name is off, whatever the model's own configuration says."""
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.temperature > 0,
        repetition_penalty=decoding.repetition_penalty,
        eos_token_id=sorted(stop_ids),
        pad_token_id=min(stop_ids),
        num_beams=1,
        **(sampling | {"min_p": decoding.min_p} if decoding.temperature > 0 else {}),
    )


def _complete_batch(model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    width, pad = max(map(len, prompts)), config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    check = LogitsProcessorList([_Finite()])
    done = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=check)
    rows: list[list[int]] = done[:, width:].tolist()
    return rows


class _Finite(LogitsProcessor):
    """Leaves the logits as they are, or stops (see `check_logits`)."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_logits(scores)
        return scores
