"""The loss curve in plain text, character by character."""

from __future__ import annotations

import math
import random
import sys

import pytest

from qlora_cli.workflows.curve import LABEL, NARROWEST, curve

LARGEST = sys.float_info.max


def picture(text: str) -> list[str]:
    """The lines of a drawing."""
    return text.removeprefix("\n").rstrip(" \n").splitlines()


def test_both_losses_lie_on_their_steps_and_levels_and_the_legend_says_which_is_which() -> None:
    training = [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert curve(training, [(2, 4.0), (4, 2.0)], LABEL + 2 + 28, height=4) == picture("""
        4 |'        o
          |         '
          |                  .        o
        1 |                           .
          +----------------------------
           1                    4 steps
           '. training   o held out
    """)


def test_a_level_is_shown_to_half_a_row() -> None:
    assert curve([(step, float(5 - step)) for step in range(6)], [], LABEL + 2 + 16, height=3) == picture("""
        5 |'  .
          |      '  .
        0 |            '  .
          +----------------
           0        5 steps
           '. training
    """)


def test_steps_that_share_a_column_are_drawn_as_their_mean() -> None:
    shared = curve([(0, 1.0), (1, 3.0), (2, 0.0), (3, 0.5)], [], NARROWEST + 1, height=2)
    assert shared == picture("""
    1.333 |'
      0.5 | .
          +--
           3
    """)


def test_one_point_and_equal_values_lie_in_the_middle_with_their_value() -> None:
    assert curve([(7, 0.25)], [], 30, height=3) == picture("""
          |
     0.25 |'
          |
          +-------------------
           7
           '. training
    """)
    assert curve([(1, 2.0), (5, 2.0)], [(5, 2.0)], 16, height=3) == picture("""
          |
        2 |'   o
          |
          +-----
           5
    """)


def test_a_value_that_is_not_finite_is_marked_and_moves_no_axis() -> None:
    training = [(1, 2.0), (2, math.nan), (3, math.inf), (4, -math.inf), (5, 1.0)]
    assert curve(training, [], LABEL + 2 + 40, height=2) == picture("""
        2 |'        !         !         !
        1 |                                       .
          +----------------------------------------
           1                                5 steps
           '. training   ! not finite
    """)


def test_without_a_finite_value_there_is_no_number_on_the_axis() -> None:
    assert curve([], [(3, math.nan)], 30, height=2) == picture("""
          |!
          |
          +-------------------
           3
           ! not finite
    """)


def test_without_a_point_there_is_no_curve() -> None:
    assert curve([], [], 80) == []


@pytest.mark.parametrize("value", [LARGEST, -LARGEST, 5e-324, 1e-300, 0.0, -1.2345e-300])
def test_no_number_is_too_large_or_small(value: float) -> None:
    lines = curve([(1, value), (1, value), (2, -value), (3, 0.0)], [(3, value)], 40)
    assert len(lines) == 13
    assert max(map(len, lines)) <= 40
    assert "!" not in "".join(lines)


def test_no_line_is_wider_than_asked_for() -> None:
    noise = random.Random(0)
    widths = set()
    for width in range(NARROWEST, 60):
        for count in (1, 2, 50):
            last = 10 ** noise.randrange(1, 20)
            training = [(noise.randrange(last), noise.choice((noise.random(), math.nan, 1e300))) for _ in range(count)]
            lines = curve(training, training[::7], width)
            assert max(map(len, lines)) <= width
            assert [line for line in lines if line != line.rstrip()] == []
            widths.add(width)
    assert len(widths) == 60 - NARROWEST


def test_a_longer_run_does_not_change_the_size_of_the_drawing() -> None:
    short = curve([(1, 1.0), (9, 0.5)], [], 60)
    long = curve([(step, 1 / step) for step in range(1, 10_000)], [(5000, 0.5)], 60)
    assert len(short) == len(long) == 10 + 3
    assert max(map(len, short)) == max(map(len, long)) == 60
