"""The rehearsal: the largest micro-batch, tried before the first step, without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.data.batches import Batching, Order
from qlora_cli.errors import DeviceMemoryError
from qlora_cli.model.loss import plain_losses
from qlora_cli.model.ranks import Ranks
from qlora_cli.recipe.schema import TrainSection
from qlora_cli.training.loop import Job, StepReport, train_steps
from qlora_cli.training.optim import allocate_state
from qlora_cli.training.rehearsal import largest, rehearse, rehearse_evaluation
from tests.training.test_loop import CPU, ROWS, make_job, row

OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


def section(**values: Any) -> TrainSection:
    return TrainSection.model_validate({"batch_size": 6, "steps": 3, "optimizer": "adamw", "lr": 1e-2} | values)


@contextmanager
def room_for(job: Job, positions: int) -> Iterator[None]:
    """A machine on which more than so many positions at once run out of memory."""

    def allocate(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > positions:
            raise torch.OutOfMemoryError("out of memory")

    handle = job.model.base_model.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def finish(job: Job, train: TrainSection) -> tuple[list[StepReport], list[torch.Tensor]]:
    reports = list(train_steps(job, train, Ranks(CPU)))
    return reports, [parameter.detach().clone() for parameter in job.parameters]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("packing", [True, False])
def test_a_rehearsal_changes_nothing_of_the_run(base: Path, optimizer: str, packing: bool) -> None:
    train = section(optimizer=optimizer, packing=packing)
    plain, rehearsed = (make_job(base, train, {"dropout": 0.2})[0] for _ in range(2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = rehearse(rehearsed, Ranks(CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in rehearsed.parameters)
    assert found.positions > 0
    (one, first), (two, second) = finish(plain, train), finish(rehearsed, train)
    assert [r.loss for r in one] == [r.loss for r in two]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_has_its_state_before_the_first_step(base: Path, optimizer: str) -> None:
    train = section(optimizer=optimizer)
    stepped, allocated = (make_job(base, train)[0] for _ in range(2))
    finish(replace(stepped, total_steps=1), train)
    allocate_state(allocated.optimizer)
    for one, other in zip(stepped.parameters, allocated.parameters, strict=True):
        after, before = stepped.optimizer.state[one], allocated.optimizer.state[other]
        shapes = {key: value.shape for key, value in after.items() if isinstance(value, torch.Tensor)}
        assert shapes == {key: value.shape for key, value in before.items() if isinstance(value, torch.Tensor)}
        assert after.keys() == before.keys()


@pytest.mark.parametrize("batching", [Batching(1, 150, True), Batching(2, 150, True), Batching(2, 150, False)])
def test_the_largest_micro_batch_of_the_whole_run_is_found(base: Path, batching: Batching) -> None:
    job, _ = make_job(base, section(batch_size=4, steps=7))
    rows = [row(5 + 17 * i, 1, i) for i in range(9)]
    job = replace(job, batching=batching, rows=rows, order=Order(tuple(map(len, rows)), 4, 0))
    every = [batching.positions(part) for step in range(7) for part in batching.split(job.step_rows(step))]
    assert batching.positions(largest(job)) == max(every)
    assert len(set(every)) > 1


def test_a_rehearsal_that_fails_names_values_that_fit(base: Path) -> None:
    train = section(micro_batch_size=4)
    job, _ = make_job(base, train)
    with room_for(job, 64), pytest.raises(DeviceMemoryError) as caught:
        rehearse(job, Ranks(CPU))
    assert caught.value.exit_code == 7
    assert "set train.micro_batch_size to 2, with which the rehearsal passed" in caught.value.problems[0].fix
    smaller, _ = make_job(base, section(micro_batch_size=2))
    with room_for(smaller, 64):
        rehearse(smaller, Ranks(CPU))


def test_rows_that_are_too_long_by_themselves_give_a_max_length_that_fits(base: Path) -> None:
    job, _ = make_job(base, section())
    job = replace(job, batching=Batching(1, 128, True))
    with room_for(job, 64), pytest.raises(DeviceMemoryError) as caught:
        rehearse(job, Ranks(CPU))
    assert "set data.max_length to 64, with which" in caught.value.problems[0].fix


def test_an_evaluation_is_rehearsed_too(base: Path) -> None:
    job, _ = make_job(base, section())
    with room_for(job, 64), pytest.raises(DeviceMemoryError, match="evaluation"):
        rehearse_evaluation(job.model, partial(plain_losses, job.model), [ROWS], Batching(6, 24, True), Ranks(CPU))
    rehearse_evaluation(job.model.train(), partial(plain_losses, job.model), [ROWS], Batching(6, 24, True), Ranks(CPU))
    assert job.model.training


def test_a_step_that_runs_out_of_memory_is_done_again_in_smaller_micro_batches(base: Path) -> None:
    train = section(micro_batch_size=4)
    (whole, _), (tight, _) = make_job(base, train), make_job(base, train)
    expected, wanted = finish(whole, train)
    with room_for(tight, 64):
        found, got = finish(tight, train)
    assert [report.shrunk for report in found] == [Batching(2, 24, True), None, None]
    assert [report.shrunk for report in expected] == [None, None, None]
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-5)
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_row_that_does_not_fit_alone_ends_the_run(base: Path) -> None:
    train = section(micro_batch_size=4)
    job, _ = make_job(base, train)
    before = [parameter.detach().clone() for parameter in job.parameters]
    with room_for(job, 16), pytest.raises(DeviceMemoryError, match="training, step 1"):
        finish(job, train)
    assert all(torch.equal(a, b) for a, b in zip(before, job.parameters, strict=True))
