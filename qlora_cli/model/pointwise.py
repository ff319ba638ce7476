"""The parts of a layer between its products: RMSNorm, and the gated activation of its MLP.

Knows tensors and torch.compile; which modules they stand in for is `shortcuts.py`'s. Invariant: results and gradients
are those of the usual formulas in float32, rounded once; compiled or not, the same functions run.

Each is one step of automatic differentiation that saves its inputs alone, where autograd would save every intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_cli.model.remake import remember

Kernel = Callable[..., Any]


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * weight in float32, rounded to x's type; 1 / rms(x)), over the last dimension (Zhang and Sennrich
    2019, arXiv:1910.07467)."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype), scale


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dx, of a frozen weight."""
    wide, inner = x.float() * scale, dy.float() * weight
    return (scale * (inner - wide * (inner * wide).mean(-1, keepdim=True))).to(x.dtype)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    wide, grad = gate.float(), dy.float()
    share = torch.sigmoid(wide)
    silu = wide * share
    return (grad * up.float() * (share + silu * (1 - share))).to(gate.dtype), (grad * silu).to(up.dtype)


_GELU, _CUBE = 0.7978845608028654, 0.044715  # sqrt(2 / pi); Hendrycks and Gimpel 2016, arXiv:1606.08415


def geglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, gelu by its tanh approximation."""
    wide = gate.float()
    bent = torch.tanh(_GELU * (wide + _CUBE * wide.pow(3)))
    return (0.5 * wide * (1 + bent) * up.float()).to(gate.dtype)


def geglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    wide, grad = gate.float(), dy.float()
    bent = torch.tanh(_GELU * (wide + _CUBE * wide.pow(3)))
    slope = 0.5 * (1 + bent) + 0.5 * wide * (1 - bent * bent) * _GELU * (1 + 3 * _CUBE * wide * wide)
    return (grad * up.float() * slope).to(gate.dtype), (grad * 0.5 * wide * (1 + bent)).to(up.dtype)


class Kernels:
    """The functions above, as they stand or compiled."""

    def __init__(self, compiled: bool) -> None:
        def kernel(function: Kernel) -> Kernel:
            return torch.compile(function, dynamic=True) if compiled else function

        self.norm = (kernel(norm_forward), kernel(norm_backward))
        self.gates = {name: (kernel(forward), kernel(backward)) for name, (forward, backward) in GATES.items()}


GATES: dict[str, tuple[Kernel, Kernel]] = {
    "silu": (swiglu_forward, swiglu_backward),
    "gelu_tanh": (geglu_forward, geglu_backward),
}


def rms_norm(kernels: Kernels, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of `x` [..., D] with a frozen `weight` [D]."""
    flat = _flat(x)
    result: Tensor = _RmsNorm.apply(flat, weight, eps, kernels)
    return remember(result.view(x.shape), lambda given: kernels.norm[0](given, weight, eps)[0], flat)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
        y, scale = kernels.norm[0](x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.backward_kernel = kernels.norm[1]
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        return ctx.backward_kernel(dy.contiguous(), x, weight, scale), None, None, None


def gated(kernels: Kernels, activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) * up; `activation` is a key of `GATES`."""
    forward, backward = kernels.gates[activation]
    result: Tensor = _Gated.apply(gate, up, (forward, backward))
    return remember(result, lambda *given: forward(*map(_flat, given)), gate, up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernel: tuple[Kernel, Kernel]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backward_kernel = kernel[1]
        result: Tensor = kernel[0](_flat(gate), _flat(up)).view(gate.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = ctx.backward_kernel(_flat(dy), _flat(gate), _flat(up))
        return dgate.view(gate.shape), dup.view(up.shape), None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
