"""Rotary positions computed in C++, for the function that models call for them.

Knows pointwise.cpp and tensors; nothing of models. Invariant: what it does not know is `None`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_cli.model.native.build import library


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """q [B, H, T, D] and k [B, KV, T, D] times cos, plus their halves exchanged, the first one negated, times sin
    [B or 1, T, D] (Su et al. 2021, arXiv:2104.09864, in the layout of GPT-NeoX). bfloat16 on a CPU."""
    tensors = (q, k, cos, sin)
    if any(x.dtype is not torch.bfloat16 or x.device.type != "cpu" or x.stride(-1) != 1 for x in tensors):
        return None
    if cos.requires_grad or cos.stride() != sin.stride() or not _fit(q, cos) or not _fit(k, cos):
        return None
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


def _fit(x: Tensor, angles: Tensor) -> bool:
    if x.ndim != 4 or angles.ndim != 3 or x.shape[3] % 2:
        return False
    return angles.shape[1:] == x.shape[2:] and angles.shape[0] in (1, x.shape[0])


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy = dy if dy.stride(3) == 1 else dy.contiguous()
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, back=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    result = torch.empty_like(x)
    places = (result.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr())
    angles = (0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1))
    call = _Rotation(*places, *result.stride()[:3], *x.stride()[:3], *angles, *x.shape, back)
    library().rotate(ctypes.byref(call))
    return result


class _Rotation(ctypes.Structure):
    """As in pointwise.cpp."""

    PLACES = ("to", "from", "cosine", "sine")
    STRIDES = ("to_batch", "to_head", "to_token", "from_batch", "from_head", "from_token", "angle_batch", "angle_token")
    SIZES = ("batch", "heads", "tokens", "width", "back")
    _fields_ = (
        *((name, c_void_p) for name in PLACES),
        *((name, c_int64) for name in STRIDES),
        *((name, c_int64) for name in SIZES),
    )
