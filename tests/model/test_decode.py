"""Faster decoding against the layers it stands in for, and that it leaves no trace."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional as bnb_functional
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_cli.model.decode import MOST_ROWS, FastDecoding, _one_query, evaluating
from qlora_cli.model.lora import attach
from qlora_cli.model.nf4 import cpu_has_native_bf16, dequantize, four_bit_layers
from qlora_cli.model.packed import PackedCopy, agrees, available_memory, copied_bytes, fits
from qlora_cli.recipe.schema import LoraSection
from tests.conftest import make_llama
from tests.model.test_lora import IDS, adapted, load, loss_of

BF16 = torch.bfloat16
packs = pytest.mark.skipif(not cpu_has_native_bf16(), reason="this CPU has no AVX512-BF16")


def layer_of(out: int = 96, columns: int = 256, bias: bool = False, **options: Any) -> Any:
    """A 4-bit layer with values drawn from a normal distribution."""
    torch.manual_seed(out + columns)
    blocksize = options.pop("blocksize", 64)
    layer = bnb.nn.Linear4bit(columns, out, bias=bias, compute_dtype=BF16, **({"quant_type": "nf4"} | options))
    weight = torch.randn(out, columns, dtype=BF16) * 0.02
    layer.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        blocksize=blocksize,
        quant_type=layer.weight.quant_type,
        compress_statistics=layer.weight.compress_statistics,
        quant_storage=layer.weight.quant_storage,
        module=layer,
    )
    layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    if bias:
        layer.bias = nn.Parameter(torch.randn(out, dtype=BF16), requires_grad=False)
    assert layer.weight.quant_state.blocksize == blocksize
    return layer.eval()


def model_of(layer: Any) -> FastDecoding:
    """Faster decoding of a model that is this layer."""
    fast = FastDecoding(nn.Sequential(layer))
    fast.find_adapters()
    return fast


def off(found: Tensor, exact: Tensor) -> float:
    """Relative distance."""
    return float((found.float() - exact.float()).norm() / exact.float().norm())


KINDS = [
    {},
    {"compress_statistics": False},
    {"quant_type": "fp4"},
    {"blocksize": 32},
    {"blocksize": 128},
    {"quant_storage": BF16},
    {"bias": True},
]


@packs
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, MOST_ROWS])
def test_products_of_few_rows_are_those_of_the_stored_weight_within_half_a_percent(
    kind: dict[str, Any], rows: int
) -> None:
    layer = layer_of(**kind)
    x = torch.randn(1, rows, 256, dtype=BF16)
    exact = nn.functional.linear(
        x.float(), dequantize(layer).float(), None if layer.bias is None else layer.bias.float()
    )
    with model_of(layer).on():
        found = layer(x)
    assert found.dtype == BF16
    assert 0 < off(found, exact) < 5e-3


@packs
@pytest.mark.parametrize("kind", KINDS[:5], ids=str)
def test_a_packed_copy_is_bit_for_bit_what_bitsandbytes_makes_in_place(kind: dict[str, Any]) -> None:
    layer = layer_of(**kind)
    mine, state = PackedCopy(layer), copy.copy(layer.weight.quant_state)
    codes, state = bnb_functional._convert_weight_packed_for_cpu(layer.weight.data.clone(), state)
    assert torch.equal(mine._codes, codes)
    assert torch.equal(mine._scales, state.absmax)
    x = torch.randn(3, 256, dtype=BF16)
    assert torch.equal(mine.product(x), bnb_functional.gemv_4bit(x, codes, state=state))


@packs
@pytest.mark.parametrize("stride", ["rows", "columns"])
def test_inputs_that_are_not_contiguous_give_the_same_product(stride: str) -> None:
    mine, x = PackedCopy(layer_of()), torch.randn(4, 512, dtype=BF16)
    view = x[:, ::2] if stride == "columns" else x[::2, :256]
    assert torch.equal(mine.product(view), mine.product(view.clone(memory_format=torch.contiguous_format)))


@packs
def test_more_rows_other_types_and_gradients_go_the_usual_way_bit_for_bit() -> None:
    layer = layer_of()
    fast = model_of(layer)
    many, single = torch.randn(MOST_ROWS + 1, 256, dtype=BF16), torch.randn(1, 256)
    expected = layer(many), layer(single), layer(single.to(BF16))
    with fast.on():
        assert torch.equal(layer(many), expected[0])
        assert torch.equal(layer(single), expected[1])
        assert layer(many[:0]).shape == (0, 96)
        with torch.enable_grad():
            x = single.to(BF16).requires_grad_()
            product = layer(x)
            product.sum().backward()
    assert torch.equal(product, expected[2])
    assert x.grad is not None


@packs
@pytest.mark.parametrize(("out", "columns", "kind"), [(40, 256, {}), (96, 96, {}), (96, 256, {"blocksize": 512})])
def test_layers_that_the_kernel_does_not_take_are_left_alone(out: int, columns: int, kind: dict[str, Any]) -> None:
    layer = layer_of(out, columns, **kind)
    assert not fits(layer)
    x = torch.randn(1, columns, dtype=BF16)
    expected = layer(x)
    with model_of(layer).on():
        assert torch.equal(layer(x), expected)
    assert model_of(layer).bytes == 0


@packs
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    mine = PackedCopy(layer)
    assert agrees(layer, mine)
    mine._codes.add_(1)
    assert not agrees(layer, mine)


@packs
def test_copies_that_would_take_more_than_half_of_the_free_memory_are_not_made(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(base, BF16)
    needed = FastDecoding(model).bytes
    assert needed == sum(copied_bytes(layer) for layer in four_bit_layers(model).values()) > 0
    assert available_memory() > 2 * needed
    for free, expected in ((2 * needed, needed), (2 * needed - 1, 0), (0, 0)):
        monkeypatch.setattr("qlora_cli.model.decode.available_memory", lambda free=free: free)
        assert FastDecoding(model).bytes == expected


def test_users_of_a_model_share_the_copies_as_long_as_one_of_them_lives(base: Path) -> None:
    model, other = load(base, BF16), load(base, BF16)
    first = FastDecoding.of(model)
    assert FastDecoding.of(model) is first
    assert FastDecoding.of(other) is not first
    gone = weakref.ref(first)
    del first
    assert gone() is None


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Bytes, constants, values and attributes of every 4-bit layer."""
    found: dict[str, Any] = {}
    for name, layer in four_bit_layers(model).items():
        state = layer.weight.quant_state
        tensors = (layer.weight.data.clone(), state.absmax.clone(), state.state2.absmax.clone(), dequantize(layer))
        found[name] = tensors, set(layer.__dict__), layer.weight.data_ptr(), layer.support_avx512bf16_for_cpu
    assert len(found) == 14
    return found


