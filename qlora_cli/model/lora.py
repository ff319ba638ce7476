"""LoRA: a low-rank delta beside any linear layer (Hu et al. 2021, arXiv:2106.09685).

Knows layers and numbers; nothing of files. Invariant: a freshly attached adapter changes nothing (B is 0), the base
stays frozen, and `delta()` is exactly what `forward` adds.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import RecipeError
from qlora_cli.model.nf4 import Desk, is_four_bit
from qlora_cli.model.tokens import rows_of
from qlora_cli.recipe.schema import LoraSection


class LoraLinear(nn.Module):
    """`base(x) + scaling * B A dropout(x)`, for a 4-bit or plain linear layer.

    x is [..., in]; `lora_a` [r, in], `lora_b` [out, r]. The adapter is stored in its own type and multiplied in x's.
    """

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        out_features, in_features = linear_shape(base)
        device = next(base.parameters()).device
        self.base = base
        self.group: Callable[[LoraLinear, Tensor], Tensor] | None = None
        """Computes this layer together with others (see `fused.py`); None: `plain`."""
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.lora_a = nn.Parameter(torch.zeros(r, in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(out_features, r, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.plain(x) if self.group is None else self.group(self, x)

    def plain(self, x: Tensor) -> Tensor:
        """`forward` by autograd alone."""
        share = self.dropout.p
        seen = dropped(x, keep_mask(x, share), share) if share > 0 and self.training else x
        down = nn.functional.linear(seen, self.lora_a.to(x.dtype))
        up = nn.functional.linear(down, self.lora_b.to(x.dtype))
        return torch.add(self.base(x), up, alpha=self.scaling)

    def delta(self) -> Tensor:
        """[out, in] what is added to the base's weight, in float32."""
        return (self.lora_b.detach().float() @ self.lora_a.detach().float()) * self.scaling

    @torch.no_grad()
    def initialize(self, seed: int, name: str) -> None:
        """A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5, as the reference implementation), B zero. Every layer
        has a generator of its own, so the values do not depend on which other layers there are."""
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        bound = 1 / math.sqrt(self.lora_a.shape[1])
        values = torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator)
        self.lora_a.copy_(values)
        self.lora_b.zero_()


def keep_mask(x: Tensor, share: float) -> Tensor:
    """Bool like `x`: True where dropout of this share keeps a value."""
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - share)


def dropped(x: Tensor, kept: Tensor, share: float) -> Tensor:
    """`x` with dropout: what is kept, scaled so that the expectation stays."""
    return torch.where(kept, x * (1 / (1 - share)), 0)


def frozen_weight(base: nn.Module, dtype: torch.dtype, desk: Desk) -> Tensor:
    """[out, in] a linear layer's weight in `dtype`, dequantised on `desk` where it is stored in 4 bits."""
    if is_four_bit(base):
        return desk.weight(base).to(dtype)
    weight: Any = base.weight
    return (weight.t() if isinstance(base, Conv1D) else weight).detach().to(dtype)


def computes_in(base: Any) -> torch.dtype | None:
    """The type into which a 4-bit layer turns its input; None for a layer that takes it as it is."""
    return base.compute_dtype if is_four_bit(base) else None


def scaling_of(lora: LoraSection) -> float:
    """alpha / r, or alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732)."""
    return lora.alpha / (math.sqrt(lora.r) if lora.rslora else lora.r)


def linear_shape(layer: Any) -> tuple[int, int]:
    """(out, in) features of a linear layer; GPT-2's Conv1D stores its weight transposed."""
    if isinstance(layer, Conv1D):
        in_features, out_features = layer.weight.shape
        return out_features, in_features
    return layer.out_features, layer.in_features


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Linear layers of the text decoder by full name. Head, embeddings and a vision tower lie outside of it."""
    inside = {id(module) for module in model.get_decoder().modules()}
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside and module is not head
    }


def target_layers(model: Any, targets: str | tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers that `lora.targets` selects: at least one, and at least one for every name given."""
    layers = linear_layers(model)
    if targets == "all-linear":
        return layers
    if isinstance(targets, str):
        return _matching(layers, targets)
    chosen = {name for target in targets for name in _named(layers, target)}
    return {name: layer for name, layer in layers.items() if name in chosen}


def _matching(layers: Mapping[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    try:
        found = {name: layer for name, layer in layers.items() if re.fullmatch(pattern, name)}
    except re.error as error:
        raise RecipeError(f"lora.targets is not a regular expression: {error} (got {pattern!r})") from error
    return found or _no_match(layers, pattern)


def _named(layers: Mapping[str, nn.Module], target: str) -> list[str]:
    return [n for n in layers if n == target or n.endswith(f".{target}")] or list(_no_match(layers, target))


def _no_match(layers: Mapping[str, nn.Module], target: str) -> dict[str, nn.Module]:
    short = sorted({name.rsplit(".", 1)[-1] for name in layers})
    near = difflib.get_close_matches(target, short, n=1)
    raise RecipeError(
        f"lora.targets: {target!r} matches no linear layer of this model",
        why=f"its linear layers are {', '.join(short)} (e.g. {next(iter(layers), 'none')})",
        fix=f"did you mean {near[0]}? or use all-linear" if near else "use all-linear, or names from that list",
    )


def stored_in(lora: LoraSection, compute_dtype: torch.dtype) -> torch.dtype:
    """The type that trained values are kept in."""
    return torch.float32 if lora.dtype == "float32" else compute_dtype


def attach(model: Any, lora: LoraSection, compute_dtype: torch.dtype, seed: int) -> dict[str, LoraLinear]:
    """Freezes the model and puts an adapter beside every target layer; returns them by the layer's full name."""
    model.requires_grad_(False)
    dtype = stored_in(lora, compute_dtype)
    adapters = {}
    for name, layer in target_layers(model, lora.targets).items():
        adapters[name] = LoraLinear(layer, lora.r, scaling_of(lora), lora.dropout, dtype)
        adapters[name].initialize(seed, name)
        model.set_submodule(name, adapters[name])
    return adapters


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Within it, the model computes as its base does; one with new tokens, with the mean of its rows for them."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    scalings, rows = [layer.scaling for layer in layers], rows_of(model)
    for layer in layers:
        layer.scaling = 0.0
    if rows is not None:
        rows.active = False
    try:
        yield
    finally:
        if rows is not None:
            rows.active = True
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling = scaling


def adapter_parameters(layers: Mapping[str, nn.Module], r: int) -> int:
    """Trainable parameters of adapters of rank `r` on these layers."""
    return sum(r * sum(linear_shape(layer)) for layer in layers.values())
