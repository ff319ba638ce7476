"""A model made faster for decoding on a CPU, where it multiplies few rows at a time.

Knows 4-bit and LoRA layers and transformers' attention functions. Invariant: stored weights and adapters are only read,
and outside of the context every layer computes as it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_cli.model.lora import LoraLinear
from qlora_cli.model.nf4 import four_bit_layers
from qlora_cli.model.packed import PackedCopy, agrees, available_memory, copied_bytes, fits

MOST_ROWS = 32
"""Beyond this, dequantising once costs less than the kernel, whose cost grows with the rows."""
Forward = Callable[[Tensor], Tensor]
Attention = Callable[..., tuple[Tensor, Any]]


class FastDecoding:
    """Makes a model faster for decoding, while it is on: 4-bit layers multiply few rows with a packed copy of their
    weight, adapters multiply them in float32, and the attention of a single position is a plain product. More rows,
    other types and whatever needs a gradient go the usual way, and so does everything on a CUDA device."""

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        """Makes the packed copies, unless they would take more than half of the memory that is free; they live as long
        as this object."""
        copies = [(layer, PackedCopy(layer)) for layer in _layers_to_copy(model)]
        self.bytes = sum(copy.bytes for _, copy in copies)
        self._packed = [(layer, _packed_forward(layer, copy)) for layer, copy in copies]
        self._model = model
        self._forwards: list[tuple[nn.Module, Forward]] = []

    @classmethod
    def of(cls, model: nn.Module) -> FastDecoding:
        """The one that already lives for this model, or a new one."""
        found = _LIVING.get(id(model))
        if found is None or found._model is not model:
            found = _LIVING[id(model)] = cls(model)
        return found

    def find_adapters(self) -> None:
        """Takes notice of the adapters that are in the model now."""
        adapters = [module for module in self._model.modules() if isinstance(module, LoraLinear)]
        self._forwards = self._packed + [(layer, _lora_forward(layer)) for layer in adapters]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within it, and without gradients, the model computes faster."""
        forwards = self._forwards
        before = [module.__dict__.get("forward") for module, _ in forwards]
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        try:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = _one_query(attention)
            for module, forward in forwards:
                module.__dict__["forward"] = forward
            with torch.no_grad():
                yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
            for (module, _), usual in zip(forwards, before, strict=True):
                _put_back(module, usual)


_LIVING: WeakValueDictionary[int, FastDecoding] = WeakValueDictionary()
"""By the id of the model, which each holds."""


def _layers_to_copy(model: nn.Module) -> list[Any]:
    layers = [layer for layer in four_bit_layers(model).values() if fits(layer)]
    affordable = 2 * sum(map(copied_bytes, layers)) <= available_memory()
    return layers if layers and affordable and agrees(layers[0], PackedCopy(layers[0])) else []


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def _is_small(x: Tensor, columns: int) -> bool:
    here = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return here and 0 < x.numel() <= MOST_ROWS * columns and not torch.is_grad_enabled()


def _packed_forward(layer: Any, copy: PackedCopy) -> Forward:
    usual, columns = layer.forward, layer.in_features

    def forward(x: Tensor) -> Tensor:
        if not _is_small(x, columns):
            return usual(x)
        product = copy.product(x)
        return product if layer.bias is None else product + layer.bias

    return forward


def _lora_forward(layer: LoraLinear) -> Forward:
    """bfloat16 products this small take three times as long as float32 ones."""
    usual, columns = layer.forward, layer.lora_a.shape[1]

    def forward(x: Tensor) -> Tensor:
        if layer.training or not _is_small(x, columns):
            return usual(x)
        down = nn.functional.linear(x.float(), layer.lora_a.float())
        up = nn.functional.linear(down, layer.lora_b.float())
        return torch.add(layer.base(x).float(), up, alpha=layer.scaling).to(x.dtype)

    return forward


def _one_query(usual: Attention) -> Attention:
    """transformers' `sdpa`, but for one position in bfloat16 the plain products of its `eager`: torch's fused kernel
    takes 3 to 20 times as long for a single position."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if query.shape[2] != 1 or not _is_plain(query, attention_mask, kwargs):
            return usual(module, query, key, value, attention_mask, **kwargs)
        (batch, heads, _, size), groups = query.shape, key.shape[1]
        scale = size**-0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        rows = query.reshape(batch * groups, heads // groups, size)
        scores = torch.baddbmm(rows.new_empty(()), rows, key.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
        if attention_mask is not None:
            scores.view(batch, groups, heads // groups, -1).masked_fill_(~attention_mask, -torch.inf)
        return torch.bmm(scores.softmax(-1), value.flatten(0, 1)).view(batch, 1, heads, -1), None

    return attention


def _is_plain(query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether it is no more than softmax(q k^T) v, over the positions of a mask that all heads share."""
    extra = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    shared = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    cheap = query.dtype == torch.bfloat16 and query.device.type == "cpu" and not torch.is_grad_enabled()
    return cheap and shared and not extra and not kwargs.get("dropout")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it no layer drops out; afterwards the model trains again if it did before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
