"""Attention over rows laid end to end, computed in C++: the fast twin of `attention_math.attend`.

Knows attention.cpp and tensors; nothing of models. Invariant: what it does not know raises `ValueError`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_cli.model.attention_math import Rule, flash, torch_knows
from qlora_cli.model.native.build import NotBuiltError, library, run, why_not

BY_AMX = 2
"""What attention_ready says where products are done by AMX."""


def why_no_attention(dtype: torch.dtype, device: torch.device) -> str:
    """Empty where `attend` computes tensors of this type there; else why not. Compiles it if need be."""
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return "for bfloat16 on CPUs only"
    if reason := why_not():
        return reason
    try:
        return "" if library().attention_ready() else "the processor has no bfloat16 products"
    except NotBuiltError as error:
        return str(error)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], rule: Rule, sinks: Tensor | None = None) -> Tensor:
    """[T, H, D] for q [T, H, D], k [T, KV, D], v [T, KV, D] of rows of these `lengths`, which sum to T, in bfloat16."""
    if rule.softcap is not None or sinks is not None or q.shape[2] != v.shape[2] or not rule.scaling > 0:
        raise ValueError("compiled attention knows no soft-capping, sinks or values of a width of their own")
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        raise ValueError("compiled attention knows bfloat16 only")
    assert sum(lengths) == len(q) and q.shape[1] % k.shape[1] == 0
    result: Tensor = _Attend.apply(q, k, v, tuple(lengths), rule)
    return result


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rule: Rule) -> Tensor:
        ctx.how = lengths, rule
        q, k, v = map(_in_line, (q, k, v))
        if library().attention_ready() != BY_AMX and torch_knows(rule, max(lengths)):
            out, logs = flash(q, k, v, lengths, rule.scaling)
        else:
            out, logs = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
            run("attention_forward", _call(ctx.how, logs, q=q, k=k, v=v, out=out))
        ctx.save_for_backward(q, k, v, out, logs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logs = ctx.saved_tensors
        inputs = {"q": q, "k": k, "v": v, "out": out, "dout": _in_line(dout)}
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        run("attention_backward", _call(ctx.how, logs, **inputs, dq=dq, dk=dk, dv=dv))
        return dq, dk, dv, None, None


def _in_line(x: Tensor) -> Tensor:
    """`x`, whose last dimension must lie in one piece."""
    return x if x.stride(2) == 1 else x.contiguous()


class _Place(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("by_token", c_int64), ("by_head", c_int64))


class _Call(ctypes.Structure):
    """As in attention.cpp. It holds pointers: the tensors must outlive it."""

    PLACES = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    SIZES = ("rows", "tokens", "heads", "key_heads", "width", "window")
    _fields_ = (
        *((name, _Place) for name in PLACES),
        ("logs", c_void_p),
        ("borders", c_void_p),
        *((name, c_int64) for name in SIZES),
        ("scaling", c_float),
    )


def _call(how: tuple[tuple[int, ...], Rule], logs: Tensor, **tensors: Tensor) -> _Call:
    lengths, rule = how
    borders = (c_int64 * (len(lengths) + 1))(*accumulate(lengths, initial=0))
    q, k = tensors["q"], tensors["k"]
    sizes = (len(lengths), q.shape[0], q.shape[1], k.shape[1], q.shape[2], rule.window or 0)
    call = _Call(**{name: _Place(x.data_ptr(), x.stride(0), x.stride(1)) for name, x in tensors.items()})
    call.logs, call.scaling = logs.data_ptr(), rule.scaling
    call.borders = ctypes.cast(borders, c_void_p)  # which keeps them
    for name, value in zip(_Call.SIZES, sizes, strict=True):
        setattr(call, name, value)
    return call
