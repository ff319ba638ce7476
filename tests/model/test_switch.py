"""Adapters that share one base: each computes as if alone, costs its own bytes, and leaves the base as it was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.errors import ModelError
from qlora_cli.model.adapter import adapter_tensors, load_into
from qlora_cli.model.lora import LoraLinear, attach
from qlora_cli.model.nf4 import four_bit_layers
from qlora_cli.model.switch import Adapters
from qlora_cli.recipe.schema import LoraSection
from tests.conftest import make_llama, save_base
from tests.model.test_lora import IDS, load

LORA = {
    "all": LoraSection(r=4, alpha=8),
    "some": LoraSection(r=2, alpha=8, rslora=True, targets=("q_proj", "down_proj"), dropout=0.5),
    "one": LoraSection(r=8, alpha=8, targets=("model.layers.1.mlp.up_proj",)),
}
SOURCE = Path("memory")


def filled(model: Any, lora: LoraSection, seed: int) -> dict[str, torch.Tensor]:
    """Values for an adapter on `model`, which is left with it attached."""
    layers = attach(model, lora, torch.float32, seed=0)
    torch.manual_seed(seed)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_a, std=0.1)
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    return adapter_tensors(layers)


def logits(model: Any) -> torch.Tensor:
    """Of the model in eval mode."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.fixture(scope="module")
def values(base: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Each adapter's tensors."""
    return {name: filled(load(base), lora, seed) for seed, (name, lora) in enumerate(LORA.items(), start=1)}


@pytest.fixture
def shared(base: Path, values: dict[str, dict[str, torch.Tensor]]) -> tuple[Any, Adapters]:
    """One base with every adapter."""
    model = load(base).eval()
    adapters = Adapters(model, torch.float32)
    for name, lora in LORA.items():
        adapters.add(name, lora, values[name], SOURCE)
    return model, adapters


def test_every_adapter_computes_bit_for_bit_as_if_it_were_alone(
    shared: tuple[Any, Adapters], base: Path, values: dict[str, dict[str, torch.Tensor]]
) -> None:
    model, adapters = shared
    assert adapters.names == ("all", "some", "one")
    bare = logits(load(base))
    alone = {}
    for name, lora in LORA.items():
        one = load(base)
        load_into(attach(one, lora, torch.float32, seed=0), values[name], SOURCE)
        alone[name] = logits(one)
        assert not torch.equal(alone[name], bare)
    for name in ("all", "one", "some", "one", "all", "all", "some"):
        adapters.use(name)
        assert torch.equal(logits(model), alone[name])
        assert adapters.active == name
        adapters.use(None)
        assert torch.equal(logits(model), bare)
    adapters.use("some")
    adapters.use("one")
    assert torch.equal(logits(model), alone["one"])


def test_the_bare_base_has_the_very_modules_that_it_had(base: Path, values: dict[str, dict[str, torch.Tensor]]) -> None:
    model = load(base).eval()
    before = dict(model.named_modules())
    adapters = Adapters(model, torch.float32)
    for name, lora in LORA.items():
        adapters.add(name, lora, values[name], SOURCE)
        assert adapters.active is None
        adapters.use(name)
        assert sum(isinstance(module, LoraLinear) for module in model.modules()) == len(values[name]) // 2
        adapters.use(None)
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())


def test_adding_an_adapter_leaves_the_one_in_use(base: Path, values: dict[str, dict[str, torch.Tensor]]) -> None:
    model = load(base).eval()
    adapters = Adapters(model, torch.float32)
    adapters.add("all", LORA["all"], values["all"], SOURCE)
    adapters.use("all")
    before = logits(model)
    adapters.add("one", LORA["one"], values["one"], SOURCE)
    assert adapters.active == "all"
    assert torch.equal(logits(model), before)


def storages(model: Any, adapters: Adapters) -> dict[int, int]:
    """Bytes of every tensor that the base or an adapter holds, by address; in 4-bit layers the constants too."""
    found = {}
    for name in (None, *adapters.names):
        adapters.use(name)
        states = [layer.weight.quant_state for layer in four_bit_layers(model).values()]
        constants = [tensor for state in states for tensor in (state.absmax, state.state2.absmax, state.offset)]
        for tensor in (*model.parameters(), *model.buffers(), *constants):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def test_an_adapter_costs_its_own_bytes_and_nothing_else(
    base: Path, values: dict[str, dict[str, torch.Tensor]]
) -> None:
    model = load(base).eval()
    adapters = Adapters(model, torch.float32)
    before = storages(model, adapters)
    for name, lora in LORA.items():
        adapters.add(name, lora, values[name], SOURCE)
        after = storages(model, adapters)
        own = sum(tensor.numel() * tensor.element_size() for tensor in values[name].values())
        assert before.keys() <= after.keys()
        assert sum(after.values()) - sum(before.values()) == own > 0
        before = after


def test_an_adapter_that_does_not_fit_is_refused_and_the_base_stays_whole(
    shared: tuple[Any, Adapters], values: dict[str, dict[str, torch.Tensor]], base: Path
) -> None:
    model, adapters = shared
    adapters.use("some")
    before = logits(model)
    with pytest.raises(ModelError, match="the layer wants") as caught:
        adapters.add("other", LoraSection(r=3), values["all"], SOURCE)
    assert len(caught.value.problems) == len(values["all"])
    assert (adapters.names, adapters.active) == (("all", "some", "one"), "some")
    assert torch.equal(logits(model), before)
    adapters.use(None)
    assert torch.equal(logits(model), logits(load(base)))


def test_hundreds_of_layers_are_switched_in_less_than_fifty_milliseconds(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "deep", num_hidden_layers=48, hidden_size=32, intermediate_size=32)
    model = load(folder).eval()
    adapters = Adapters(model, torch.float32)
    for name in ("one", "two"):
        other = make_llama(num_hidden_layers=48, hidden_size=32, intermediate_size=32)
        adapters.add(name, LORA["all"], filled(other, LORA["all"], seed=1), SOURCE)
    seconds = []
    for wanted in ("one", "two", None) * 5:
        started = time.perf_counter()
        adapters.use(wanted)
        seconds.append(time.perf_counter() - started)
    assert len(four_bit_layers(model)) == 48 * 7
    assert sorted(seconds)[len(seconds) // 2] < 0.05