def gradients(model: Any, layers: dict[str, Any]) -> list[Tensor]:
    """Of a training step's loss."""
    model.zero_grad()
    loss_of(model.train()).backward()
    return [p.grad.clone() for layer in layers.values() for p in (layer.lora_a, layer.lora_b)]


def test_stored_weights_and_a_training_step_are_bit_identical_before_and_after(base: Path) -> None:
    model, layers = adapted(base, BF16)
    stored, expected, attention = snapshot(model), gradients(model, layers), ALL_ATTENTION_FUNCTIONS["sdpa"]
    fast = FastDecoding(model)
    fast.find_adapters()
    with evaluating(model), fast.on():
        model(IDS[:1, :4])
        model(IDS[:1, :1])
    after = snapshot(model)
    for name, (tensors, *rest) in stored.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, after[name][0], strict=True))
        assert rest == list(after[name][1:])
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, layers), expected, strict=True))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_exception_within_leaves_no_trace_either(base: Path) -> None:
    model = adapted(base, BF16)[0]
    attention, fast = ALL_ATTENTION_FUNCTIONS["sdpa"], FastDecoding(model)
    fast.find_adapters()
    with pytest.raises(ZeroDivisionError), fast.on():
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.is_grad_enabled()


def test_one_within_another_undoes_itself_only(base: Path) -> None:
    model, layers = adapted(base, BF16)
    first, second = FastDecoding(model), FastDecoding(model)
    first.find_adapters()
    second.find_adapters()
    layer = next(iter(layers.values()))
    with first.on():
        forward = vars(layer)["forward"]
        with second.on():
            assert vars(layer)["forward"] is not forward
        assert vars(layer)["forward"] is forward
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("positions", [1, 7])
def test_logits_of_a_whole_model_stay_within_a_percent(base: Path, positions: int) -> None:
    model, exact = adapted(base, BF16)[0], adapted(base)[0]
    fast = FastDecoding(model.eval())
    fast.find_adapters()
    with torch.no_grad():
        expected, usual = exact.eval()(IDS[:, :positions]).logits, model(IDS[:, :positions]).logits
        with fast.on():
            found = model(IDS[:, :positions]).logits
    assert off(found, expected) < max(1e-2, 1.5 * off(usual, expected))


