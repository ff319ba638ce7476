"""Rows of judgments: what is read, what is refused with file and line; percent of a baseline against a plain twin."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_cli.errors import DataError
from qlora_cli.evaluation.judgments import (
    Scored,
    both_orders,
    percent_of_baseline,
    read_scores,
    read_verdicts,
)
from tests.conftest import write_jsonl

VERDICT = {"question_id": 1, "model_a": "x", "model_b": "y", "winner": "a", "judge": "j"}
SCORES = {"question_id": 1, "model_a": "x", "model_b": "y", "score_a": 8, "score_b": 6.5}


def test_verdicts_are_read_as_they_stand(tmp_path: Path) -> None:
    rows = [VERDICT, VERDICT | {"winner": "b", "question_id": "q7"}, VERDICT | {"winner": "tie", "judge": None}]
    path = write_jsonl(tmp_path / "v.jsonl", [*rows, {**VERDICT, "more": [1]}])
    found = read_verdicts([str(path)])
    assert [each.points for each in found.rows] == [1.0, 0.0, 0.5, 1.0]
    assert [each.question for each in found.rows] == ["1", "q7", "1", "1"]
    assert [each.judge for each in found.rows] == ["j", "j", "", "j"]
    assert {(each.first, each.second) for each in found.rows} == {("x", "y")}
    assert found.rows[2].where == f"{path}:3"
    assert (found.files, found.bad) == ((str(path),), ())


@pytest.mark.parametrize(
    ("orders", "read"),
    [(["a", "b"], (1.0, 0.0)), (["tie", "a"], (0.5, 1.0)), (["a"], None), ("ab", None), ([1, []], None)],
)
def test_a_row_that_sums_up_both_orders_tells_them(orders: Any, read: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "v.jsonl", [VERDICT | {"winner": "tie", "orders": orders}])
    only = read_verdicts([str(path)]).rows[0]
    assert (only.points, only.orders) == (0.5, read)


BAD = [
    (VERDICT | {"winner": "A"}, "winner must be a, b or tie (got 'A')"),
    (VERDICT | {"winner": ["a"]}, "winner must be a, b or tie (got \"['a']\")"),
    (
        {key: VERDICT[key] for key in ("question_id", "model_a", "model_b")},
        "winner must be a, b or tie (it is missing)",
    ),
    (SCORES, "has scores and no winner"),
    (VERDICT | {"model_b": "x"}, "model_a and model_b are both x"),
    (VERDICT | {"model_b": " "}, "model_b must be the name of a model (got ' ')"),
    (VERDICT | {"model_a": 7}, "model_a must be the name of a model (got '7')"),
    (VERDICT | {"question_id": None}, "question_id must be text or a whole number (got 'None')"),
    (VERDICT | {"question_id": True}, "question_id must be text or a whole number (got 'True')"),
    (VERDICT | {"judge": 3}, "judge must be text (got '3')"),
    ([VERDICT], "a row must be a JSON object"),
]
BAD_SCORES = [
    (SCORES | {"score_a": 10.1}, "score_a must be a number from 0 to 10 (got '10.1')"),
    (SCORES | {"score_b": -1}, "score_b must be a number from 0 to 10 (got '-1')"),
    (SCORES | {"score_b": "8"}, "score_b must be a number from 0 to 10 (got '8')"),
    (SCORES | {"score_b": True}, "score_b must be a number from 0 to 10 (got 'True')"),
    ({key: SCORES[key] for key in ("question_id", "model_a", "model_b", "score_a")}, "score_b must be a number"),
    (VERDICT, "has a winner and no scores"),
]


def check_refused(read: Callable[..., Any], good: Any, bad: Any, what: str, path: Path) -> None:
    write_jsonl(path, [good, bad, good])
    with pytest.raises(DataError) as caught:
        read([str(path)])
    assert caught.value.exit_code == 4
    assert [each.where for each in caught.value.problems] == [f"{path}:2"]
    assert what in caught.value.problems[0].what
    left = read([str(path)], skip_bad=True)
    assert (len(left.rows), [each.where for each in left.bad]) == (2, [f"{path}:2"])


@pytest.mark.parametrize(("bad", "what"), BAD)
def test_a_row_that_is_no_verdict_is_named_or_left_out_and_kept_in_the_count(
    bad: Any, what: str, tmp_path: Path
) -> None:
    check_refused(read_verdicts, VERDICT, bad, what, tmp_path / "v.jsonl")


@pytest.mark.parametrize(("bad", "what"), BAD_SCORES)
def test_a_row_that_has_no_scores_is_named_or_left_out_and_kept_in_the_count(
    bad: Any, what: str, tmp_path: Path
) -> None:
    check_refused(read_scores, SCORES, bad, what, tmp_path / "s.jsonl")


def test_many_bad_rows_of_several_files_are_one_error_with_ten_names_and_a_count(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "1.jsonl", [VERDICT] + [VERDICT | {"winner": "?"}] * 8)
    two = write_jsonl(tmp_path / "2.jsonl", [VERDICT | {"winner": "?"}] * 5)
    with pytest.raises(DataError) as caught:
        read_verdicts([str(one), str(two)])
    places = [each.where for each in caught.value.problems]
    assert places == [f"{one}:{i}" for i in range(2, 10)] + [f"{two}:1", f"{two}:2", ""]
    assert caught.value.problems[-1].what == "3 more rows like these"


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error_even_beside_a_full_one(content: str, skip_bad: bool, tmp_path: Path) -> None:
    full, empty = write_jsonl(tmp_path / "full.jsonl", [VERDICT]), tmp_path / "empty.jsonl"
    empty.write_text(content)
    with pytest.raises(DataError, match="has no rows") as caught:
        read_verdicts([str(full), str(empty)], skip_bad)
    assert caught.value.problems[0].where == f"{empty}:1"


def test_a_file_whose_rest_cannot_be_read_is_never_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(f"[{json.dumps(VERDICT)}, {json.dumps(VERDICT)[:30]}")
    with pytest.raises(DataError) as caught:
        read_verdicts([str(path)], skip_bad=True)
    assert caught.value.problems[0].where == f"{path}:2"


def test_nothing_but_bad_rows_is_an_error_though_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "v.jsonl", [VERDICT | {"winner": 0}])
    with pytest.raises(DataError, match="winner must be"):
        read_verdicts([str(path)], skip_bad=True)


def test_a_missing_file_and_one_that_is_named_twice_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "v.jsonl", [VERDICT])
    with pytest.raises(DataError, match="no such file"):
        read_verdicts(["owner/none"])
    with pytest.raises(DataError, match="named twice"):
        read_verdicts(["v.jsonl", str(tmp_path / "v.jsonl")])
    with pytest.raises(DataError, match="named twice"):
        read_verdicts(["v.jsonl", "*.jsonl"])
    assert len(read_verdicts(["*.jsonl"]).rows) == 1


def scored(question: str, first: str, second: str, scores: tuple[float, float], judge: str = "") -> Scored:
    return Scored(question, first, second, judge, f"f:{question}", scores)


def drawn(questions: int, seed: int = 0) -> list[Scored]:
    """Scores of m and n against base, in both orders."""
    pick = random.Random(seed)
    return [
        scored(str(i), *pair, (pick.randint(5, 10), pick.randint(3, 9)))
        for i in range(questions)
        for model in "mn"
        for pair in (("base", model), (model, "base"))
    ]


def test_percent_is_that_of_totals_in_each_order_and_their_mean() -> None:
    rows = [scored("1", "base", "m", (8, 6)), scored("1", "m", "base", (9, 5))]
    rows += [scored("2", "base", "m", (2, 2)), scored("2", "m", "base", (3, 5))]
    pairs, problems = both_orders(rows, "base")
    found = percent_of_baseline(pairs)[0]
    assert problems == []
    assert (found.model, found.questions, found.pairs) == ("m", 2, 2)
    assert found.baseline_first == pytest.approx(100 * (6 + 2) / (8 + 2))
    assert found.baseline_second == pytest.approx(100 * (9 + 3) / (5 + 5))
    assert found.mean == pytest.approx((80 + 120) / 2)


def test_models_are_compared_each_on_their_own_and_the_best_comes_first() -> None:
    rows = drawn(20)
    found = percent_of_baseline(both_orders(rows, "base")[0])
    assert sorted(each.model for each in found) == ["m", "n"]
    assert found[0].mean > found[1].mean
    for each in found:
        alone = [row for row in rows if each.model in (row.first, row.second)]
        assert percent_of_baseline(both_orders(alone, "base")[0]) == [each]
        front = [row.scores for row in alone if row.first == "base"]
        back = [row.scores for row in alone if row.second == "base"]
        assert each.baseline_first == pytest.approx(100 * sum(s[1] for s in front) / sum(s[0] for s in front))
        assert each.baseline_second == pytest.approx(100 * sum(s[0] for s in back) / sum(s[1] for s in back))


def test_the_interval_is_that_of_a_bootstrap_over_questions_written_out() -> None:
    rows = [row for row in drawn(12, 3) if "n" not in (row.first, row.second)]
    found = percent_of_baseline(both_orders(rows, "base")[0], seed=4)[0]
    means = []
    pick = random.Random(9)
    for _ in range(4000):
        taken = [pick.randrange(12) for _ in range(12)]
        front = [rows[2 * i].scores for i in taken]
        back = [rows[2 * i + 1].scores for i in taken]
        one = sum(s[1] for s in front) / sum(s[0] for s in front)
        means.append(50 * (one + sum(s[0] for s in back) / sum(s[1] for s in back)))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1.5)
    assert found.low < found.mean < found.high
    assert percent_of_baseline(both_orders(rows, "base")[0], seed=4)[0] == found


def test_judges_of_one_question_are_drawn_together() -> None:
    once = [row for row in drawn(10) if "n" not in (row.first, row.second)]
    again = [scored(row.question, row.first, row.second, row.scores, "second judge") for row in once]
    one, two = (percent_of_baseline(both_orders(rows, "base")[0])[0] for rows in (once, once + again))
    assert (two.questions, two.pairs) == (10, 20)
    assert (two.mean, two.low, two.high) == pytest.approx((one.mean, one.low, one.high))


def test_one_question_has_no_interval() -> None:
    found = percent_of_baseline(both_orders(drawn(1), "base")[0])
    assert [np.isnan(each.low) and np.isnan(each.high) for each in found] == [True, True]


def test_rows_without_a_partner_are_named_and_the_others_paired() -> None:
    rows = [*drawn(2), scored("7", "base", "m", (5, 5)), scored("8", "m", "base", (5, 5))]
    rows += [scored("9", "m", "n", (5, 5)), scored("0", "base", "m", (1, 1))]
    rows += [scored("5", "base", "m", (5, 5), "j"), scored("5", "m", "base", (5, 5), "k")]
    pairs, problems = both_orders(rows, "base")
    assert len(pairs) == 4
    assert [each.where for each in problems] == ["f:9", "f:0", "f:7", "f:8", "f:5", "f:5"]
    assert "neither model is the baseline base" in problems[0].what
    assert "is graded in this order before, at f:0" in problems[1].what
    assert "with the baseline first only" in problems[2].what
    assert problems[2].fix == "grade model_a m, model_b base too"
    assert "with the baseline second only" in problems[3].what


def test_a_baseline_without_any_points_is_an_error() -> None:
    rows = [scored("1", "base", "m", (0, 6)), scored("1", "m", "base", (9, 0))]
    with pytest.raises(DataError, match="add up to 0"):
        percent_of_baseline(both_orders(rows, "base")[0])


def test_a_resample_of_zeros_leaves_the_bound_open_and_nothing_else() -> None:
    rows = [scored("1", "base", "m", (0, 6)), scored("1", "m", "base", (9, 0))]
    rows += [scored("2", "base", "m", (4, 6)), scored("2", "m", "base", (9, 4))]
    found = percent_of_baseline(both_orders(rows, "base")[0])[0]
    assert found.mean == pytest.approx((300 + 450) / 2)
    assert np.isfinite(found.low)
    assert found.high == np.inf
