"""Which modules the fused norms and gated activations stand in for, and that the rest is left alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_cli.model.pointwise import plain_kernels
from qlora_cli.model.shortcuts import restore, shorten
from tests.conftest import make_llama
from tests.model.test_loss import CONFIGS

PLAIN = plain_kernels()
IDS = torch.arange(24).view(2, 12) + 60
COUNTS = {
    "llama": (5, 2),
    "qwen3": (9, 2),
    "gemma2": (9, 2),
    "gemma3": (13, 2),
    "gemma3-vision": (14, 2),
    "mistral": (5, 2),
    "mixtral": (5, 0),
    "phi3": (5, 0),
    "granite": (5, 2),
    "cohere": (0, 2),
    "phi": (0, 0),
    "gpt2": (0, 0),
    "gpt-neox": (0, 0),
}
"""Norms and gated MLPs of two layers. Phi-3 and Mixtral keep gate and up in one; others normalise around the mean."""


def make(name: str, dtype: torch.dtype) -> Any:
    """A tiny frozen model whose norms have weights of all sizes."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.get_text_config().initializer_range = 0.1
    model = tf.AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def hidden_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    """Of the decoder, by its input."""
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    hidden = model.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)
    return hidden.detach(), torch.autograd.grad((hidden * weights).sum(), embeddings)[0]


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_replaced_computes_the_same_and_all_of_it_can_be_undone(name: str) -> None:
    model = make(name, torch.float32)
    before = hidden_and_gradient(model)
    assert shorten(model, PLAIN) == COUNTS[name]
    assert all(gap(a, b) < 1e-5 for a, b in zip(hidden_and_gradient(model), before, strict=True))
    restore(model)
    assert not [module for module in model.modules() if "forward" in module.__dict__]
    assert all(torch.equal(a, b) for a, b in zip(hidden_and_gradient(model), before, strict=True))


