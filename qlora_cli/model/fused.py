"""Adapted linear layers that read the same input, as one step of automatic differentiation.

Knows LoRA layers and tensors. Invariant: outputs and gradients are those of `LoraLinear.plain`; weights are
dequantised when they are needed and never saved.

For layers i with weights W_i, biases b_i and adapters A_i, B_i of scaling s_i:

    h_i = dropout_i(x) A_i^T        y_i = x W_i^T + b_i + s_i h_i B_i^T
    dh_i = s_i dy_i B_i             dx = sum_i dy_i W_i + dropout_i'(dh_i A_i)
    dA_i = dh_i^T dropout_i(x)      dB_i = s_i dy_i^T h_i

There are two functions, `_Down` for h and `_Project` for y; the products with W_i are those of `Products`. All that the
backward pass needs is saved by the first, so that activation checkpointing, which recomputes up to the last saved
tensor, leaves out a block's last product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_cli.model.lora import LoraLinear, computes_in, dropped, frozen_weight, keep_mask
from qlora_cli.model.nf4 import Desk
from qlora_cli.model.remake import origin_of

DESK = Desk()
"""Of all groups: each product is done with its weight before the next is written out."""


Pairs = Sequence[tuple[LoraLinear, Tensor]]
"""Layers and the gradients of their outputs."""


@dataclass(frozen=True)
class Products:
    """How y and dx are computed: `forward(layer, x, h)` is y_i. `backward(pairs, dhidden, downs)` is dx, with
    dhidden [T, sum of ranks] times all A, `downs`, unless these are None."""

    forward: Callable[[LoraLinear, Tensor, Tensor], Tensor]
    backward: Callable[[Pairs, Tensor | None, Tensor | None], Tensor]


def plain_forward(layer: LoraLinear, x: Tensor, h: Tensor) -> Tensor:
    """See `Products`."""
    y = torch.nn.functional.linear(x, frozen_weight(layer.base, x.dtype, DESK), bias_of(layer, x.dtype))
    return y.addmm_(h, layer.lora_b.detach().to(x.dtype).t(), alpha=layer.scaling)


def plain_backward(pairs: Pairs, dhidden: Tensor | None, downs: Tensor | None) -> Tensor:
    """See `Products`."""
    (layer, dy), *others = pairs
    dx = dy @ frozen_weight(layer.base, dy.dtype, DESK)
    for layer, dy in others:
        dx.addmm_(dy, frozen_weight(layer.base, dy.dtype, DESK))
    return dx if dhidden is None or downs is None else dx.addmm_(dhidden, downs)


def bias_of(layer: LoraLinear, dtype: torch.dtype) -> Tensor | None:
    """[out]"""
    bias: Any = layer.base.bias
    return None if bias is None else bias.detach().to(dtype)


PLAIN = Products(plain_forward, plain_backward)


class Ahead:
    """What the group of a model that was called last computed for layers that are still to be called. There is one for
    all groups, so that what a pass leaves behind that breaks off, with all that its backward pass would have needed, is
    dropped as soon as another begins."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.outputs: dict[LoraLinear, Tensor] = {}

    def take(self, layer: LoraLinear, x: Tensor) -> Tensor | None:
        """The output of `layer` for `x` itself, if it is here."""
        found = self.outputs.pop(layer, None) if self.input is x else None
        if not self.outputs:
            self.input = None
        return found


class Group:
    """LoRA layers that are called one after the other with the same input; the first call computes all of them."""

    def __init__(self, layers: Sequence[LoraLinear], ahead: Ahead, products: Products) -> None:
        self.layers = tuple(layers)
        self._ahead, self._products = ahead, products

    def __call__(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] of `layer`, which is one of the group's."""
        if torch.is_autocast_enabled(x.device.type):
            return layer.plain(x)
        if layer is not self.layers[0]:
            found = self._ahead.take(layer, x)
            return project((layer,), x, self._products)[0] if found is None else found
        self._ahead.input, self._ahead.outputs = None, {}
        first, *others = project(self.layers, x, self._products)
        if others:
            self._ahead.input, self._ahead.outputs = x, dict(zip(self.layers[1:], others, strict=True))
        return first


def project(layers: Sequence[LoraLinear], x: Tensor, products: Products = PLAIN) -> tuple[Tensor, ...]:
    """The outputs [..., out_i] of `layers` for their common input [..., in]."""
    origin = origin_of(x)
    call = _Call(tuple(layers), origin.make, products)
    flat = x.reshape(-1, x.shape[-1])
    factors = [factor for layer in layers for factor in (layer.lora_a, layer.lora_b)]
    hidden = _Down.apply(call, flat, *factors, *origin.sources)
    found: tuple[Tensor, ...] = _Project.apply(call, flat, hidden)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in found)


