"""LoRA layers against plain autograd over the dequantised weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from qlora_cli.errors import RecipeError
from qlora_cli.model.base import load_base
from qlora_cli.model.folder import find_base
from qlora_cli.model.lora import LoraLinear, adapter_parameters, attach, scaling_of, target_layers
from qlora_cli.model.loss import loss_sum
from qlora_cli.model.nf4 import dequantize
from qlora_cli.recipe.schema import LoraSection, ModelSection, QuantizationSection
from tests.conftest import make_llama

IDS = torch.arange(24).view(3, 8) + 60
ATTENTION = torch.ones_like(IDS)
TARGETS = torch.zeros_like(IDS, dtype=torch.bool)
TARGETS[0, 2:5] = TARGETS[1, 6] = TARGETS[2, 1:3] = True


def load(base: Path, dtype: torch.dtype = torch.float32, kind: str = "nf4") -> Any:
    """The tiny base."""
    section = QuantizationSection.model_validate({"type": kind})
    return load_base(find_base(str(base), None), ModelSection(base=str(base)), section, dtype, torch.device("cpu"))


def adapted(base: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> tuple[Any, dict[str, LoraLinear]]:
    """The tiny base with adapters whose B is not zero."""
    model = load(base, dtype)
    layers = attach(model, LoraSection(**({"r": 4, "alpha": 8} | lora)), dtype, seed=3)
    torch.manual_seed(5)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_b, std=0.05)
    return model, layers


def loss_of(model: Any) -> torch.Tensor:
    """Summed loss at the targets."""
    return loss_sum(model, IDS, ATTENTION, TARGETS, torch.roll(IDS, -1, 1)[TARGETS])


def twin(base: Path, layers: dict[str, LoraLinear]) -> tuple[Any, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The slow twin: a float32 Llama whose weights are W + scaling B A, computed by autograd from A and B."""
    leaves = {
        name: (layer.lora_a.detach().float().requires_grad_(), layer.lora_b.detach().float().requires_grad_())
        for name, layer in layers.items()
    }
    weights = {
        f"{name}.weight": dequantize(layer.base).float() + layer.scaling * leaves[name][1] @ leaves[name][0]
        for name, layer in layers.items()
    }
    plain = make_llama()
    return lambda **kw: torch.func.functional_call(plain, weights, kwargs=kw), leaves


def test_a_fresh_adapter_changes_no_logit(base: Path) -> None:
    model = load(base)
    before = model(IDS).logits
    attach(model, LoraSection(r=4), torch.float32, seed=0)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rslora", [False, True])
def test_loss_and_gradients_equal_plain_autograd_over_the_dequantised_weight(
    base: Path, dtype: torch.dtype, tolerance: float, rslora: bool
) -> None:
    model, layers = adapted(base, dtype, rslora=rslora)
    loss = loss_of(model)
    loss.backward()
    slow, leaves = twin(base, layers)
    expected = loss_of(slow)
    expected.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=tolerance, atol=0)
    assert len(layers) == 14
    for name, layer in layers.items():
        for parameter, leaf in zip((layer.lora_a, layer.lora_b), leaves[name], strict=True):
            assert parameter.grad is not None
            assert leaf.grad is not None
            difference = (parameter.grad.float() - leaf.grad).norm() / leaf.grad.norm()
            assert difference < tolerance, name


def test_gradients_with_checkpointing_equal_those_without(base: Path) -> None:
    from qlora_cli.model.base import set_checkpointing

    gradients = []
    for mode in ("off", "on"):
        model, layers = adapted(base)
        set_checkpointing(model, mode)
        model.train()
        loss_of(model).backward()
        gradients.append([p.grad for layer in layers.values() for p in (layer.lora_a, layer.lora_b)])
    assert len(gradients[0]) == 28
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert recomputed is not None
        assert torch.equal(plain, recomputed)


def test_evaluating_between_two_steps_leaves_the_gradient_as_it_was(base: Path) -> None:
    model, layers = adapted(base, torch.bfloat16)
    model.train()
    loss_of(model).backward()
    first = [p.grad.clone() for layer in layers.values() for p in layer.parameters() if p.grad is not None]
    model.zero_grad()
    with torch.no_grad():
        model.eval()(IDS)
    model.train()
    loss_of(model).backward()
    second = [p.grad for layer in layers.values() for p in layer.parameters() if p.grad is not None]
    assert len(first) == 28
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_delta_is_what_forward_adds(base: Path) -> None:
    _, layers = adapted(base)
    for layer in layers.values():
        x = torch.randn(5, layer.lora_a.shape[1])
        torch.testing.assert_close(layer(x) - layer.base(x), x @ layer.delta().T, rtol=1e-4, atol=1e-5)
    assert layers


def test_dropout_acts_in_training_only(base: Path) -> None:
    model, _ = adapted(base, dropout=0.5)
    assert torch.equal(model.eval()(IDS).logits, model(IDS).logits)
    assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)


def test_scaling_is_alpha_over_r_and_over_its_root_when_rank_stabilised() -> None:
    assert scaling_of(LoraSection(r=16, alpha=32)) == 2.0
    assert scaling_of(LoraSection(r=16, alpha=32, rslora=True)) == 8.0


def test_initial_values_depend_on_seed_and_name_alone(base: Path) -> None:
    every = attach(load(base), LoraSection(r=4), torch.float32, seed=1)
    few = attach(load(base), LoraSection(r=4, targets=("v_proj",)), torch.float32, seed=1)
    other = attach(load(base), LoraSection(r=4), torch.float32, seed=2)
    assert len(few) == 2
    for name, layer in few.items():
        assert torch.equal(layer.lora_a, every[name].lora_a)
        assert not torch.equal(layer.lora_a, other[name].lora_a)
        assert layer.lora_a.abs().max() <= 1 / math.sqrt(64)
        assert not layer.lora_b.any()


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        (("q_proj", "v_proj"), 4),
        (("model.layers.1.mlp.up_proj",), 1),
        (r"model\.layers\.0\..*_proj", 7),
    ],
)
def test_targets_select_layers(base: Path, targets: Any, count: int) -> None:
    assert len(target_layers(load(base), targets)) == count


@pytest.mark.parametrize("targets", [("q_proj", "k_projj"), "nothing.*", ("lm_head",), "(", ("proj",)])
def test_a_target_that_matches_nothing_is_refused_even_beside_one_that_does(base: Path, targets: Any) -> None:
    with pytest.raises(RecipeError, match=r"lora\.targets"):
        target_layers(load(base), targets)


def test_a_misspelt_target_names_the_nearest_layer(base: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean k_proj"):
        target_layers(load(base), ("k_projj",))


def test_trainable_count_is_exact(base: Path) -> None:
    model = load(base)
    expected = adapter_parameters(target_layers(model, "all-linear"), 4)
    attach(model, LoraSection(r=4), torch.float32, seed=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected == 8_192


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_gpt2_whose_weights_are_stored_transposed_takes_adapters_too(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load(tmp_path, kind=kind)
    layers = attach(model, LoraSection(r=4), torch.float32, seed=0)
    assert {layer.delta().shape for layer in layers.values()} == {(192, 64), (64, 64), (256, 64), (64, 256)}
    loss_of(model).backward()
    assert all(layer.lora_b.grad is not None and layer.lora_b.grad.any() for layer in layers.values())
