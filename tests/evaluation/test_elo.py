"""Elo over many orders against a plain twin; what is conserved; the win table; the first position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.evaluation.elo import EloRule, Games, elo, play, position_bias, summary, win_tables
from qlora_cli.evaluation.judgments import Verdict

NAMES = ("a", "b", "c", "d")
Game = tuple[str, str, float]


def verdicts(games: Sequence[Game]) -> list[Verdict]:
    """Each game on a question of its own."""
    return [Verdict(str(i), first, second, "", f"f:{i}", points) for i, (first, second, points) in enumerate(games)]


def twin(games: Sequence[Game], k: float, start: float) -> dict[str, float]:
    """Elo as its definition reads, game after game."""
    ratings = {name: start for game in games for name in game[:2]}
    for first, second, points in games:
        expected = 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400))
        ratings[first] += k * (points - expected)
        ratings[second] += k * ((1 - points) - (1 - expected))
    return ratings


def drawn(count: int, seed: int) -> list[Game]:
    """Random games."""
    generator = np.random.default_rng(seed)
    pairs = list(itertools.permutations(NAMES, 2))
    return [(*pairs[generator.integers(12)], float(generator.integers(3)) / 2) for _ in range(count)]


GAMES = st.lists(
    st.tuples(st.permutations(NAMES), st.sampled_from([0.0, 0.5, 1.0])).map(lambda g: (g[0][0], g[0][1], g[1])),
    min_size=1,
    max_size=30,
)


def in_order(games: Sequence[Game], rule: EloRule) -> dict[str, float]:
    """Ratings after the games in the order in which they are given."""
    found = Games.of(verdicts(games))
    ratings = play(found, np.arange(len(games))[:, None], rule)[0]
    return dict(zip(found.models, map(float, ratings), strict=True))


@settings(deadline=None)
@given(games=GAMES, k=st.floats(0.1, 1000), start=st.floats(-1e4, 1e4))
def test_games_in_a_given_order_rate_as_the_definition_does(games: list[Game], k: float, start: float) -> None:
    assert in_order(games, EloRule(k, start)) == pytest.approx(twin(games, k, start), rel=1e-9, abs=1e-6)


def test_every_order_of_three_games_is_played_as_its_own() -> None:
    games = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "a", 0.5)]
    orders = list(itertools.permutations(range(3)))
    found = play(Games.of(verdicts(games)), np.array(orders).T, EloRule())
    for ratings, order in zip(found, orders, strict=True):
        assert ratings.tolist() == pytest.approx(list(map(twin([games[i] for i in order], 32, 1000).get, "abc")))
    assert len({round(float(each[0]), 6) for each in found}) > 1


def test_a_win_between_equals_moves_half_of_k_and_a_tie_nothing() -> None:
    assert in_order([("a", "b", 1.0)], EloRule()) == {"a": 1016.0, "b": 984.0}
    assert in_order([("a", "b", 0.5)], EloRule()) == {"a": 1000.0, "b": 1000.0}


@settings(deadline=None, max_examples=40)
@given(games=GAMES, seed=st.integers(0, 99))
def test_the_sum_of_all_ratings_stays_what_it_was(games: list[Game], seed: int) -> None:
    found = elo(Games.of(verdicts(games)), 7, seed)
    assert found.sum(1).tolist() == pytest.approx([1000.0 * found.shape[1]] * 7)


@settings(deadline=None)
@given(games=GAMES)
def test_swapping_two_names_swaps_their_ratings_and_turning_games_round_changes_nothing(games: list[Game]) -> None:
    swapped = {"a": "b", "b": "a", "c": "c", "d": "d"}
    plain = in_order(games, EloRule())
    renamed = in_order([(swapped[one], swapped[other], points) for one, other, points in games], EloRule())
    assert {swapped[name]: rating for name, rating in renamed.items()} == pytest.approx(plain)
    assert in_order([(other, one, 1 - points) for one, other, points in games], EloRule()) == pytest.approx(plain)


def test_random_orders_average_to_the_mean_over_all_orders() -> None:
    games = [("a", "b", 1.0), ("a", "b", 0.0), ("b", "c", 1.0), ("c", "a", 1.0), ("a", "c", 0.5)]
    every = [twin(order, 32, 1000) for order in itertools.permutations(games)]
    ratings = summary(elo(Games.of(verdicts(games)), 20_000, seed=1))
    for name, rating in zip("abc", ratings, strict=True):
        values = [each[name] for each in every]
        assert rating.mean == pytest.approx(float(np.mean(values)), abs=5 * rating.deviation / math.sqrt(20_000))
        assert rating.deviation == pytest.approx(float(np.std(values)), rel=0.03)
        assert min(values) - 1e-6 <= rating.spread_low < rating.mean < rating.spread_high <= max(values) + 1e-6


def test_each_order_plays_every_game_once_and_orders_differ() -> None:
    games = [("a", "b", 1.0)] * 3 + [("b", "a", 1.0)] * 2
    possible = {round(twin(order, 32, 1000)["a"], 6) for order in itertools.permutations(games)}
    found = {round(float(each), 6) for each in elo(Games.of(verdicts(games)), 300)[:, 0]}
    assert len(possible) == 10
    assert found == possible


def test_the_result_is_a_function_of_games_and_seed_not_of_rows_or_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    games = drawn(60, 0)
    found = elo(Games.of(verdicts(games)), 50, 3)
    assert np.array_equal(elo(Games.of(verdicts(games[::-1])), 50, 3), found)
    assert not np.array_equal(elo(Games.of(verdicts(games)), 50, 4), found)
    monkeypatch.setattr("qlora_cli.evaluation.elo.AT_ONCE", 7 * 60)
    assert np.array_equal(elo(Games.of(verdicts(games)), 50, 3), found)


def test_the_interval_of_the_mean_narrows_with_orders_and_the_spread_does_not() -> None:
    games = Games.of(verdicts(drawn(80, 1)))
    few, many = summary(elo(games, 100))[0], summary(elo(games, 10_000))[0]
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(10, rel=0.25)
    assert (few.spread_high - few.spread_low) / (many.spread_high - many.spread_low) == pytest.approx(1, rel=0.25)
    assert many.high - many.mean == pytest.approx(1.96 * many.deviation / 100, rel=1e-4)


def test_about_95_of_100_intervals_hold_the_mean_over_orders() -> None:
    games = Games.of(verdicts(drawn(30, 2)))
    truth = elo(games, 50_000, 99)[:, 0].mean()
    each = [summary(elo(games, 100, seed))[0] for seed in range(200)]
    assert 180 <= sum(rating.low <= truth <= rating.high for rating in each) <= 198


def test_one_order_has_a_rating_and_no_interval() -> None:
    only = summary(elo(Games.of(verdicts([("a", "b", 1.0)])), 1))[0]
    assert only.mean == 1016.0
    assert all(map(math.isnan, (only.low, only.high, only.deviation, only.spread_low, only.spread_high)))


def test_the_win_table_counts_each_game_once_from_both_sides() -> None:
    games = [("a", "b", 1.0), ("a", "b", 1.0), ("b", "a", 1.0), ("b", "a", 0.0), ("c", "a", 0.5)]
    won, tied = win_tables(Games.of(verdicts(games)))
    assert won.tolist() == [[0, 3, 0], [1, 0, 0], [0, 0, 0]]
    assert tied.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


def asked(question: str, first: str, second: str, points: float, judge: str = "j") -> Verdict:
    return Verdict(question, first, second, judge, "f:1", points)


def test_the_first_position_is_judged_by_pairs_in_both_orders() -> None:
    rows = [asked("1", "a", "b", 1.0), asked("1", "b", "a", 0.0)]  # a wins twice: no bias
    rows += [asked("2", "a", "b", 1.0), asked("2", "b", "a", 1.0)]  # whoever stands first
    rows += [asked("3", "b", "a", 0.0), asked("3", "a", "b", 0.0)]  # whoever stands second
    rows += [asked("4", "a", "b", 0.5), asked("4", "b", "a", 1.0)]
    rows += [asked("5", "a", "b", 1.0), asked("1", "b", "a", 1.0, "other judge"), asked("1", "c", "a", 1.0)]  # alone
    bias = position_bias(rows)
    assert (bias.first, bias.second, bias.tied) == (7, 3, 1)
    assert bias.all.mean == pytest.approx(7.5 / 11)
    assert (bias.pairs, bias.same, bias.first_twice, bias.second_twice, bias.one_tied) == (4, 1, 1, 1, 1)
    assert bias.paired is not None
    assert bias.paired.mean == pytest.approx((0.5 + 1 + 0 + 0.75) / 4)
    half = 1.96 * np.std([0.5, 1, 0, 0.75], ddof=1) / 2
    assert bias.paired.high - bias.paired.mean == pytest.approx(half, rel=1e-4)


def test_without_both_orders_there_is_no_paired_figure() -> None:
    bias = position_bias([asked("1", "a", "b", 1.0)])
    assert (bias.pairs, bias.paired, bias.all.mean) == (0, None, 1.0)
    assert math.isnan(bias.all.low)


def test_a_row_that_sums_up_both_orders_is_one_game_and_two_judgments_of_the_position() -> None:
    rows = [Verdict("1", "a", "b", "j", "f:1", 0.5, (1.0, 0.0)), Verdict("2", "a", "b", "j", "f:2", 1.0, (1.0, 1.0))]
    bias = position_bias(rows)
    assert len(Games.of(rows)) == 2
    assert (bias.first, bias.second, bias.tied) == (3, 1, 0)
    assert (bias.pairs, bias.same, bias.first_twice, bias.second_twice) == (2, 1, 1, 0)
    assert bias.paired is not None
    assert bias.paired.mean == 0.75
