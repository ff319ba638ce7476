"""The parts of a layer between its products: RMSNorm, and the gated activation of its MLP.

Knows tensors and torch's compiler; which modules they stand in for is `shortcuts.py`'s. Invariant: results and
gradients are those of the usual formulas in float32, rounded once; compiled by torch or not, the same functions run.

Each is one step of automatic differentiation that saves its inputs alone, where autograd would save every intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_cli.model.remake import remember

Kernel = Callable[..., Any]


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * weight in float32, rounded to x's type; 1 / rms(x)), over the last dimension (Zhang and Sennrich
    2019, arXiv:1910.07467)."""
    wide = _wide(x)
    scale = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
    return wide.mul_(scale).mul_(weight).to(x.dtype), scale


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dx, of a frozen weight."""
    wide, inner = _wide(x).mul_(scale), _wide(dy).mul_(weight)
    along = (inner * wide).mean(-1, keepdim=True)
    return inner.addcmul_(wide, along, value=-1).mul_(scale).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """A copy in float32, to be computed in: memory that is new each time costs as much as a pass over it."""
    return x.to(torch.float32, copy=True)


def gate_forward(activation: Kernel, gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) * up (Shazeer 2020, arXiv:2002.05202)."""
    result: Tensor = activation(gate) * up
    return result


def gate_backward(activation: Kernel, backward: Kernel, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    return backward(dy * up, gate), dy * activation(gate)


GATES: dict[str, tuple[Kernel, Kernel]] = {
    "silu": (nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (
        partial(nn.functional.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}
"""Activations, each with its backward pass: (gradient of its result, its input) -> gradient of its input."""


@dataclass(frozen=True)
class Kernels:
    """The functions above, or twins of theirs: each forward and backward. `rotate` is (q, k, cos, sin) -> (q, k) with
    rotary positions, differentiable; None: the model's own."""

    norm: tuple[Kernel, Kernel]
    gates: Mapping[str, tuple[Kernel, Kernel]]
    rotate: Kernel | None = None


def plain_kernels(wrap: Callable[[Kernel], Kernel] = lambda function: function) -> Kernels:
    """The functions above, each handed to `wrap`."""
    gates = {
        name: (wrap(partial(gate_forward, activation)), wrap(partial(gate_backward, activation, backward)))
        for name, (activation, backward) in GATES.items()
    }
    return Kernels((wrap(norm_forward), wrap(norm_backward)), gates)


def compiled_kernels() -> Kernels:
    """The functions above by torch's compiler."""
    return plain_kernels(partial(torch.compile, dynamic=True))


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
