"""Norms and gated activations against autograd of the usual formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_cli.model.pointwise import GATES, Kernels, gated, rms_norm

PLAIN = Kernels(compiled=False)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPS = 1e-3
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "expanded": lambda x: x[:1].expand_as(x),
}
SHAPES = [(6, 48), (2, 5, 48), (2, 3, 4, 16), (1, 48), (0, 48)]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Rows from very small to large."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator) * torch.logspace(-3, 1, max(shape[-2], 1))[: shape[-2], None]
    return rows.to(dtype)


def measured(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradients of the inputs for a random one of the result."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    result = function(*leaves)
    slope = torch.randn(result.shape, generator=torch.Generator().manual_seed(7)).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, slope)]


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def usual_norm(kind: type[nn.Module], weight: Tensor) -> nn.Module:
    """transformers' own, in float64: its float() is undone, so that the formula is exact."""
    module = kind(len(weight), EPS)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_a_norm_and_its_gradient_are_those_of_autograd_in_float32(
    kind: type[nn.Module], dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    x, weight = random(shape, dtype, 0), random((1, shape[-1]), dtype, 1)[0] * 300
    factor = weight if kind is LlamaRMSNorm else 1 + weight.float()
    found = measured(lambda each: rms_norm(PLAIN, LAYOUTS[layout](each), factor, EPS), x)
    wanted = measured(lambda each: usual_norm(kind, weight.float())(LAYOUTS[layout](each)), x.float())
    assert [each.dtype for each in found] == [dtype, dtype]
    assert all(gap(a, b) < TOLERANCES[dtype] for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_a_gated_activation_and_its_gradients_are_those_of_autograd_in_float64(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    gate, up = random(shape, dtype, 0), random(shape, dtype, 1)
    lay = LAYOUTS[layout]
    found = measured(lambda g, u: gated(PLAIN, name, lay(g), lay(u)), gate, up)
    wanted = measured(lambda g, u: ACTIVATIONS[name](lay(g)) * lay(u), gate.double(), up.double())
    assert [each.dtype for each in found] == [dtype] * 3
    assert all(gap(a, b) < TOLERANCES[dtype] for a, b in zip(found, wanted, strict=True))


def test_the_tables_of_activations_agree() -> None:
    assert ACTIVATIONS.keys() == GATES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_and_of_the_largest_numbers_give_finite_gradients(dtype: torch.dtype) -> None:
    largest = torch.finfo(torch.float16).max / 2
    x = torch.tensor([[0.0] * 4, [largest, -largest, 1.0, -1.0]], dtype=dtype)
    weight = torch.ones(4, dtype=dtype)
    for each in measured(lambda x: rms_norm(PLAIN, x, weight, 1e-6) / 1e4, x):
        assert each.isfinite().all()
    for name in GATES:
        for each in measured(lambda g, name=name: gated(PLAIN, name, g, torch.ones_like(g)), x):
            assert each.isfinite().all()


def test_only_inputs_and_one_number_a_row_are_saved() -> None:
    x, up = (torch.randn(6, 48, requires_grad=True) for _ in range(2))
    weight, saved = torch.ones(48), list[tuple[int, ...]]()

    def pack(each: Tensor) -> Tensor:
        saved.append(tuple(each.shape))
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        rms_norm(PLAIN, x, weight, EPS)
        assert sorted(saved) == [(6, 1), (6, 48), (48,)]
        saved.clear()
        for name in GATES:
            gated(PLAIN, name, x, up)
        assert saved == [(6, 48)] * 4


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_results_are_the_same(without: Any) -> None:
    x, up, weight = torch.randn(6, 48, requires_grad=True), torch.randn(6, 48), torch.randn(48)
    with without():
        norm, gate = rms_norm(PLAIN, x, weight, EPS), gated(PLAIN, "silu", x, up)
    assert not norm.requires_grad
    assert not gate.requires_grad
    assert torch.equal(norm, rms_norm(PLAIN, x, weight, EPS))
    assert torch.equal(gate, gated(PLAIN, "silu", x, up))
