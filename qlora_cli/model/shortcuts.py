"""Puts the functions of `pointwise.py` in the place of a model's own norms and gated MLPs.

Knows transformers' modules by what they have and by what they compute, not by their names. Invariant: a module is
replaced only where its formula, in float32, is the same as its own on a probe.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.model.pointwise import GATES, Kernels, gated, rms_norm

PROBE_ROWS = 8


DECLINED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What modules raise that take something else than one tensor, or of other shapes."""


def shorten(model: nn.Module, kernels: Kernels) -> tuple[int, int]:
    """Replaces what can be replaced; returns how many norms and how many MLPs. A module whose forward somebody else
    has replaced already stays."""
    free = [module for module in model.modules() if "forward" not in module.__dict__]
    norms = {module: found for module in free if (found := _norm_of(module)) is not None}
    mlps = {module: name for module in free if (name := gate_of(module)) is not None}
    for module, (weight, eps) in norms.items():
        module.forward = partial(_norm, kernels, weight, eps)
    for module, name in mlps.items():
        module.forward = partial(_mlp, kernels, name, module)
    return len(norms), len(mlps)


def restore(model: nn.Module) -> None:
    """Undoes `shorten`."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func in (_norm, _mlp):
            del module.forward


def _norm(kernels: Kernels, weight: Tensor, eps: float, x: Tensor) -> Tensor:
    return rms_norm(kernels, x, weight, eps)


def _mlp(kernels: Kernels, activation: str, module: Any, x: Tensor) -> Tensor:
    result: Tensor = module.down_proj(gated(kernels, activation, module.gate_proj(x), module.up_proj(x)))
    return result


def _eps(module: Any) -> float | None:
    return next((float(getattr(module, name)) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def _norm_of(module: nn.Module) -> tuple[Tensor, float] | None:
    """(the factor by which a module that is an RMSNorm multiplies: its weight, or as in Gemma one more; its epsilon);
    None for others. A float32 copy of the module decides, on rows so small that epsilon tells, and on large ones."""
    weights = dict(module.named_parameters())
    eps = _eps(module)
    if list(weights) != ["weight"] or weights["weight"].ndim != 1 or eps is None or any(module.children()):
        return None
    weight = weights["weight"].detach()
    if weights["weight"].requires_grad:
        return None
    x = torch.randn(PROBE_ROWS, len(weight), generator=torch.Generator().manual_seed(0))
    x = (x * torch.logspace(-3, 3, PROBE_ROWS)[:, None]).to(weight.device)
    plain = copy.deepcopy(module).float()
    try:
        expected = plain(x)
    except DECLINED:
        return None
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    for factor in (weight, 1 + weight.float()):
        if isinstance(expected, Tensor) and torch.allclose(expected, normed * factor, rtol=1e-5, atol=1e-6):
            return factor, eps
    return None


def gate_of(module: Any) -> str | None:
    """The activation of a module that computes down(activation(gate(x)) * up(x)); None for others. A copy whose three
    layers are the identity decides."""
    layers = ("gate_proj", "up_proj", "down_proj")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in layers):
        return None
    probe = copy.copy(module)
    probe._modules = {**module._modules, "gate_proj": nn.Identity(), "up_proj": _Plus(), "down_proj": nn.Identity()}
    x = torch.cat([torch.linspace(-4, 4, 32), torch.linspace(-300, 300, 32)]).view(PROBE_ROWS, -1)
    try:
        found = probe(x)
    except DECLINED:
        return None
    for name, (activation, _) in GATES.items():
        if isinstance(found, Tensor) and torch.allclose(found, activation(x) * (x + 1), rtol=1e-5, atol=1e-6):
            return name
    return None


class _Plus(nn.Module):
    """Unlike the identity of the gate, so that gate and up cannot be exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1
