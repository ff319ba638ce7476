"""Whether a model computes packed rows exactly as apart, and with which attention.

Knows a model's decoder and nothing of how rows are packed. Invariant: an answer comes from this very model, which
computed two rows packed and each of them alone; and the check leaves modes, gradients and random state as they were.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.model.native.attention import why_no_attention
from qlora_cli.model.segments import ATTENTION, COMPILED, using_attention
from qlora_cli.model.trial import DECLINED, in_mode, in_words

LENGTHS = (19, 32)
"""Of the two rows of the check."""
WINDOW = 7
"""Windows are this small during the check, so that both rows are longer."""
WINDOWS = ("sliding_window", "attention_chunk_size")
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 0.1
"""Relative difference of hidden states; gradients may differ by three times as much. It is for wrong formulas only:
a leak from row to row shows in a gradient that must be zero to the bit."""


@dataclass(frozen=True)
class Packing:
    """The attention that makes packing exact, None where none does; and why not a faster one, in a few words."""

    attention: str | None
    reason: str = ""


def find_packing(model: Any, vocabulary: int, compiled: bool = False) -> Packing:
    """Tries the attentions for this machine, fastest first. `model` computes on the device it will train on. With
    `compiled`, also the one that is compiled for a CPU."""
    reason = ""
    for attention, missing in _candidates(model, compiled).items():
        why = missing or why_not_packed(model, attention, vocabulary)
        if not why:
            return Packing(attention, reason)
        reason = why
    return Packing(None, reason)


def _candidates(model: Any, compiled: bool) -> dict[str, str]:
    """By their names, what they lack on this machine."""
    if model.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None and _sixteen_bit(model):
        return {"flash_attention_2": "", ATTENTION: ""}
    if model.device.type == "cpu" and compiled:
        return {COMPILED: why_no_attention(model.dtype, model.device), ATTENTION: ""}
    return {ATTENTION: ""}


def _sixteen_bit(model: nn.Module) -> bool:
    return any(p.dtype in {torch.float16, torch.bfloat16} for p in model.parameters())


def why_not_packed(model: Any, attention: str, vocabulary: int) -> str:
    """Empty where packed rows equal rows apart, which the model computes with its own attention."""
    try:
        # without dropout nothing draws, without checkpointing gradients can be asked for by name
        with in_mode(model, training=False), _small_windows(model), torch.enable_grad():
            return _compare(model, attention, vocabulary)
    except DECLINED as error:
        return in_words(error)


def _compare(model: Any, attention: str, vocabulary: int) -> str:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, sum(LENGTHS)), generator=generator).to(model.device)
    first, second = ids.split(LENGTHS, dim=1)
    hidden, grads = _hidden_and_gradient(model, ids, attention)
    with torch.no_grad():
        alone = _decode(model, first)
    hidden_alone, grads_alone = _hidden_and_gradient(model, second, None)
    if grads[:, : LENGTHS[0]].any():
        return "packed rows see each other"
    tolerance = TOLERANCE_16_BIT if _sixteen_bit(model) else TOLERANCE
    off = _difference(hidden, torch.cat([alone, hidden_alone], dim=1))
    if not off <= tolerance:
        return f"hidden states of packed rows are {off:.1%} off"
    off = _difference(grads[:, LENGTHS[0] :], grads_alone)
    return "" if off <= 3 * tolerance else f"gradients of packed rows are {off:.1%} off"


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def _hidden_and_gradient(model: Any, ids: Tensor, attention: str | None) -> tuple[Tensor, Tensor]:
    """Hidden states [1, T, hidden]; the gradient of those of the second row (the last) by the embeddings of all."""
    found: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with using_attention(model, attention) if attention else nullcontext():
            hidden = _decode(model, ids, **(packed_arguments(LENGTHS, ids.device) if attention else {}))
            weights = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
            last = (hidden[:, -LENGTHS[1] :] * weights).sum()
            return hidden.detach(), torch.autograd.grad(last, found[0])[0]
    finally:
        handle.remove()


def packed_arguments(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """What a model takes beside the ids of rows packed into one, apart from `use_cache=False`."""
    ends = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    borders = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    return {"position_ids": positions, **borders, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def _decode(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    hidden: Tensor = model.get_decoder()(input_ids=ids, use_cache=False, **arguments).last_hidden_state
    return hidden


@contextmanager
def _small_windows(model: nn.Module) -> Iterator[None]:
    """Shrinks them for the masks, which read the configuration, and for the layers, which hold their own copy."""
    holders = {id(each): each for m in model.modules() for each in (m, getattr(m, "config", None)) if each is not None}
    found = [(each, name, getattr(each, name, None)) for each in holders.values() for name in WINDOWS]
    sizes = [(each, name, size) for each, name, size in found if isinstance(size, int)]
    for each, name, size in sizes:
        setattr(each, name, min(size, WINDOW))
    try:
        yield
    finally:
        for each, name, size in sizes:
            setattr(each, name, size)