def test_adapters_that_come_later_are_found_and_computed_better_than_in_bfloat16(base: Path) -> None:
    model = load(base, BF16).eval()
    fast = FastDecoding(model)
    layers = attach(model, LoraSection(r=4), BF16, seed=3)
    for layer in layers.values():
        nn.init.normal_(layer.lora_b, std=0.2)
    fast.find_adapters()
    layer = layers["model.layers.0.mlp.up_proj"].eval()
    x = torch.randn(1, 1, 64, dtype=BF16)
    exact = nn.functional.linear(x.float(), dequantize(layer.base).float() + layer.delta())
    with torch.no_grad():
        usual = layer(x)
        with fast.on():
            assert off(layer(x), exact) <= off(usual, exact) + 2e-3


def test_an_adapter_switched_off_adds_nothing(base: Path) -> None:
    model, layers = adapted(base, BF16)
    bare, fast = load(base, BF16).eval(), FastDecoding(model.eval())
    for layer in layers.values():
        layer.scaling = 0.0
    fast.find_adapters()
    other = FastDecoding(bare)
    other.find_adapters()
    with fast.on(), other.on():
        assert torch.equal(model(IDS[:1, :1]).logits, bare(IDS[:1, :1]).logits)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_position_is_transformers_sdpa(heads: int, groups: int, masked: bool) -> None:
    torch.manual_seed(heads)
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = SimpleNamespace(num_key_value_groups=heads // groups)
    query = torch.randn(3, heads, 1, 16)
    key, value = torch.randn(2, 3, groups, 37, 16).unbind()
    mask = torch.ones(3, 1, 1, 37, dtype=torch.bool) if masked else None
    if mask is not None:
        mask[1, :, :, :30] = False
    exact = usual(module, query, key, value, mask, scaling=0.3)[0]
    with torch.no_grad():
        rounded = [t.to(BF16) for t in (query, key, value)]
        found = _one_query(usual)(module, *rounded, mask, scaling=0.3)[0]
    assert found.shape == exact.shape
    assert off(found, exact) < 1e-2
    assert not torch.equal(found, usual(module, *rounded, mask, scaling=0.3)[0])  # it was not the usual one


def test_attention_with_anything_special_is_the_usual_one() -> None:
    calls = []

    def usual(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return None, None

    one = [torch.randn(1, 4, 1, 16, dtype=BF16)] * 3
    two = [torch.randn(1, 4, 2, 16, dtype=BF16)] * 3
    attention = _one_query(usual)
    attention(nn.Module(), *one, None)  # with gradients
    with torch.no_grad():
        attention(nn.Module(), *two, None)
        attention(nn.Module(), *[t.float() for t in one], None)
        attention(nn.Module(), *one, torch.zeros(1, 4, 1, 1))
        attention(nn.Module(), *one, None, dropout=0.1)
        attention(nn.Module(), *one, None, s_aux=torch.zeros(4))
    assert len(calls) == 6


def test_a_model_without_4_bit_layers_decodes_too() -> None:
    fast = FastDecoding(make_llama())
    assert fast.bytes == 0
    with fast.on():
        assert not torch.is_grad_enabled()