@pytest.mark.parametrize("name", COUNTS)
def test_in_sixteen_bits_it_is_as_close_to_the_truth_as_the_model_itself(name: str) -> None:
    model = make(name, torch.bfloat16)
    own = hidden_and_gradient(model)
    assert shorten(model, PLAIN) == COUNTS[name]
    ours = hidden_and_gradient(model)
    restore(model)
    exact = hidden_and_gradient(model.float())
    for found, usual, true in zip(ours, own, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert gap(found, true) < 1.3 * gap(usual, true)


def norm(kind: type[nn.Module], value: float) -> Any:
    """A frozen norm whose weights are all this value."""
    module: Any = kind(32, 1e-5).requires_grad_(False)
    module.weight.fill_(value)
    return module


@pytest.mark.parametrize("value", [0.0, -0.5, -1.0, 1.0, 0.5])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_equal_weights_confuse_no_weight_with_one_more(kind: type[nn.Module], value: float) -> None:
    model = nn.Sequential(norm(kind, value))
    x = torch.randn(5, 32)
    before = model(x)
    assert shorten(model, PLAIN) == (1, 0)
    torch.testing.assert_close(model(x), before)


class Odd(LlamaRMSNorm):
    """Norms that look like Llama's, one for each thing that is done otherwise."""

    def __init__(self, change: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__(32, 1e-6)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        """Something like x / rms(x)."""
        return self.change(x, self)


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


ODD_NORMS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "epsilon beside the root": lambda x, m: m.weight * x / (mean_square(x).sqrt() + m.variance_epsilon),
    "another epsilon": lambda x, m: m.weight * x * (mean_square(x) + 1e-5).rsqrt(),
    "by the largest": lambda x, m: m.weight * x / (x.abs().amax(-1, keepdim=True) + m.variance_epsilon),
    "around the mean": lambda x, m: m.weight * nn.functional.layer_norm(x, (32,), eps=m.variance_epsilon),
    "no more than four": lambda x, m: (m.weight * x * (mean_square(x) + m.variance_epsilon).rsqrt()).clamp(-2.5, 2.5),
    "with the input": lambda x, m: x + m.weight * x * (mean_square(x) + m.variance_epsilon).rsqrt(),
    "two outputs": lambda x, m: (x, x),  # type: ignore[dict-item,return-value]
    "three dimensions": lambda x, m: x[:, :, 0],
    "never": lambda x, m: m.nothing,
}


@pytest.mark.parametrize("name", ODD_NORMS)
def test_a_norm_that_only_looks_alike_is_left_alone(name: str) -> None:
    assert shorten(nn.Sequential(Odd(ODD_NORMS[name]).requires_grad_(False)), PLAIN) == (0, 0)


def test_the_formula_itself_is_known_whatever_the_module_is_called() -> None:
    usual = Odd(lambda x, m: m.weight * x * (mean_square(x) + m.variance_epsilon).rsqrt()).requires_grad_(False)
    assert shorten(nn.Sequential(usual), PLAIN) == (1, 0)
    assert shorten(nn.Sequential(CohereLayerNorm(32).requires_grad_(False), nn.LayerNorm(32)), PLAIN) == (0, 0)


def test_a_norm_that_learns_keeps_its_gradient() -> None:
    model = nn.Sequential(LlamaRMSNorm(32))
    assert shorten(model, PLAIN) == (0, 0)
    model(torch.randn(4, 32)).square().sum().backward()
    assert model[0].weight.grad is not None


class Mlp(nn.Module):
    """A gated MLP, one for each way of computing it."""

    def __init__(self, compute: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        """What is to be found out."""
        return self.compute(self, x)


def silu(x: Tensor) -> Tensor:
    return nn.functional.silu(x)


def gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


MLPS: dict[str, tuple[int, Callable[[Any, Tensor], Any]]] = {
    "silu": (1, lambda m, x: m.down_proj(silu(m.gate_proj(x)) * m.up_proj(x))),
    "gelu": (1, lambda m, x: m.down_proj(m.up_proj(x) * gelu(m.gate_proj(x)))),
    "exchanged": (0, lambda m, x: m.down_proj(m.gate_proj(x) * silu(m.up_proj(x)))),
    "exact gelu": (0, lambda m, x: m.down_proj(nn.functional.gelu(m.gate_proj(x)) * m.up_proj(x))),
    "relu": (0, lambda m, x: m.down_proj(m.gate_proj(x).relu() * m.up_proj(x))),
    "not gated": (0, lambda m, x: m.down_proj(silu(m.gate_proj(x)) + m.up_proj(x))),
    "clamped": (0, lambda m, x: m.down_proj(silu(m.gate_proj(x).clamp(max=7)) * m.up_proj(x))),
    "clamped up": (0, lambda m, x: m.down_proj(silu(m.gate_proj(x)) * m.up_proj(x).clamp(-100, 100))),
    "scaled": (0, lambda m, x: 0.5 * m.down_proj(silu(m.gate_proj(x)) * m.up_proj(x))),
    "a residual inside": (0, lambda m, x: x + m.down_proj(silu(m.gate_proj(x)) * m.up_proj(x))),
    "drops out": (0, lambda m, x: m.down_proj(nn.functional.dropout(silu(m.gate_proj(x)) * m.up_proj(x), 0.1))),
    "two outputs": (0, lambda m, x: (m.down_proj(silu(m.gate_proj(x)) * m.up_proj(x)), None)),
    "three dimensions": (0, lambda m, x: m.down_proj(silu(m.gate_proj(x))[:, :, :] * m.up_proj(x))),
    "never": (0, lambda m, x: m.nothing),
    "unknown key": (0, lambda m, x: m.__dict__["x"]),
}


@pytest.mark.parametrize("name", MLPS)
def test_an_mlp_is_known_by_what_it_computes(name: str) -> None:
    expected, compute = MLPS[name]
    model = nn.Sequential(Mlp(compute))
    state = torch.get_rng_state()
    assert shorten(model, PLAIN) == (0, expected)
    if name != "drops out":
        assert torch.equal(torch.get_rng_state(), state)
    if expected:
        x = torch.randn(2, 3, 16)
        torch.testing.assert_close(model(x), compute(model[0], x))


def test_finding_out_leaves_the_module_as_it_was() -> None:
    model = Mlp(MLPS["silu"][1])
    layers = dict(model.named_modules())
    shorten(nn.Sequential(model), PLAIN)
    assert dict(model.named_modules()) == layers


def test_a_forward_that_somebody_else_replaced_stays_and_is_not_undone() -> None:
    model = make_llama().requires_grad_(False)
    theirs = partial(type(model.model.norm).forward, model.model.norm)
    model.model.norm.forward = theirs
    assert shorten(model, PLAIN) == (4, 2)
    assert model.model.norm.forward is theirs
    restore(model)
    assert [module for module in model.modules() if "forward" in module.__dict__] == [model.model.norm]


def test_replacing_twice_replaces_once() -> None:
    model = make_llama().requires_grad_(False)
    assert [shorten(model, PLAIN), shorten(model, PLAIN)] == [(5, 2), (0, 0)]
    restore(model)
    assert shorten(model, PLAIN) == (5, 2)
