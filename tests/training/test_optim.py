"""Learning rate and optimizer."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.recipe.schema import TrainSection
from qlora_cli.training import optim
from qlora_cli.training.optim import build_optimizer, lr_at, paging_note, warmup_steps

CPU = torch.device("cpu")


def section(**values: Any) -> TrainSection:
    """A train section with peak learning rate 1."""
    defaults: dict[str, Any] = {"lr": 1.0, "schedule": "constant"}
    return TrainSection(**(defaults | values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1, 0.853553, 0.5, 0.146447]),
        ({"schedule": "constant_with_warmup", "warmup_steps": 2}, [0.5, 1, 1, 1]),
        ({"schedule": "linear", "warmup_ratio": 0.5}, [0.5, 1, 1, 0.5]),
        ({"schedule": "cosine", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_learning_rate_of_four_steps(values: dict[str, Any], expected: list[float]) -> None:
    assert [lr_at(step, 4, section(**values)) for step in range(4)] == pytest.approx(expected, abs=1e-6)


@given(
    total=st.integers(1, 200),
    share=st.floats(0, 0.9),
    schedule=st.sampled_from(["constant_with_warmup", "linear", "cosine"]),
)
def test_the_rate_rises_to_its_peak_and_never_rises_again(total: int, share: float, schedule: str) -> None:
    train = section(schedule=schedule, warmup_ratio=share)
    rates = [lr_at(step, total, train) for step in range(total)]
    peak = max(0, warmup_steps(train, total) - 1)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[peak] == pytest.approx(1.0)


def test_tables_and_schema_name_the_same_words_both_ways() -> None:
    optimizers = set(get_args(TrainSection.model_fields["optimizer"].annotation))
    schedules = set(get_args(TrainSection.model_fields["schedule"].annotation))
    assert optimizers == {*optim.STATE_BYTES}
    assert optimizers == {"adamw", *optim.BITSANDBYTES_ON_CPU} == {"adamw", *optim.BITSANDBYTES_ON_CUDA}
    assert schedules == {*optim.DECAY}


@pytest.mark.parametrize("name", get_args(TrainSection.model_fields["optimizer"].annotation))
def test_every_optimizer_moves_a_weight_by_about_the_learning_rate_on_its_first_step(name: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(128, 128))
    optimizer = build_optimizer([weight], section(optimizer=name, lr=1e-3), CPU)
    (weight.sum() * 2).backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((128, 128), -1e-3), rtol=1e-2, atol=0)


def test_eight_bit_states_are_eight_bit() -> None:
    weight = torch.nn.Parameter(torch.zeros(128, 128))
    optimizer = build_optimizer([weight], section(optimizer="paged_adamw_8bit"), CPU)
    weight.sum().backward()
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8


def test_a_paged_optimizer_on_a_cpu_says_that_it_does_not_page() -> None:
    assert "nothing pages" in paging_note(section(optimizer="paged_adamw_8bit"), CPU)
    assert paging_note(section(optimizer="adamw_8bit"), CPU) == ""
    assert paging_note(section(optimizer="paged_adamw_8bit"), torch.device("cuda", 0)) == ""


@pytest.mark.parametrize(
    ("schedule", "raised", "expected"),
    [
        ("constant", [(2, 6)], [1, 1, 1, 1, 1, 1]),
        ("linear", [(2, 6)], [1, 0.75, 0.5, 0.375, 0.25, 0.125]),
        ("linear", [(2, 6), (4, 8)], [1, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625]),
        ("cosine", [(2, 6)], [1, 0.853553, 0.5, 0.426777, 0.25, 0.073223]),
        ("linear", [(2, 3)], [1, 0.75, 0.5]),
        ("linear", [(4, 6)], [1, 0.75, 0.5, 0.25, 0, 0]),
    ],
)
def test_a_raised_number_of_steps_lets_the_rate_fall_from_where_it_was(
    schedule: str, raised: list[tuple[int, int]], expected: list[float]
) -> None:
    train = section(schedule=schedule)
    assert [lr_at(step, 4, train, raised) for step in range(len(expected))] == pytest.approx(expected, abs=1e-6)


def test_a_warm_up_keeps_its_length_when_steps_are_raised_in_it() -> None:
    train = section(schedule="linear", warmup_ratio=0.5)
    assert [lr_at(step, 8, train, [(2, 12)]) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.875])


@given(
    total=st.integers(2, 60),
    at=st.integers(1, 60),
    more=st.integers(1, 60),
    schedule=st.sampled_from(["constant_with_warmup", "linear", "cosine"]),
)
def test_the_rate_never_jumps_where_steps_were_raised(total: int, at: int, more: int, schedule: str) -> None:
    train, at = section(schedule=schedule, warmup_ratio=0.1), min(at, total)
    raised = [(at, total + more)]
    warmup = warmup_steps(train, total)
    assert lr_at(at, total, train, raised) == pytest.approx(lr_at(at, total, train), abs=1e-12) or at < warmup
    rates = [lr_at(step, total, train, raised) for step in range(max(at, warmup), total + more)]
    assert rates == sorted(rates, reverse=True)
