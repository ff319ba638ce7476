"""Norms and gated activations computed in C++: the fast twins of `pointwise.py`'s functions.

Knows pointwise.cpp and tensors; nothing of modules. Invariant: each function has the arguments and results of its twin,
and for tensors that are not bfloat16 it is its twin.
"""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p
from functools import partial

import torch
from torch import Tensor

from qlora_cli.model.native.build import library
from qlora_cli.model.native.rotary import rotate
from qlora_cli.model.pointwise import Kernels, plain_kernels


def native_kernels() -> Kernels:
    """`NotBuiltError` where there is no library."""
    library()
    plain = plain_kernels()
    gates = {name: (partial(_gate_forward, name, plain), partial(_gate_backward, name, plain)) for name in plain.gates}
    return Kernels((partial(_norm_forward, plain), partial(_norm_backward, plain)), gates, rotate)


def _norm_forward(plain: Kernels, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _known(x):
        found: tuple[Tensor, Tensor] = plain.norm[0](x, weight, eps)
        return found
    y, scale, weight = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32), weight.float()
    _run("norm_forward", y, scale, x, weight, c_float(eps), *x.shape)
    return y, scale


def _norm_backward(plain: Kernels, dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if not _known(dy, x):
        found: Tensor = plain.norm[1](dy, x, weight, scale)
        return found
    dx, weight = torch.empty_like(x), weight.float()
    _run("norm_backward", dx, dy, x, weight, scale, *x.shape)
    return dx


def _gate_forward(name: str, plain: Kernels, gate: Tensor, up: Tensor) -> Tensor:
    if not _known(gate, up):
        found: Tensor = plain.gates[name][0](gate, up)
        return found
    result = torch.empty_like(gate)
    _run(f"{name}_forward", result, gate, up, gate.numel())
    return result


def _gate_backward(name: str, plain: Kernels, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if not _known(dy, gate, up):
        found: tuple[Tensor, Tensor] = plain.gates[name][1](dy, gate, up)
        return found
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _run(f"{name}_backward", dgate, dup, dy, gate, up, gate.numel())
    return dgate, dup


def _known(*tensors: Tensor) -> bool:
    return all(x.dtype is torch.bfloat16 and x.is_contiguous() and x.device.type == "cpu" for x in tensors)


def _run(function: str, *arguments: Tensor | c_float | int) -> None:
    """Tensors are handed over as pointers, which are valid while the caller holds them."""
    passed = (
        c_void_p(x.data_ptr()) if isinstance(x, Tensor) else c_int64(x) if isinstance(x, int) else x for x in arguments
    )
    getattr(library(), function)(*passed)
