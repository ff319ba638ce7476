"""Intervals of shares and the exact test of pairs, against slow twins in whole numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.evaluation.intervals import NORMAL_95, mcnemar, wilson


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    """(right, rows), at least one row."""
    rows = draw(st.integers(1, 5000))
    return draw(st.integers(0, rows)), rows


def binomial(rows: int, share: float) -> list[float]:
    """The probability of each number of right rows."""
    return [math.comb(rows, k) * share**k * (1 - share) ** (rows - k) for k in range(rows + 1)]


def slow_p(only_first: int, only_second: int) -> Fraction:
    """Both tails of a fair coin, as far out as what was seen, in exact fractions."""
    rows, seen = only_first + only_second, abs(only_first - only_second)
    ways = sum(math.comb(rows, k) for k in range(rows + 1) if abs(rows - 2 * k) >= seen)
    return Fraction(ways, 2**rows)


@given(counts())
def test_the_bounds_are_the_shares_that_lie_1_96_deviations_from_what_was_seen(seen: tuple[int, int]) -> None:
    right, rows = seen
    low, high = wilson(right, rows)
    assert 0 <= low <= right / rows <= high <= 1
    assert low < high
    for bound in [*([low] if right else []), *([high] if right < rows else [])]:
        distance = abs(right / rows - bound) / math.sqrt(bound * (1 - bound) / rows)
        assert distance == pytest.approx(NORMAL_95, rel=1e-6)


@given(counts())
def test_the_interval_of_the_wrong_answers_is_the_mirror_image(seen: tuple[int, int]) -> None:
    right, rows = seen
    low, high = wilson(right, rows)
    assert wilson(rows - right, rows) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_a_textbook_case() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I


def test_shares_of_none_and_all_have_a_width_and_end_exactly_at_the_border() -> None:
    assert [wilson(0, 10)[0], wilson(10, 10)[1]] == [0.0, 1.0]
    assert wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert [wilson(7, 3_000_000_007)[0] > 0, wilson(10**9, 10**9)[1]] == [True, 1.0]


@pytest.mark.parametrize("rows", [10, 40, 200])
def test_about_95_of_100_intervals_hold_the_true_share_on_average_over_shares(rows: int) -> None:
    intervals = [wilson(k, rows) for k in range(rows + 1)]
    shares = [i / 100 for i in range(5, 96)]
    held = [
        sum(p for p, (low, high) in zip(binomial(rows, share), intervals, strict=True) if low <= share <= high)
        for share in shares
    ]
    assert sum(held) / len(held) == pytest.approx(0.95, abs=0.012)
    assert min(held) > 0.83  # Agresti and Coull 1998: it swings around 0.95, and dips near the ends


@settings(deadline=None)
@given(st.integers(0, 150), st.integers(0, 150))
def test_the_p_value_is_that_of_exact_fractions(only_first: int, only_second: int) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(float(slow_p(only_first, only_second)), rel=1e-11)
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first)


def test_known_p_values() -> None:
    assert [mcnemar(0, 0), mcnemar(4, 4), mcnemar(1, 0)] == [1.0, 1.0, 1.0]
    assert all(1 - 1e-9 < mcnemar(k, k + 1) <= 1 for k in range(2000))
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(12, 3) == pytest.approx(1152 / 32768)  # 2 (1 + 15 + 105 + 455) / 2^15


@pytest.mark.parametrize(("only_first", "only_second"), [(2_400, 2_600), (5_000, 5_001), (9_000, 11_000)])
def test_counts_whose_powers_of_two_no_float_holds_have_a_p_value_too(only_first: int, only_second: int) -> None:
    rows, fewer = only_first + only_second, min(only_first, only_second)
    ways = total = 1
    for k in range(1, fewer + 1):
        ways = ways * (rows - k + 1) // k
        total += ways
    exact = min(1.0, float(Fraction(2 * total, 2**rows)))
    assert exact > 0
    assert mcnemar(only_first, only_second) == pytest.approx(exact, rel=1e-9)


def test_a_p_value_too_small_for_a_float_is_0_and_millions_of_rows_take_no_longer() -> None:
    assert mcnemar(0, 5_000) == 0.0
    normal = math.erfc(10**5 / math.sqrt(2 * 10**9) / math.sqrt(2))  # what the binomial tends to
    assert mcnemar(10**9, 10**9 + 10**5) == pytest.approx(normal, rel=1e-3)