class _Call:
    """What the two functions of one call share: the layers, how their input is made of what is saved for it, and on the
    way back the gradients of their outputs."""

    def __init__(self, layers: tuple[LoraLinear, ...], make: Callable[..., Tensor], products: Products) -> None:
        self.layers, self.make, self.products = layers, make, products
        self.ranks = [layer.lora_a.shape[0] for layer in layers]
        self.shares = [layer.dropout.p if layer.training else 0.0 for layer in layers]
        self.dys: tuple[Tensor, ...] = ()

    @property
    def drops(self) -> bool:
        """Whether dropout is at work in any of the layers."""
        return any(self.shares)

    def downs(self, dtype: torch.dtype) -> Tensor:
        """[sum of ranks, in] all A."""
        factors = [layer.lora_a.detach() for layer in self.layers]
        return (factors[0] if len(factors) == 1 else torch.cat(factors)).to(dtype)

    def split(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Each layer's columns of something [T, sum of ranks]."""
        return hidden.split(self.ranks, dim=1)


class _Down(torch.autograd.Function):
    """h [T, sum of ranks] from x [T, in]. `others` are all A and B, for autograd to know, and x's sources, which are
    saved in its place."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *others: Tensor) -> Tensor:
        ctx.call, sources = call, others[2 * len(call.layers) :]
        ctx.sources = len(sources)
        if not call.drops:
            hidden = x @ call.downs(x.dtype).t()
            ctx.save_for_backward(*sources, hidden)
            return hidden
        masks = [keep_mask(x, share) if share else None for share in call.shares]
        parts = zip(masks, call.shares, call.layers, strict=True)
        hidden = torch.cat(
            [_dropped(x, mask, share) @ layer.lora_a.detach().to(x.dtype).t() for mask, share, layer in parts], dim=1
        )
        ctx.save_for_backward(*sources, hidden, *masks)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        saved = ctx.saved_tensors
        x, (hidden, *masks) = call.make(*saved[: ctx.sources]), saved[ctx.sources :]
        ups = _up_gradients(call, hidden)
        if call.drops:
            dx, downs = _dropped_gradients(call, x, masks, dhidden)
        else:
            dx, downs = None, (dhidden.t() @ x).split(call.ranks)
        call.dys = ()
        factors = [gradient for pair in zip(downs, ups, strict=True) for gradient in pair]
        types = [p.dtype for layer in call.layers for p in (layer.lora_a, layer.lora_b)]
        found = (gradient.to(dtype) for gradient, dtype in zip(factors, types, strict=True))
        return None, dx, *found, *(None for _ in range(ctx.sources))


def _up_gradients(call: _Call, hidden: Tensor) -> list[Tensor]:
    parts = zip(call.layers, call.dys, call.split(hidden), strict=True)
    return [(dy.t() @ h).mul_(layer.scaling) for layer, dy, h in parts]


def _dropped_gradients(
    call: _Call, x: Tensor, masks: Sequence[Tensor | None], dhidden: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(dx through the adapters, dA of each) where every layer saw an input with dropout of its own."""
    dx, downs = torch.zeros_like(x), []
    for layer, mask, share, dh in zip(call.layers, masks, call.shares, call.split(dhidden), strict=True):
        downs.append(dh.t() @ _dropped(x, mask, share))
        dx += _dropped(dh @ layer.lora_a.detach().to(x.dtype), mask, share)
    return dx, downs


def _dropped(x: Tensor, mask: Tensor | None, share: float) -> Tensor:
    return x if mask is None else dropped(x, mask, share)


class _Project(torch.autograd.Function):
    """y_i [T, out_i] from x [T, in] and h [T, sum of ranks]; saves nothing."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        pairs = zip(call.layers, call.split(hidden), strict=True)
        return tuple(call.products.forward(layer, x, h) for layer, h in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        call.dys = dys
        pairs = list(zip(call.layers, dys, strict=True))
        ups = [(dy @ layer.lora_b.detach().to(dy.dtype)).mul_(layer.scaling) for layer, dy in pairs]
        dhidden = ups[0] if len(ups) == 1 else torch.cat(ups, dim=1)
        if not ctx.needs_input_grad[1]:
            return None, None, dhidden
        through = (None, None) if call.drops else (dhidden, call.downs(dhidden.dtype))
        return None, call.products.backward(pairs, *through), dhidden


def fuse(model: Any, layers: Sequence[LoraLinear], inputs: Mapping[str, Any], products: Products = PLAIN) -> int:
    """Lets `layers` of `model` compute in groups, by `products`: those that, when it computes `inputs`, are called in a
    row with the very same tensor. Returns how many layers do; the others (called twice, or given another type than
    their base computes in) stay as they are."""
    calls = _record_calls(model, layers, inputs)
    counts = Counter(layer for layer, _ in calls)
    fusible = [(layer, x) for layer, x in calls if counts[layer] == 1 and computes_in(layer.base) in (None, x.dtype)]
    ahead = Ahead()
    for _, same in groupby(fusible, key=lambda call: id(call[1])):
        members = [layer for layer, _ in same]
        group = Group(members, ahead, products)
        for layer in members:
            layer.group = group
    return len(fusible)


def unfuse(layers: Sequence[LoraLinear]) -> None:
    """Undoes `fuse`."""
    for layer in layers:
        layer.group = None


_Seen = tuple[LoraLinear, Tensor]
"""A layer that was called, and its input."""


@torch.no_grad()
def _record_calls(model: Any, layers: Sequence[LoraLinear], inputs: Mapping[str, Any]) -> list[_Seen]:
    """Every call in order. The inputs are kept meanwhile, so that no two share an id."""
    calls: list[_Seen] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, args: calls.append((layer, args[0]))) for layer in layers]
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
