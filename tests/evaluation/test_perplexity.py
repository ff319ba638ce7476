"""Held-out loss: a mean over tokens, the same however rows are batched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_cli.data.batches import Batching, collate
from qlora_cli.data.encode import Encoded
from qlora_cli.evaluation import perplexity
from qlora_cli.evaluation.perplexity import EvalResult, HeldOut
from qlora_cli.model.engine import build_engine
from qlora_cli.model.loss import plain_losses
from qlora_cli.model.ranks import Ranks
from tests.model.test_lora import adapted
from tests.training.test_loop import ROWS, run

CPU = torch.device("cpu")


def evaluate(model: Any, rows: Sequence[Encoded], size: int) -> EvalResult:
    """By the model's own forward."""
    held = HeldOut(rows, np.zeros(len(rows), np.int64), ("rows",), lambda ids: " " * len(ids))
    batching = Batching(size, 24, packed=False)
    return perplexity.evaluate(model, partial(plain_losses, model), held, batching, Ranks(CPU))


def test_loss_is_the_token_mean_that_training_reports_for_the_same_rows(base: Path) -> None:
    trained = run(base, steps=1)[0][0]
    result = evaluate(adapted(base)[0], ROWS, 2)
    assert result.loss == pytest.approx(trained.loss, rel=1e-5)
    assert (result.rows, result.targets, result.tokens) == (6, 36, sum(map(len, ROWS)))


@pytest.mark.parametrize("size", [1, 3, 6, 99])
def test_batch_size_does_not_change_the_loss(base: Path, size: int) -> None:
    model = adapted(base)[0]
    expected = evaluate(model, ROWS, 2).loss
    assert evaluate(model, ROWS, size).loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode(base: Path, training: bool) -> None:
    model = adapted(base)[0].train(training)
    evaluate(model, ROWS, 2)
    assert model.training is training


def test_dropout_is_off_while_evaluating(base: Path) -> None:
    model = adapted(base, dropout=0.5)[0].train()
    assert evaluate(model, ROWS, 2) == evaluate(model, ROWS, 2)


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert EvalResult(math.log(8), 1, 1, 1).perplexity == pytest.approx(8)
    assert EvalResult(1e6, 1, 1, 1).perplexity == math.inf


def test_bits_per_byte_count_what_the_targets_say_and_each_source_stands_alone(base: Path) -> None:
    model, sizes = adapted(base)[0], [3, 1, 4, 1, 5, 9]
    texts = iter("x" * size for size in sizes)
    held = HeldOut(ROWS, np.array([0, 0, 1, 1, 1, 0]), ("one", "two", "none"), lambda ids: next(texts))
    batching = Batching(2, 24, packed=False)
    result = perplexity.evaluate(model, partial(plain_losses, model), held, batching, Ranks(CPU))
    assert result.bytes == sum(sizes)
    assert result.bits_per_byte == pytest.approx(result.loss * result.targets / math.log(2) / sum(sizes))
    one, two = result.sources
    assert (one.name, one.rows, one.bytes, two.name, two.rows, two.bytes) == ("one", 3, 13, "two", 3, 10)
    alone = evaluate(model, [ROWS[i] for i in (2, 3, 4)], 2)
    assert two.loss == pytest.approx(alone.loss, rel=1e-6)
    assert (two.targets, two.tokens) == (alone.targets, alone.tokens)
    assert EvalResult.read(result.as_json()) == result


def test_a_character_that_is_cut_counts_the_bytes_that_are_there(tokenizer: Any) -> None:
    ids = np.array(tokenizer("\u20acab\u20ac", add_special_tokens=False).input_ids, np.int32)
    assert len(ids) == 3 + 1 + 1 + 3
    for start, stop in ((0, 8), (0, 7), (1, 6), (2, 5)):
        loss = np.ones(stop - start, np.bool_)
        held = HeldOut([Encoded(ids[start:stop], loss, "")], np.zeros(1, np.int64), ("rows",), tokenizer.decode)
        lost_at_the_end = {7: 1}.get(stop, 0)  # two of three bytes are decoded as one sign
        assert held.bytes.tolist() == [stop - start - 1 - lost_at_the_end]


def test_a_packed_evaluation_gives_each_row_the_loss_that_it_has_alone(base: Path) -> None:
    model = adapted(base)[0]
    engine = build_engine(model, (), compiled=False)
    assert engine.packs
    packed = perplexity.sequence_losses(model, engine.losses, ROWS, Batching(2, 24, packed=True), Ranks(CPU))
    for row, found in zip(ROWS, packed, strict=True):
        moved = collate([row])
        with torch.no_grad():
            logits = model(input_ids=moved.ids).logits[0].float()
        losses = -logits.log_softmax(-1)[torch.arange(len(row) - 1), moved.ids[0, 1:]]
        assert found == pytest.approx(float(losses[moved.targets[0, :-1]].sum()), rel=1e-4)


def test_rows_of_many_windows_are_all_measured_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_cli.evaluation.perplexity.AT_ONCE", 2)
    batches = perplexity.divided(ROWS, Batching(3, 24, packed=True))
    assert sorted(map(id, (row for batch in batches for row in batch))) == sorted(map(id, ROWS))
    assert len(batches) >= 3


def test_figures_survive_json_even_where_they_are_not_numbers() -> None:
    result = EvalResult(math.nan, 1, 2, 3)
    assert result.as_json()["loss"] is None
    assert math.isnan(EvalResult.read(result.as_json()).loss)
    assert EvalResult.read({"loss": 1.5, "rows": 1, "tokens": 2, "targets": 3}) == EvalResult(1.5, 1, 2, 3)
