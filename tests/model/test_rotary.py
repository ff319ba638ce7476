"""Rotary positions in C++ equal the usual formula, and replace a model's own only where that is the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlora_cli.model.native.build import why_not
from qlora_cli.model.native.rotary import rotate
from qlora_cli.model.rotary import replace_rotary, restore_rotary, usual_rotary
from tests.model.test_segments import CONFIGS, SMALL, build

needs_compiler = pytest.mark.skipif(why_not() != "", reason=why_not())
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads first": lambda x: x.contiguous(),
    "every other token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}
COUNTS = {"llama": 2, "qwen3": 2, "gemma2": 2, "gemma3": 2, "mistral": 2, "phi3": 2, "gpt2": 0, "gpt-neox": 2}
COUNTS |= {"gpt-oss": 0}


def example(batch: int, angles: int, tokens: int, width: int) -> list[Tensor]:
    """q, k, cos, sin; the halves of cos and of sin differ."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 3, tokens, width), (batch, 1, tokens, width), (angles, tokens, width), (angles, tokens, width)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def measured(function: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Both results and the gradients of q and k."""
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    results = function(*leaves, cos, sin)
    slopes = [torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(y.dtype) for y in results]
    return [*(y.detach() for y in results), *torch.autograd.grad(results, leaves, slopes)]


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "angles"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize(("tokens", "width"), [(1, 2), (7, 64), (300, 80)])
def test_rotated_queries_and_keys_and_their_gradients_are_those_of_the_formula(
    tokens: int, width: int, batch: int, angles: int, layout: str
) -> None:
    q, k, cos, sin = example(batch, angles, tokens, width)
    found = measured(lambda a, b, *rest: rotate(LAYOUTS[layout](a), LAYOUTS[layout](b), *rest), q, k, cos, sin)
    exact = [x.double() for x in (q, k, cos, sin)]
    wanted = measured(usual_rotary, *exact)
    assert torch.equal(usual_rotary(*exact)[0], apply_rotary_pos_emb(*exact)[0])
    for ours, true in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - true).norm() / true.norm()) < 4e-3


@needs_compiler
def test_what_it_does_not_know_is_left_to_the_models_own() -> None:
    q, k, cos, sin = example(1, 1, 5, 8)
    assert rotate(q, k, cos, sin) is not None
    assert rotate(q.float(), k, cos, sin) is None
    assert rotate(q, k, cos[..., :4], sin[..., :4]) is None  # some of the width alone
    assert rotate(q, k, cos[:, :3], sin[:, :3]) is None
    assert rotate(q[..., :7], k[..., :7], cos[..., :7], sin[..., :7]) is None
    assert rotate(q.transpose(2, 3), k, cos, sin) is None
    assert rotate(q, k, cos.clone().requires_grad_(), sin) is None


@needs_compiler
@pytest.mark.parametrize("name", CONFIGS)
def test_models_compute_the_same_and_restored_to_the_bit(name: str) -> None:
    model = build(name, torch.bfloat16)
    ids = torch.randint(128, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = model(ids, use_cache=False).logits
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        calls.append(len(given))
        return rotate(*given)

    assert replace_rotary(model, counted) == COUNTS[name]
    found = model(ids, use_cache=False).logits
    assert len(calls) == COUNTS[name]
    assert float((found.double() - wanted.double()).norm() / wanted.double().norm()) < 3e-2
    assert replace_rotary(model, counted) == 0
    restore_rotary(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(model(ids, use_cache=False).logits, wanted)


def test_another_model_of_the_same_class_stays_as_it_is() -> None:
    changed, other = (tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)) for _ in range(2))
    ids, calls = torch.zeros(1, 4, dtype=torch.long), list[int]()

    def nothing(*given: Any) -> None:
        calls.append(len(given))

    replace_rotary(changed, nothing)
    other(ids)
    assert calls == []
    changed(ids)
    assert calls == [4, 4]


def test_a_function_of_that_name_that_is_another_formula_stays() -> None:
    names: dict[str, Any] = {}
    exec(
        "def apply_rotary_pos_emb(q, k, cos, sin):\n    return q * cos.unsqueeze(1), k * sin.unsqueeze(1)\n"
        "def forward(self, q):\n    return apply_rotary_pos_emb(q, q, q[:, 0], q[:, 0])\n",
        names,
    )
    module = type("Other", (nn.Module,), {"forward": names["forward"]})()
    assert replace_rotary(module, rotate) == 0
    names["apply_rotary_pos_emb"] = usual_rotary
    assert replace_rotary(module, rotate) == 1
