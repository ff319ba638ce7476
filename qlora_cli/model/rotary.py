"""Puts another function in the place of the one by which a model's attention gives queries and keys their positions.

Knows transformers' attention modules by that function's name and by what it computes. Invariant: only the modules of
the given model change, and only where the function is, in float32 on a probe, the usual formula.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.model.shortcuts import DECLINED

NAME = "apply_rotary_pos_emb"
MARK = "rotates_by_another"

Pair = tuple[Tensor, Tensor]


def replace_rotary(model: nn.Module, rotate: Callable[..., Pair | None]) -> int:
    """How many modules now compute by `rotate`(q, k, cos, sin), and as before where that returns None. A module whose
    forward somebody else has replaced already stays."""
    count = 0
    for module in model.modules():
        forward = type(module).forward
        if (
            "forward" in module.__dict__
            or not isinstance(forward, FunctionType)
            or NAME not in forward.__code__.co_names
        ):
            continue
        own = forward.__globals__.get(NAME)
        if own is not None and _is_usual(own):
            module.forward = MethodType(_with(forward, partial(_rotated, own, rotate)), module)
            count += 1
    return count


def restore_rotary(model: nn.Module) -> None:
    """Undoes `replace_rotary`."""
    for module in model.modules():
        if hasattr(getattr(module.__dict__.get("forward"), "__func__", None), MARK):
            del module.forward


def usual_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """See `native.rotary.rotate`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _rotated(own: Callable[..., Pair], rotate: Callable[..., Pair | None], *given: Any, **options: Any) -> Pair:
    found = rotate(*given) if len(given) == 4 and not options else None
    return own(*given, **options) if found is None else found


def _with(forward: FunctionType, function: Callable[..., Pair]) -> FunctionType:
    """`forward` with `function` under its name for it."""
    names = {**forward.__globals__, NAME: function}
    twin = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    twin.__kwdefaults__ = forward.__kwdefaults__
    setattr(twin, MARK, True)
    return twin


def _is_usual(own: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 3, 5, 8), (1, 2, 5, 8), (1, 5, 8), (1, 5, 8))
    probe = [torch.randn(shape, generator=generator) for shape in shapes]
    try:
        pairs = list(zip(own(*probe), usual_rotary(*probe), strict=True))
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    except DECLINED:
        return False
