"""Held-out loss: a mean over tokens, the same however rows are batched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.data.batches import Batching
from qlora_cli.data.encode import Encoded
from qlora_cli.evaluation import perplexity
from qlora_cli.evaluation.perplexity import EvalResult
from qlora_cli.model.loss import plain_loss
from qlora_cli.model.ranks import Ranks
from tests.model.test_lora import adapted
from tests.training.test_loop import ROWS, run

CPU = torch.device("cpu")


def evaluate(model: Any, rows: Sequence[Encoded], size: int) -> EvalResult:
    """By the model's own forward."""
    return perplexity.evaluate(model, partial(plain_loss, model), rows, Batching(size, 24, packed=False), Ranks(CPU))


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
