"""Groups of LoRA layers against plain autograd over the dequantised weight."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from qlora_cli.model import fused
from qlora_cli.model.adapter import adapter_tensors
from qlora_cli.model.decode import FastDecoding
from qlora_cli.model.fused import fuse, project, unfuse
from qlora_cli.model.lora import LoraLinear, attach, frozen_weight, keep_mask
from qlora_cli.model.nf4 import Desk, cpu_has_native_bf16
from qlora_cli.model.switch import Adapters
from qlora_cli.recipe.schema import LoraSection
from tests.conftest import make_llama
from tests.model.test_lora import ATTENTION, IDS, adapted, load, loss_of

IN = 64
KINDS = ("nf4", "nf4-double", "fp4", "linear", "conv1d")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
BF16 = torch.bfloat16


def base_of(kind: str, out: int, bias: bool, dtype: torch.dtype, columns: int = IN) -> nn.Module:
    """A frozen random linear layer."""
    weight, shift = torch.randn(out, columns, dtype=dtype) / math.sqrt(columns), torch.randn(out, dtype=dtype)
    if kind == "conv1d":
        layer: Any = Conv1D(out, columns).to(dtype)
        layer.weight.data, layer.bias.data = weight.t().contiguous(), shift
    elif kind == "linear":
        layer = nn.Linear(columns, out, bias=bias, dtype=dtype)
        layer.weight.data = weight
    else:
        layer = bnb.nn.Linear4bit(columns, out, bias=bias, compute_dtype=dtype, quant_type=kind[:3])
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type=kind[:3], compress_statistics=kind.endswith("double"), module=layer
        )
        layer.to("cpu").support_avx512bf16_for_cpu = False
    if layer.bias is not None:
        layer.bias = nn.Parameter(shift)
    result: nn.Module = layer.requires_grad_(False)
    return result


def lora_of(base: nn.Module, rank: int = 4, scaling: float = 2.0, dropout: float = 0.0, **options: Any) -> LoraLinear:
    """An adapter beside it whose B is not zero."""
    layer = LoraLinear(base, rank, scaling, dropout, options.get("dtype", torch.float32))
    with torch.no_grad():
        layer.lora_a.normal_(std=1 / math.sqrt(layer.lora_a.shape[1]))
        layer.lora_b.normal_(std=1 / math.sqrt(rank))
    return layer


def three(dtype: torch.dtype = torch.float32, dropout: float = 0.0, kind: str = "nf4-double") -> list[LoraLinear]:
    """Query, key and value of grouped attention."""
    torch.manual_seed(1)
    return [
        lora_of(base_of(kind, out, False, dtype), rank, dropout=dropout, dtype=dtype)
        for out, rank in ((96, 4), (32, 2), (32, 3))
    ]


def grouped(layers: list[LoraLinear]) -> list[LoraLinear]:
    """The layers, fused: called in this order."""
    assert fuse(_Caller(nn.ModuleList(layers)), layers, {"x": example(layers)}) == len(layers)
    return layers


def example(layers: Sequence[LoraLinear]) -> Tensor:
    """An input of the type that their base computes in."""
    base: Any = layers[0].base
    return torch.zeros(2, IN, dtype=getattr(base, "compute_dtype", base.weight.dtype))


class _Caller(nn.Module):
    """Calls every layer with its input."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, use_cache: bool = False) -> list[Tensor]:
        """All outputs."""
        assert not use_cache
        return [layer(x) for layer in self.layers]


