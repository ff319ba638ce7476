"""Bradley-Terry against another algorithm for it; games that leave the likelihood without a maximum; the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.evaluation.bradley_terry import SCALE, bradley_terry, points_table, question_intervals
from qlora_cli.evaluation.elo import Games
from tests.evaluation.test_elo import GAMES, Game, drawn, verdicts


def twin(points: np.ndarray, rounds: int = 20_000) -> list[float]:
    """The MM algorithm, equation 3 of Hunter 2004, as it reads."""
    count, strength = len(points), [1.0] * len(points)
    for _ in range(rounds):
        new = []
        for i in range(count):
            met = [(points[i][j] + points[j][i]) / (strength[i] + strength[j]) for j in range(count) if j != i]
            new.append(sum(points[i]) / sum(met))
        total = math.exp(sum(map(math.log, new)) / count)
        new = [each / total for each in new]
        if max(abs(a - b) / b for a, b in zip(strength, new, strict=True)) < 1e-13:
            break
        strength = new
    return [1000 + 400 * math.log10(each) for each in strength]


def fit(games: list[Game]) -> dict[str, float]:
    found = Games.of(verdicts(games))
    return dict(zip(found.models, bradley_terry(points_table(found)).ratings, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_maximum_is_that_of_the_mm_algorithm(seed: int) -> None:
    points = np.random.default_rng(seed).integers(1, 60, (6, 6)).astype(float) / 2
    np.fill_diagonal(points, 0)
    assert bradley_terry(points).ratings == pytest.approx(twin(points), abs=1e-6)


def test_two_models_differ_by_the_logarithm_of_their_odds_and_a_tie_is_half_a_win() -> None:
    three_to_one = [("a", "b", 1.0)] * 3 + [("b", "a", 1.0)]
    expected = {"a": 1000 + 200 * math.log10(3), "b": 1000 - 200 * math.log10(3)}
    assert fit(three_to_one) == pytest.approx(expected)
    assert fit([("a", "b", 1.0)] * 2 + [("b", "a", 0.5)] * 2) == pytest.approx(expected)
    assert fit([("a", "b", 0.5)]) == pytest.approx({"a": 1000.0, "b": 1000.0})


def test_one_win_against_a_million_is_fitted_too() -> None:
    odds = bradley_terry(np.array([[0.0, 1e6], [1.0, 0.0]])).ratings
    assert odds[0] - odds[1] == pytest.approx(400 * 6, rel=1e-9)
    chain = np.array([[0.0, 1e5, 0.0, 0.0], [1.0, 0.0, 1e5, 0.0], [0.0, 1.0, 0.0, 1e5], [0.0, 0.0, 1.0, 0.0]])
    assert np.diff(bradley_terry(chain).ratings).tolist() == pytest.approx([-2000.0] * 3, rel=1e-9)


def test_tables_of_one_to_ten_billion_games_with_and_without_gaps_all_come_to_an_end() -> None:
    generator, whole = np.random.default_rng(0), 0
    for _ in range(300):
        count = int(generator.integers(2, 30))
        points = np.round(10 ** (generator.random((count, count)) * generator.integers(0, 11)))
        points[generator.random((count, count)) > generator.random() * 0.6] = 0
        np.fill_diagonal(points, 0)
        ratings = np.array(bradley_terry(points).ratings)
        rated = np.isfinite(ratings)
        inner, theta = points[np.ix_(rated, rated)], ratings[rated] / SCALE
        expected = (inner + inner.T) / (1 + np.exp(theta[None, :] - theta[:, None]))
        assert expected.sum(1).tolist() == pytest.approx(inner.sum(1).tolist(), abs=1e-8 * max(1, inner.sum()))
        whole += int(rated.sum() > 2)
    assert whole > 100


@settings(deadline=None)
@given(games=GAMES, data=st.data())
def test_the_order_of_games_and_the_names_make_no_difference(games: list[Game], data: st.DataObject) -> None:
    plain = fit(games)
    assert fit(data.draw(st.permutations(games))) == pytest.approx(plain, nan_ok=True)
    turned = {"a": "d", "b": "c", "c": "b", "d": "a"}
    if all(map(math.isfinite, plain.values())):
        renamed = fit([(turned[one], turned[other], points) for one, other, points in games])
        assert {turned[name]: rating for name, rating in renamed.items()} == pytest.approx(plain)


@settings(deadline=None)
@given(games=GAMES)
def test_at_the_maximum_each_model_has_as_many_points_as_expected(games: list[Game]) -> None:
    points = points_table(Games.of(verdicts(games)))
    ratings = np.array(bradley_terry(points).ratings)
    rated = np.isfinite(ratings)
    assert rated.any()
    assert ratings[rated].mean() == pytest.approx(1000)
    inner, theta = points[np.ix_(rated, rated)], ratings[rated] / SCALE
    expected = (inner + inner.T) / (1 + np.exp(theta[None, :] - theta[:, None]))
    assert expected.sum(1).tolist() == pytest.approx(inner.sum(1).tolist(), abs=1e-6)


def test_a_model_that_won_everything_is_above_and_one_that_lost_everything_below() -> None:
    games = [("a", "b", 1.0), ("a", "c", 1.0), ("b", "d", 1.0), ("c", "d", 1.0)]
    assert fit([*games, ("b", "c", 0.5)]) == {"a": math.inf, "b": 1000.0, "c": 1000.0, "d": -math.inf}
    only = fit([("a", "b", 1.0)] * 50)
    assert only == {"a": 1000.0, "b": -math.inf}


def test_models_that_no_game_connects_are_not_compared() -> None:
    found = fit([("a", "b", 0.5), ("b", "e", 0.5), ("c", "d", 0.5)])
    assert [found[name] for name in "abe"] == [1000.0] * 3
    assert math.isnan(found["c"])
    assert math.isnan(found["d"])


def test_games_that_each_lost_to_the_same_say_nothing_of_one_another() -> None:
    found = fit([("a", "b", 0.5), ("a", "c", 1.0), ("d", "c", 1.0)])
    assert (found["a"], found["b"], found["c"]) == (1000.0, 1000.0, -math.inf)
    assert math.isnan(found["d"])


def test_the_bootstrap_draws_questions_with_all_their_games() -> None:
    games = Games.of(verdicts(drawn(60, 5)))
    alone = question_intervals(games, [str(i) for i in range(60)])
    together = question_intervals(games, ["same" if i < 30 else "other" for i in range(60)])
    assert alone.bounds is not None
    assert together.bounds is not None
    for (low, high), rating in zip(alone.bounds, bradley_terry(points_table(games)).ratings, strict=True):
        assert low < rating < high
    assert together.bounds != alone.bounds
    assert question_intervals(games, [str(i) for i in range(60)]) == alone


def test_equal_questions_leave_no_doubt_about_questions() -> None:
    games = [("a", "b", 1.0), ("b", "a", 1.0), ("a", "b", 1.0)] * 10
    found = question_intervals(Games.of(verdicts(games)), [str(i // 3) for i in range(30)])
    assert found.bounds is not None
    ratings = [rating for rating in fit(games).values() for _ in "lh"]
    assert [bound for pair in found.bounds for bound in pair] == pytest.approx(ratings)


def test_about_95_of_100_intervals_hold_the_true_rating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_cli.evaluation.bradley_terry.RESAMPLES", 200)
    generator, held = np.random.default_rng(0), 0
    chance, truth = 1 / (1 + math.exp(-0.6)), 1000 + SCALE * 0.3
    for seed in range(40):
        games = [("a", "b", float(generator.random() < chance)) for _ in range(150)]
        found = question_intervals(Games.of(verdicts(games)), [str(i) for i in range(150)], seed=seed)
        assert found.bounds is not None
        held += found.bounds[0][0] <= truth <= found.bounds[0][1]
    assert 33 <= held <= 40


@pytest.mark.parametrize("games", [[("a", "b", 1.0)] * 9, [("a", "b", 1.0)] * 9 + [("b", "a", 1.0)]])
def test_no_interval_is_given_where_games_or_their_resamples_are_separated(games: list[Game]) -> None:
    found = question_intervals(Games.of(verdicts(games)), [str(i) for i in range(len(games))])
    assert found.bounds is None
    assert (found.split > 250) == (len(games) == 10)


def test_one_question_gives_no_interval() -> None:
    games = Games.of(verdicts([("a", "b", 1.0), ("b", "a", 1.0)]))
    assert question_intervals(games, ["1", "1"]).bounds is None
