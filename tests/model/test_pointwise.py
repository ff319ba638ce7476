"""Norms and gated activations against autograd of the usual formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_cli.model.native.build import why_not
from qlora_cli.model.native.pointwise import native_kernels
from qlora_cli.model.pointwise import GATES, Kernels, compiled_kernels, gated, plain_kernels, rms_norm

PLAIN = plain_kernels()
KERNELS: dict[str, Callable[[], Kernels]] = {"plain": lambda: PLAIN} | ({} if why_not() else {"native": native_kernels})
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


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_a_norm_and_its_gradient_are_those_of_autograd_in_float32(
    kind: type[nn.Module], dtype: torch.dtype, shape: tuple[int, ...], layout: str, kernels: str
) -> None:
    x, weight = random(shape, dtype, 0), random((1, shape[-1]), dtype, 1)[0] * 300
    factor = weight if kind is LlamaRMSNorm else 1 + weight.float()
    found = measured(lambda each: rms_norm(KERNELS[kernels](), LAYOUTS[layout](each), factor, EPS), x)
    wanted = measured(lambda each: usual_norm(kind, weight.float())(LAYOUTS[layout](each)), x.float())
    assert [each.dtype for each in found] == [dtype, dtype]
    assert all(gap(a, b) < TOLERANCES[dtype] for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_a_gated_activation_and_its_gradients_are_those_of_autograd_in_float64(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str, kernels: str
) -> None:
    gate, up = random(shape, dtype, 0), random(shape, dtype, 1)
    lay = LAYOUTS[layout]
    found = measured(lambda g, u: gated(KERNELS[kernels](), name, lay(g), lay(u)), gate, up)
    wanted = measured(lambda g, u: ACTIVATIONS[name](lay(g)) * lay(u), gate.double(), up.double())
    assert [each.dtype for each in found] == [dtype] * 3
    assert all(gap(a, b) < TOLERANCES[dtype] for a, b in zip(found, wanted, strict=True))


def test_the_tables_of_activations_agree() -> None:
    assert ACTIVATIONS.keys() == GATES.keys()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_and_of_the_largest_numbers_give_finite_gradients(dtype: torch.dtype, kernels: str) -> None:
    largest = torch.finfo(torch.float16).max / 2
    x = torch.tensor([[0.0] * 4, [largest, -largest, 1.0, -1.0]], dtype=dtype)
    weight = torch.ones(4, dtype=dtype)
    for each in measured(lambda x: rms_norm(KERNELS[kernels](), x, weight, 1e-6) / 1e4, x):
        assert each.isfinite().all()
    for name in GATES:
        for each in measured(lambda g, name=name: gated(KERNELS[kernels](), name, g, torch.ones_like(g)), x):
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


@pytest.mark.skipif(why_not() != "", reason=why_not())
@pytest.mark.parametrize("count", [2, 31, 20_000, 70_001])
def test_what_is_compiled_is_rounded_once_at_every_length(count: int) -> None:
    """Short or long, by one thread or several, and what vectors leave over; with a number that is none."""
    x, up = (random((2, count), torch.bfloat16, seed)[1] for seed in range(2))
    x[0], native, weight = float("nan"), native_kernels(), torch.linspace(0.5, 2, count)
    for name, activation in ACTIVATIONS.items():
        found, wanted = gated(native, name, x, up), activation(x.double()) * up.double()
        assert found[0].isnan()
        assert ((found - wanted)[1:].abs() <= wanted[1:].abs() / 250 + 1e-9).all()
    assert rms_norm(native, x[None], weight, EPS).isnan().all()
    scale = torch.rsqrt(x[1:].double().square().mean() + EPS)
    wanted = x[1:].double() * scale * weight[1:].double()
    assert ((rms_norm(native, x[None, 1:], weight[1:], EPS)[0] - wanted).abs() <= wanted.abs() / 250).all()


@pytest.mark.skipif(why_not() != "", reason=why_not())
def test_by_torchs_compiler_the_results_are_the_same_and_one_kernel_serves_all_shapes() -> None:
    with torch._inductor.config.patch({"force_disable_caches": True}):
        compiled = compiled_kernels()
        weight, results = torch.linspace(0.5, 2, 48), list[list[Tensor]]()
        for shape in [(6, 48), (9, 48), (5, 48)]:
            x, up = random(shape, torch.float32, 0), random(shape, torch.float32, 1)
            with torch.compiler.set_stance("fail_on_recompile" if len(results) > 2 else "default"):
                for kernels in (PLAIN, compiled):
                    found = measured(lambda a, k=kernels: rms_norm(k, a, weight, EPS), x)
                    results.append(found + measured(lambda a, b, k=kernels: gated(k, "silu", a, b), x, up))
    pairs = [
        pair
        for plain, other in zip(results[::2], results[1::2], strict=True)
        for pair in zip(plain, other, strict=True)
    ]
    assert len(pairs) == 15
    assert max(gap(a, b) for a, b in pairs) < 1e-5
