"""Optimizer and random generators: what is taken and put back is the same, bit for bit, or is refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from qlora_cli.errors import ModelError
from qlora_cli.recipe.schema import TrainSection
from qlora_cli.training.optim import STATE_BYTES, allocate_state, build_optimizer
from qlora_cli.training.state import optimizer_tensors, random_tensors, restore_optimizer, restore_random

CPU = torch.device("cpu")
SHAPES = {"a.lora_A.weight": (8, 640), "a.lora_B.weight": (16, 8)}
"""One that bitsandbytes keeps in 8 bits, one that it does not (fewer than 4,096 values)."""


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    """The same values each time."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def made(name: str, seed: int = 0) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """An optimizer of that name with its state allocated, and what it optimizes."""
    named = parameters(seed)
    optimizer = build_optimizer(list(named.values()), TrainSection.model_validate({"optimizer": name, "steps": 1}), CPU)
    allocate_state(optimizer)
    return optimizer, named


def step(optimizer: Any, named: dict[str, torch.nn.Parameter], number: int) -> None:
    """One step with gradients that are a function of its number."""
    generator = torch.Generator().manual_seed(100 + number)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def copied(optimizer: Any, named: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Its states as they are now."""
    return {key: value.clone() for key, value in optimizer_tensors(optimizer, named).items()}


@pytest.mark.parametrize("name", sorted(STATE_BYTES))
def test_an_optimizer_that_was_put_back_goes_on_bit_for_bit(name: str) -> None:
    first, named = made(name)
    for number in range(3):
        step(first, named, number)
    taken = copied(first, named)
    values = {key: parameter.detach().clone() for key, parameter in named.items()}
    step(first, named, 3)

    second, others = made(name, seed=1)
    with torch.no_grad():
        for key, parameter in others.items():
            parameter.copy_(values[key])
    places = {id(value) for state in second.state.values() for value in state.values() if torch.is_tensor(value)}
    restore_optimizer(second, others, taken)
    kept = {id(value) for state in second.state.values() for value in state.values() if torch.is_tensor(value)}
    assert kept == places, "states stay in the memory that was allocated for them, which may be paged"
    step(second, others, 3)
    assert all(torch.equal(named[key], others[key]) for key in SHAPES)
    ended, again = copied(first, named), copied(second, others)
    assert ended.keys() == again.keys() == taken.keys()
    assert all(torch.equal(ended[key], again[key]) for key in ended)
    assert any(value.dtype == torch.uint8 for value in taken.values()) == name.endswith("8bit")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("a.lora_A.weight:exp_avg"), "a.lora_A.weight:exp_avg is not in the checkpoint"),
        (lambda t: t.update({"b:exp_avg": torch.zeros(1)}), "b:exp_avg is no state of this optimizer"),
        (lambda t: t.update({"a.lora_B.weight:exp_avg": torch.zeros(8, 16)}), r"\(8, 16\), torch.float32\) in the ch"),
        (lambda t: t.update({"a.lora_B.weight:exp_avg": torch.zeros(16, 8).half()}), r"torch.float16\) in the ch"),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_nothing_is_put_back(change: Any, said: str) -> None:
    optimizer, named = made("adamw")
    step(optimizer, named, 0)
    before = copied(optimizer, named)
    wrong = {key: value + 1 for key, value in before.items()}
    change(wrong)
    with pytest.raises(ModelError, match=said):
        restore_optimizer(optimizer, named, wrong)
    assert all(torch.equal(value, before[key]) for key, value in optimizer_tensors(optimizer, named).items())


def draws() -> list[float]:
    """Some of every generator, normal ones too: those keep a spare."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.random()),
        float(np.random.standard_normal()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_every_generator_goes_on_where_it_was() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    draws()
    taken = random_tensors()
    expected = [draws() for _ in range(3)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert [draws() for _ in range(3)] != expected
    restore_random(taken)
    assert [draws() for _ in range(3)] == expected