def formula(layers: Sequence[LoraLinear], x: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """What the layers compute for x [T, in], in float64; dropout draws from torch's generator."""
    found = []
    for layer, a, b in zip(layers, leaves[::2], leaves[1::2], strict=True):
        share = layer.dropout.p if layer.training else 0
        seen = x * keep_mask(x, share) / (1 - share) if share else x
        base: Any = layer.base
        y = x @ frozen_weight(base, torch.float64, Desk()).t() + layer.scaling * (seen @ a.t()) @ b.t()
        found.append(y if base.bias is None else y + base.bias.double())
    return found


def factors(layers: Sequence[LoraLinear]) -> list[nn.Parameter]:
    return [factor for layer in layers for factor in (layer.lora_a, layer.lora_b)]


def weighted(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar in which every element of every output counts differently."""
    generator = torch.Generator().manual_seed(9)
    return torch.stack([(y.double() * torch.randn(y.shape, generator=generator)).sum() for y in outputs]).sum()


def gap(found: Tensor | None, wanted: Tensor | None) -> float:
    """Relative."""
    assert found is not None
    assert wanted is not None
    return float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def measured(compute: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of all inputs; dropout draws the same each time."""
    torch.manual_seed(4)
    outputs = compute()
    return [*(y.detach() for y in outputs), *torch.autograd.grad(weighted(outputs), inputs)]


@dataclass(frozen=True)
class Case:
    """A group and what it is given."""

    kind: str
    sizes: tuple[tuple[int, int, bool], ...]
    dropout: float
    dtype: torch.dtype
    stored: torch.dtype
    scaling: float
    shape: tuple[int, ...]
    learns: bool
    """Whether x needs a gradient."""

    def layers(self) -> list[LoraLinear]:
        """With different ranks, numbers of outputs and biases."""
        return [
            lora_of(base_of(self.kind, out, bias, self.dtype), rank, self.scaling, self.dropout, dtype=self.stored)
            for out, rank, bias in self.sizes
        ]


cases = st.builds(
    Case,
    kind=st.sampled_from(KINDS),
    sizes=st.lists(
        st.tuples(st.sampled_from((32, 64, 96)), st.sampled_from((1, 2, 5, 16)), st.booleans()), min_size=1, max_size=3
    ).map(tuple),
    dropout=st.sampled_from((0.0, 0.3)),
    dtype=st.sampled_from((torch.float32, BF16)),
    stored=st.sampled_from((torch.float32, BF16)),
    scaling=st.sampled_from((0.25, 2.0, 16 / math.sqrt(5))),
    shape=st.sampled_from(((7,), (2, 5), (2, 3, 2), (1,))),
    learns=st.booleans(),
).filter(lambda case: case.dtype == BF16 or case.stored == torch.float32)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(cases)
def test_outputs_and_gradients_are_those_of_the_formula_and_of_each_layer_alone(case: Case) -> None:
    torch.manual_seed(0)
    layers = case.layers()
    x = torch.randn(*case.shape, IN, dtype=case.dtype).requires_grad_(case.learns)
    own = [*factors(layers), *([x] if case.learns else [])]
    exact = [each.detach().to(case.dtype).double().requires_grad_() for each in factors(layers)]
    wide = x.detach().double().requires_grad_()
    calls = grouped(layers)
    ours = measured(lambda: [layer(x) for layer in calls], own)
    unfuse(layers)
    plain = measured(lambda: [layer(x) for layer in calls], own)
    wanted = measured(lambda: formula(layers, wide.view(-1, IN), exact), [*exact, *([wide] if case.learns else [])])
    assert len(ours) == len(wanted) == 3 * len(layers) + case.learns
    for found, alone, true in zip(ours, plain, wanted, strict=True):
        assert found.shape == alone.shape
        assert found.dtype == alone.dtype
        assert gap(found, true.view(found.shape)) < TOLERANCES[case.dtype]
        assert gap(found, alone) < TOLERANCES[case.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_group_without_gradients_computes_the_same_and_keeps_no_graph(dtype: torch.dtype) -> None:
    layers = grouped(three(dtype, dropout=0.5))
    x = torch.randn(3, IN, dtype=dtype)
    alone = [layer.eval().plain(x) for layer in layers]
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            found = [layer(x) for layer in layers]
        assert all(not y.requires_grad and gap(y, z) < 1e-2 for y, z in zip(found, alone, strict=True))


def test_frozen_layers_hand_the_gradient_on_to_their_input() -> None:
    layers = [layer.requires_grad_(False) for layer in grouped(three())]
    x = torch.randn(3, IN, requires_grad=True)
    (found,) = torch.autograd.grad(weighted([layer(x) for layer in layers]), x)
    (wanted,) = torch.autograd.grad(weighted([layer.plain(x) for layer in layers]), x)
    assert gap(found, wanted) < 1e-5


def test_layers_of_a_group_in_evaluation_mode_do_not_drop_out_beside_one_that_trains() -> None:
    layers = grouped(three(dropout=0.5))
    layers[1].eval()
    x = torch.randn(3, IN)
    found = measured(lambda: [layer(x) for layer in layers], factors(layers))
    wanted = measured(lambda: [layer.plain(x) for layer in layers], factors(layers))
    assert all(gap(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_a_bias_of_another_type_is_added_in_the_type_of_the_input() -> None:
    layer = lora_of(base_of("nf4", 32, True, BF16), dtype=BF16)
    layer.base.bias.data = layer.base.bias.data.float()
    x = torch.randn(3, IN, dtype=BF16)
    assert gap(project((layer,), x)[0], layer.plain(x)) < 1e-2


def test_a_weight_that_lost_its_constants_as_where_it_is_sharded_is_read_by_those_of_its_layer() -> None:
    layers = grouped(three())
    x = torch.randn(3, IN, requires_grad=True)
    wanted = measured(lambda: [layer(x) for layer in layers], [x, *factors(layers)])
    for layer in layers:
        base: Any = layer.base
        base.weight = nn.Parameter(base.weight.data, requires_grad=False)
        assert not hasattr(base.weight, "quant_state")
    found = measured(lambda: [layer(x) for layer in layers], [x, *factors(layers)])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_under_autocast_every_layer_is_computed_plainly() -> None:
    layers = grouped(three(kind="linear"))
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", BF16):
        found = measured(lambda: [layer(x) for layer in layers], [x, *factors(layers)])
        wanted = measured(lambda: [layer.plain(x) for layer in layers], [x, *factors(layers)])
    assert found[0].dtype == BF16
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("order", ["201", "021", "0011", "0110220", "12", "0", "00", "2220"])
def test_layers_called_in_any_order_and_number_are_right(order: str) -> None:
    layers = grouped(three())
    x = torch.randn(3, IN, requires_grad=True)
    called = [layers[int(i)] for i in order]
    own = [x, *(each for i in sorted(set(order)) for each in factors([layers[int(i)]]))]
    found = measured(lambda: [layer(x) for layer in called], own)
    wanted = measured(lambda: [layer.plain(x) for layer in called], own)
    assert all(gap(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_another_input_of_the_same_values_is_no_excuse_for_an_output_that_waits() -> None:
    layers = grouped(three())
    x = torch.randn(3, IN)
    layers[0](x)
    other = x + 1
    assert gap(layers[1](other), layers[1].plain(other)) < 1e-5
    assert gap(layers[2](x), layers[2].plain(x)) < 1e-5


def test_two_micro_batches_add_up_and_may_be_computed_before_either_goes_back() -> None:
    layers = grouped(three())
    xs = [torch.randn(n, IN, requires_grad=True) for n in (3, 5)]
    losses = [weighted([layer(x) for layer in layers]) for x in xs]
    for loss in reversed(losses):
        loss.backward()
    own = [*factors(layers), *xs]
    wanted = torch.autograd.grad([weighted([layer.plain(x) for layer in layers]) for x in xs], own)
    assert all(gap(each.grad, true) < 1e-5 for each, true in zip(own, wanted, strict=True))


def test_going_back_twice_or_for_some_tensors_alone_gives_the_same() -> None:
    layers = grouped(three(dropout=0.3))
    x = torch.randn(3, IN, requires_grad=True)
    own = [x, *factors(layers)]
    loss = weighted([layer(x) for layer in layers])
    first = torch.autograd.grad(loss, own, retain_graph=True)
    alone = [torch.autograd.grad(loss, each, retain_graph=True)[0] for each in own]
    second = torch.autograd.grad(loss, own)
    assert len(own) == 7
    for each in zip(first, alone, second, strict=True):
        assert torch.equal(each[0], each[1])
        assert torch.equal(each[0], each[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_weight_is_saved_for_the_backward_pass(kind: str, dropout: float) -> None:
    layers, tokens = grouped(three(kind=kind, dropout=dropout)), 5
    x = torch.randn(tokens, IN, requires_grad=True)
    saved: Counter[tuple[int, ...]] = Counter()

    def pack(each: Tensor) -> Tensor:
        saved[tuple(each.shape)] += 1
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        outputs = [layer(x) for layer in layers]
    assert saved == {(tokens, IN): 4 if dropout else 1, (tokens, 9): 1}
    assert all(y.shape[1] in {96, 32} for y in outputs)


class Dequantised:
    """Counts how often each 4-bit layer was dequantised while it is entered."""

    def __init__(self) -> None:
        self.counts: Counter[nn.Module] = Counter()

    def __enter__(self) -> Dequantised:
        weight = fused.DESK.weight

        def counting(layer: Any) -> Tensor:
            self.counts[layer] += 1
            return weight(layer)

        fused.DESK.weight = counting  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del fused.DESK.weight

    def of(self, layer: LoraLinear) -> int:
        """The count of one layer."""
        return self.counts[layer.base]


class Mlp(nn.Module):
    """A block as models have it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.gate, self.up = (lora_of(base_of("nf4", 128, False, torch.float32), dropout=dropout) for _ in range(2))
        self.down = lora_of(base_of("nf4", 64, False, torch.float32, columns=128), dropout=dropout)

    def forward(self, x: Tensor, use_cache: bool = False) -> Tensor:
        """x with the block's part added."""
        assert not use_cache
        result: Tensor = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return result

    @property
    def layers(self) -> list[LoraLinear]:
        """In their order."""
        return [self.gate, self.up, self.down]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_a_block_leaves_its_last_product_out_and_gradients_as_they_are(dropout: float) -> None:
    block = Mlp(dropout)
    assert fuse(block, block.layers, {"x": torch.zeros(2, IN)}) == 3
    x = torch.randn(4, IN, requires_grad=True)
    own = [x, *factors(block.layers)]
    kept = measured(lambda: [block(x)], own)
    with Dequantised() as count:
        recomputed = measured(lambda: [checkpoint(block, x, use_reentrant=False)], own)
    assert [count.of(layer) for layer in block.layers] == [3, 3, 2]
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    unfuse(block.layers)
    plain = measured(lambda: [block(x)], own)
    assert all(gap(a, b) < 1e-5 for a, b in zip(kept, plain, strict=True))


def test_a_weight_is_dequantised_once_on_each_way_and_once_only_where_the_input_learns_nothing() -> None:
    layers = grouped(three())
    for learns, times in ((True, 2), (False, 1)):
        x = torch.randn(4, IN, requires_grad=learns)
        with Dequantised() as count:
            weighted([layer(x) for layer in layers]).backward()
        assert [count.of(layer) for layer in layers] == [times] * 3


def test_after_a_step_nothing_of_it_is_held() -> None:
    block = Mlp()
    fuse(block, block.layers, {"x": torch.zeros(2, IN)})
    x = torch.randn(4, IN, requires_grad=True)
    y = block(x)
    y.sum().backward()
    left = [weakref.ref(each) for each in (x, y)]
    del x, y
    assert [each() for each in left] == [None, None]


def test_a_group_whose_layers_all_were_called_holds_nothing() -> None:
    layers = grouped(three())
    x = torch.randn(4, IN, requires_grad=True)
    left = [weakref.ref(x), *(weakref.ref(layer(x)) for layer in layers)]
    del x
    assert [each() for each in left] == [None] * 4


class Breaks(nn.Module):
    """Two layers and a pair; between the two of the pair something may go wrong, as where memory runs out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(lora_of(base_of("nf4", 64, False, torch.float32)) for _ in range(4))
        self.breaks = False
        self.middle: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor, use_cache: bool = False) -> Tensor:
        """One after the other, the pair side by side."""
        assert not use_cache
        x = x + self.layers[0](x)
        x = x + self.layers[1](x)
        self.middle = weakref.ref(x)
        third = self.layers[2](x)
        if self.breaks:
            raise MemoryError
        result: Tensor = third + self.layers[3](x)
        return result


def test_what_a_pass_left_behind_that_broke_off_is_dropped_when_the_next_begins() -> None:
    model = Breaks()
    layers: list[Any] = list(model.layers)
    assert fuse(model, layers, {"x": torch.zeros(2, IN)}) == 4
    assert len({layer.group for layer in layers}) == 3
    model.breaks = True
    with pytest.raises(MemoryError):
        model(torch.randn(3, IN))
    left = model.middle
    assert left() is not None
    layers[0](torch.randn(3, IN))
    assert left() is None


class Shares(nn.Module):
    """Calls one layer twice, one with another type than its base computes in, and one as it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.wide, self.usual = (lora_of(base_of("nf4", 64, False, BF16), dtype=BF16) for _ in range(3))

    def forward(self, x: Tensor, use_cache: bool = False) -> Tensor:
        """All outputs, summed."""
        assert not use_cache
        result: Tensor = self.twice(x) + self.twice(x * 2) + self.wide(x.float()) + self.usual(x)
        return result


def test_layers_that_are_called_twice_or_in_another_type_stay_as_they_are() -> None:
    model = Shares()
    layers = [model.twice, model.wide, model.usual]
    x = torch.randn(3, IN, dtype=BF16)
    before = model(x)
    assert fuse(model, layers, {"x": x}) == 1
    assert [layer.group is None for layer in layers] == [True, True, False]
    assert gap(model(x), before) < 1e-2
    unfuse(layers)
    assert model.usual.group is None
    assert torch.equal(model(x), before)


def test_recording_who_is_called_leaves_no_hook_and_no_group_where_the_model_fails() -> None:
    model = Breaks()
    model.breaks = True
    layers: list[Any] = list(model.layers)
    with pytest.raises(MemoryError):
        fuse(model, layers, {"x": torch.zeros(2, IN)})
    assert all(not layer._forward_pre_hooks and layer.group is None for layer in layers)


INPUTS = {"input_ids": IDS, "attention_mask": ATTENTION}


def test_a_model_of_fused_layers_forms_groups_of_those_that_read_the_same(base: Path) -> None:
    model, layers = adapted(base)
    assert fuse(model, list(layers.values()), INPUTS) == 14
    members = Counter(layer.group for layer in layers.values())
    assert sorted(members.values()) == [1, 1, 1, 1, 2, 2, 3, 3]
    fast = torch.autograd.grad(loss_of(model), factors(list(layers.values())))
    unfuse(list(layers.values()))
    slow = torch.autograd.grad(loss_of(model), factors(list(layers.values())))
    assert all(gap(a, b) < 1e-5 for a, b in zip(fast, slow, strict=True))


def test_adapters_that_take_turns_compute_as_if_none_were_fused(base: Path) -> None:
    model = load(base)
    sections = {"all": LoraSection(r=4), "some": LoraSection(r=2, targets=("q_proj", "v_proj"))}
    adapters, expected = Adapters(model, torch.float32), {}
    for name, section in sections.items():
        torch.manual_seed(len(name))
        apart = attach(make_llama(), section, torch.float32, seed=0)
        for layer in apart.values():
            nn.init.normal_(layer.lora_b, std=0.1)
        adapters.add(name, section, adapter_tensors(apart), Path("memory"))
        adapters.use(name)
        expected[name] = model(IDS).logits.detach()
    for name in sections:
        adapters.use(name)
        found = [module for module in model.modules() if isinstance(module, LoraLinear)]
        assert fuse(model, found, INPUTS) == len(found)
    for name in ("all", "some", "all"):
        adapters.use(name)
        torch.testing.assert_close(model(IDS).logits, expected[name], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected["all"], expected["some"])


@pytest.mark.skipif(not cpu_has_native_bf16(), reason="this CPU has no AVX512-BF16")
def test_faster_decoding_of_fused_layers_is_that_of_plain_ones(base: Path) -> None:
    model, layers = adapted(base, BF16)
    model.eval()
    found = []
    for grouped in (False, True):
        if grouped:
            assert fuse(model, list(layers.values()), INPUTS) == 14
        decoding = FastDecoding(model)
        decoding.find_adapters()
        with decoding.on():
            found.append([model(ids).logits for ids in (IDS[:1, :1], IDS.repeat(8, 4))])
    assert torch.equal(found[0][0], found[1][0])
    assert gap(found[1][1], found[0][1]) < 1e-2
