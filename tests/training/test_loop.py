"""The loop: token means over whole steps, exact repetition, and stops before a bad update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_cli.data.batches import Batching, Order
from qlora_cli.data.encode import Encoded
from qlora_cli.errors import DeviceMemoryError, NonFiniteError
from qlora_cli.model.engine import build_engine, plain_engine
from qlora_cli.model.ranks import Ranks
from qlora_cli.recipe.schema import TrainSection
from qlora_cli.training.best import Best
from qlora_cli.training.guard import memory_guard
from qlora_cli.training.loop import Job, StepReport, _clip, train_steps
from qlora_cli.training.optim import build_optimizer
from tests.model.test_lora import adapted


def row(length: int, targets: int, index: int) -> Encoded:
    """`length` tokens of which the last `targets` carry loss."""
    ids = (np.arange(length, dtype=np.int32) * 7 + index) % 200 + 60
    return Encoded(ids, np.arange(length) >= length - targets, f"rows.jsonl:{index + 1}")


ROWS = [row(5 + 3 * i, 1 + 2 * i, i) for i in range(6)]


CPU = torch.device("cpu")


def make_job(base: Path, section: TrainSection, lora: dict[str, Any] | None = None) -> tuple[Job, Any]:
    """A tiny model on ROWS, and its adapter's layers; with packing as the engine computes it, else plain."""
    model, layers = adapted(base, **(lora or {}))
    engine = build_engine(model, list(layers.values()), compiled=False) if section.packing else plain_engine(model)
    assert engine.packs == section.packing
    parameters = [p for layer in layers.values() for p in (layer.lora_a, layer.lora_b)]
    optimizer = build_optimizer(parameters, section, CPU)
    order = Order(tuple(len(r) for r in ROWS), section.batch_size, section.seed)
    batching = Batching(section.micro_batch_size, 24, section.packing)
    steps = section.steps or 1
    return Job(
        model, engine.loss, parameters, optimizer, ROWS, order, batching, steps, steps * section.batch_size
    ), layers


def run(base: Path, steps: int = 2, lora: dict[str, Any] | None = None, **train: Any) -> tuple[list[StepReport], Any]:
    """Trains a tiny model on ROWS, all six a step; returns the reports and the adapter's layers."""
    values: dict[str, Any] = {"batch_size": 6, "steps": steps, "optimizer": "adamw", "lr": 1e-2, "packing": False}
    section = TrainSection(**(values | train))
    job, layers = make_job(base, section, lora)
    return list(train_steps(job, section, Ranks(CPU))), layers


def test_loss_is_the_mean_over_all_target_tokens_of_the_step(base: Path) -> None:
    model, _ = adapted(base)
    losses = []
    for encoded in ROWS:
        ids = torch.from_numpy(encoded.ids.astype(np.int64))[None]
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = torch.from_numpy(encoded.loss[1:])
        losses += [-logits[i, ids[0, i + 1]].item() for i in range(len(chosen)) if chosen[i]]
    report = run(base, steps=1)[0][0]
    assert report.targets == len(losses) == 36
    assert report.rows == 6
    assert report.tokens == sum(map(len, ROWS))
    assert report.loss == pytest.approx(sum(losses) / 36, rel=1e-5)


@pytest.mark.parametrize("micro", [2, 3, 6])
def test_splitting_a_step_into_micro_batches_changes_neither_loss_nor_gradient_norm(base: Path, micro: int) -> None:
    one, _ = run(base, micro_batch_size=1)
    other, _ = run(base, micro_batch_size=micro)
    for a, b in zip(one, other, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)


def test_the_same_run_twice_gives_the_same_adapter_bit_for_bit_with_dropout(base: Path) -> None:
    (first, one), (second, two) = (run(base, 3, {"dropout": 0.2}, micro_batch_size=2) for _ in range(2))
    assert [r.loss for r in first] == [r.loss for r in second]
    assert one
    for name in one:
        assert torch.equal(one[name].lora_a, two[name].lora_a)
        assert torch.equal(one[name].lora_b, two[name].lora_b)


def test_another_seed_gives_another_adapter(base: Path) -> None:
    one, two = run(base, 1, {"dropout": 0.2})[1], run(base, 1, {"dropout": 0.2}, seed=1)[1]
    assert any(not torch.equal(one[name].lora_b, two[name].lora_b) for name in one)


@pytest.mark.parametrize(("most", "expected"), [(None, [3.0, 4.0]), (10.0, [3.0, 4.0]), (0.5, [0.3, 0.4])])
def test_summed_gradients_are_divided_by_the_targets_and_then_clipped(
    most: float | None, expected: list[float]
) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([6.0]), torch.tensor([8.0])
    assert _clip(parameters, targets=2, max_norm=most) == pytest.approx(5.0)
    assert [float(p.grad) for p in parameters[:2] if p.grad is not None] == pytest.approx(expected, rel=1e-5)
    assert parameters[2].grad is None


def test_learning_falls_on_the_rows_it_sees(base: Path) -> None:
    reports, _ = run(base, 20, schedule="constant")
    assert reports[-1].loss < 0.9 * reports[0].loss


def test_a_gradient_that_is_not_finite_stops_the_run_before_any_update_and_names_the_rows(base: Path) -> None:
    section = TrainSection(batch_size=6, steps=1, optimizer="adamw", packing=False)
    job, layers = make_job(base, section)
    first = next(iter(layers.values()))
    with torch.no_grad():
        first.lora_a[0, 0] = torch.inf
    before = [p.detach().clone() for p in job.parameters]
    with pytest.raises(NonFiniteError, match=r"step 1: loss nan.*rows\.jsonl:1, rows"):
        list(train_steps(job, section, Ranks(CPU)))
    assert all(torch.equal(a, b) for a, b in zip(before, job.parameters, strict=True))


def test_running_out_of_memory_becomes_an_error_with_a_way_out() -> None:
    with pytest.raises(DeviceMemoryError, match="micro_batch_size"), memory_guard("training"):
        torch.empty(2**58, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="something else"), memory_guard("training"):
        raise RuntimeError("something else")


def test_best_takes_strictly_lower_losses_and_runs_out_of_patience() -> None:
    best = Best(patience=2)
    losses = [3.0, 2.0, 2.0, float("nan")]
    assert [best.update(i, loss) for i, loss in enumerate(losses)] == [True, True, False, False]
    assert (best.step, best.exhausted) == (1, True)
    assert not Best(patience=None, waited=99).exhausted
