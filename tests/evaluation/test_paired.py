"""Losses row by row, and how sure a difference of two models is."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_cli.data.encode import Encoded
from qlora_cli.evaluation.paired import Interval, RowLosses, paired_difference, row_losses
from tests.conftest import make_llama
from tests.evaluation.test_perplexity import evaluate


def row(length: int, where: str, seed: int = 0, first: int = 1) -> Encoded:
    """Random ids; loss from position `first` on."""
    ids = np.random.default_rng(seed + length).integers(5, 300, length).astype(np.int32)
    return Encoded(ids, np.arange(length) >= first, where)


ROWS = [row(5, "a:1"), row(40, "a:2", first=30), row(17, "a:3"), row(17, "a:3", 9), row(33, "a:4")]


def losses(sums: list[float], targets: list[int]) -> RowLosses:
    return RowLosses(tuple(map(str, range(len(sums)))), np.array(sums), np.array(targets), np.array(targets))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rows_add_up_to_the_loss_that_evaluation_reports(batch_size: int) -> None:
    model = make_llama()
    found = row_losses(model.eval(), ROWS, batch_size)
    whole = evaluate(model, ROWS, 2)
    assert found.loss == pytest.approx(whole.loss, rel=1e-6)
    assert found.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert int(found.targets.sum()) == whole.targets


def test_sequences_of_one_row_count_as_that_row_in_the_order_of_the_data() -> None:
    found = row_losses(make_llama().eval(), ROWS, 2)
    assert found.where == ("a:1", "a:2", "a:3", "a:4")
    assert found.targets.tolist() == [4, 10, 32, 32]
    alone = [row_losses(make_llama().eval(), [each], 1).sums[0] for each in ROWS]
    expected = [alone[0], alone[1], alone[2] + alone[3], alone[4]]
    assert found.sums.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_mean_is_over_tokens_and_the_same_model_differs_by_nothing() -> None:
    one, other = losses([10.0, 2.0], [10, 1]), losses([20.0, 2.0], [10, 1])
    assert paired_difference(one, other).mean == pytest.approx(10 / 11)
    assert paired_difference(one, one) == Interval(0.0, 0.0, 0.0)


def test_a_shift_of_every_token_has_no_width() -> None:
    targets = [3, 7, 20]
    one, other = losses([1.0, 5.0, 9.0], targets), losses([1.3, 5.7, 11.0], targets)
    found = paired_difference(one, other)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_the_interval_is_that_of_a_bootstrap_written_out() -> None:
    generator = np.random.default_rng(3)
    targets = generator.integers(1, 9, 12)
    one = losses(generator.random(12).tolist(), targets.tolist())
    other = losses(generator.random(12).tolist(), targets.tolist())
    drawn = np.random.default_rng(5).integers(0, 12, (2000, 12))
    means = [sum((other.sums - one.sums)[i] for i in d) / sum(targets[i] for i in d) for d in drawn]
    found = paired_difference(one, other, resamples=2000, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert found == paired_difference(one, other, resamples=2000, seed=5)
    assert found != paired_difference(one, other, resamples=2000, seed=6)


def test_about_95_of_100_intervals_hold_the_true_difference() -> None:
    generator = np.random.default_rng(0)
    targets, held = [10] * 60, 0
    for seed in range(200):
        noise = generator.normal(0.0, 4.0, 60)
        found = paired_difference(losses([0.0] * 60, targets), losses((2.0 + noise).tolist(), targets), 1000, seed)
        held += found.low <= 0.2 <= found.high
    assert 180 <= held <= 198


def test_many_rows_are_resampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = losses([1.0, 2.0, 5.0], [1, 2, 3]), losses([2.0, 2.0, 4.0], [1, 2, 3])
    whole = paired_difference(one, other, 500)
    monkeypatch.setattr("qlora_cli.evaluation.paired.RESAMPLED_AT_ONCE", 7)
    assert paired_difference(one, other, 500) == whole


def test_losses_of_other_rows_are_not_compared() -> None:
    with pytest.raises(AssertionError, match="not of the same rows"):
        paired_difference(losses([1.0], [1]), losses([1.0], [2]))
