"""Tokens from a model and a prompt.

Knows a causal model and token ids; nothing of templates or files. Invariant: generation ends at one of the given stop
tokens or at the limit, and the stop token is not part of what is returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: `temperature` 0 is greedy; `top_p` keeps the likeliest tokens of that mass."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@torch.inference_mode()
def stream(model: Any, prompt: Sequence[int], stop_ids: frozenset[int], decoding: Decoding) -> Iterator[int]:
    """Yields new token ids one by one."""
    model.eval()
    generator = torch.Generator(model.device).manual_seed(decoding.seed)
    ids, cache = torch.tensor([list(prompt)], device=model.device), None
    for _ in range(decoding.max_new_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = _choose(output.logits[0, -1].float(), decoding, generator)
        if token in stop_ids:
            return
        yield token
        ids, cache = torch.tensor([[token]], device=model.device), output.past_key_values


def _choose(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> int:
    if decoding.temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / decoding.temperature).softmax(-1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= decoding.top_p
    probabilities[outside] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def complete_all(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: frozenset[int], max_new_tokens: int, batch_size: int = 32
) -> list[list[int]]:
    """Greedy completions of many prompts, in batches padded at the left."""
    model.eval()
    return [
        ids
        for start in range(0, len(prompts), batch_size)
        for ids in _complete_batch(model, prompts[start : start + batch_size], stop_ids, max_new_tokens)
    ]


def _complete_batch(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    width, pad = max(map(len, prompts)), min(stop_ids)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stop_ids),
        pad_token_id=pad,
    )
    return [_until_stop(row, stop_ids) for row in output[:, width:].tolist()]


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
