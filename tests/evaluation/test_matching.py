"""Right or wrong by a rule, and two models compared by it."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_cli.evaluation.intervals import mcnemar, wilson
from qlora_cli.evaluation.matching import PLAIN, REGEX, Score, compare, match_of, scores
from qlora_cli.recipe import metrics
from qlora_cli.recipe.metrics import PLAIN_METRICS, metric_problem

CASES = [
    ("exact", "a b", " a b\n", True),
    ("exact", "a  b", "a b", False),
    ("exact", "A", "a", False),
    ("contains", "the answer is Paris.", "paris", True),
    ("contains", "Par is", "Paris", False),
    ("json", '{"a": [1, 2.5e3, null]}', "", True),
    ("json", " [] \n", "", True),
    ("json", '{"a": NaN}', "", False),
    ("json", "Infinity", "", False),
    ("json", "{'a': 1}", "", False),
    ("json", "", "", False),
    ("json", "[" * 100_000, "", False),
    ("regex:^\\d+$", "12", "", True),
    ("regex:^\\d+$", "12a", "", False),
    ("regex:b.", "abc", "", True),
]


@pytest.mark.parametrize(("metric", "answer", "wanted", "right"), CASES)
def test_a_metric_says_whether_an_answer_is_right(metric: str, answer: str, wanted: str, right: bool) -> None:
    assert match_of(metric)(answer, wanted) is right


def test_the_names_that_a_recipe_takes_are_those_that_can_be_computed() -> None:
    assert set(PLAIN) == set(PLAIN_METRICS)
    assert REGEX == metrics.REGEX
    assert [metric_problem(name) for name in PLAIN_METRICS] == ["", "", ""]
    assert metric_problem("regex:a+") == ""
    for wrong in ("regex:", "regex", "Exact", "", "regex:("):
        assert "(got " in metric_problem(wrong)


def test_scores_are_over_the_same_rows_each_with_its_interval() -> None:
    exact, found = scores(["exact", "contains"], ["a", "b c", "x"], ["a", "c", "y"])
    assert exact.right.tolist() == [True, False, False]
    assert found.right.tolist() == [True, True, False]
    values = found.as_json()
    assert (values["metric"], values["right"], values["rows"]) == ("contains", 2, 3)
    assert (values["low"], values["high"]) == wilson(2, 3)


def test_a_comparison_is_paired_and_its_sign_is_that_of_the_first() -> None:
    first, second = np.array([1, 1, 1, 0, 1, 1], bool), np.array([1, 0, 0, 1, 0, 0], bool)
    found = compare(Score("exact", first), Score("exact", second))
    assert found.difference.mean == pytest.approx(3 / 6)
    assert (found.only_first, found.only_second, found.p) == (4, 1, mcnemar(4, 1))
    assert found.difference.low < found.difference.mean < found.difference.high
    same = compare(Score("exact", first), Score("exact", first))
    assert (same.difference.mean, same.difference.low, same.difference.high, same.p) == (0, 0, 0, 1)
