"""What a judge is asked, and what counts as its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import qlora_cli
from qlora_cli.evaluation.endpoint import Message, RefusedError, Reply
from qlora_cli.evaluation.grading import GRADINGS, PROMPTS, Both, Prompts, Verdict, digest, grade, verdict_of

PAIRWISE, TEN = GRADINGS["pairwise"], GRADINGS["ten-point"]


class Judge:
    """Says what it is told to, and keeps what it is asked."""

    def __init__(self, *texts: str, finish: str = "stop") -> None:
        self._texts, self._finish = list(texts), finish
        self.asked: list[list[Message]] = []

    def __call__(self, messages: Sequence[Message]) -> Reply:
        self.asked.append(list(messages))
        return Reply(self._texts.pop(0), self._finish, 100, 10)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: 1", "first"),
        ("The second is right.\n\nVerdict: 2\n", "second"),
        ("**Verdict:** tie.", "tie"),
        ("VERDICT: TIE", "tie"),
        ("Verdict: [[1]]", "first"),
        ("Verdict: 1\nVerdict: 1", "first"),
        ("<think>\nVerdict: 2\n</think>\n`Verdict: 1`", "first"),
        ("Verdict: 1\nVerdict: 2", None),
        ("Verdict: 1 or 2", None),
        ("Verdict: 12", None),
        ("Verdict: 1\nI hope that helps", None),
        ("My verdict: 1", None),
        ("I prefer answer 1", None),
        ("Verdict:", None),
        ("1", None),
        ("Verdict: 3", None),
        ("<think>Verdict: 2", None),
        ("", None),
        ("\n \n", None),
    ],
)
def test_a_pairwise_verdict_is_the_last_line_in_its_form_and_nothing_else(text: str, verdict: Verdict | None) -> None:
    assert verdict_of(PAIRWISE, text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Scores: 8 7", (8.0, 7.0)),
        ("Both are fine.\n**Scores:** 8.5, 10", (8.5, 10.0)),
        ("scores: 1,10", (1.0, 10.0)),
        ("Scores: 0 5", None),
        ("Scores: 11 5", None),
        ("Scores: 10.5 5", None),
        ("Scores: -1 5", None),
        ("Scores: 8/10 7/10", None),
        ("Scores: 8", None),
        ("Scores: 8 7 6", None),
        ("Scores: 87", None),
        ("Scores: nan 7", None),
        ("Scores: 8 7\nScores: 7 8", None),
        ("8 7", None),
    ],
)
def test_scores_are_two_numbers_from_1_to_10_on_the_last_line(text: str, verdict: Verdict | None) -> None:
    assert verdict_of(TEN, text) == verdict


def test_a_verdict_the_first_time_is_asked_for_once() -> None:
    judge = Judge("Verdict: 2")
    graded = grade(PAIRWISE, judge, [{"role": "user", "content": "which?"}])
    assert (graded.verdict, graded.asked, graded.reply.tokens_in, graded.reason) == ("second", 1, 100, "")
    assert len(judge.asked) == 1


def test_what_says_no_verdict_is_asked_once_more_in_the_same_conversation() -> None:
    judge = Judge("well", "Verdict: tie")
    graded = grade(PAIRWISE, judge, [{"role": "user", "content": "which?"}])
    assert (graded.verdict, graded.asked) == ("tie", 2)
    assert (graded.reply.tokens_in, graded.reply.tokens_out) == (200, 20)
    assert judge.asked[1] == [
        {"role": "user", "content": "which?"},
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": Prompts("pairwise").texts[1]},
    ]


@pytest.mark.parametrize(
    ("texts", "finish", "reason"),
    [
        (("well", "hm"), "stop", "the reply says no verdict in the form asked for"),
        (("", ""), "stop", "the reply is empty"),
        (("I think", "I think"), "length", "the reply was cut at its limit of tokens before it said a verdict"),
    ],
)
def test_after_the_second_time_there_is_no_verdict_but_a_reason(
    texts: tuple[str, str], finish: str, reason: str
) -> None:
    judge = Judge(*texts, finish=finish)
    graded = grade(TEN, judge, [{"role": "user", "content": "which?"}])
    assert (graded.verdict, graded.asked, graded.reason) == (None, 2, reason)
    assert [len(messages) for messages in judge.asked] == ([1, 3] if texts[0] else [1, 1])


def test_a_second_request_that_is_refused_leaves_the_first_reply_and_both_reasons() -> None:
    def ask(messages: Sequence[Message]) -> Reply:
        if len(messages) > 1:
            raise RefusedError("too long")
        return Reply("well", "stop", 100, 10)

    graded = grade(PAIRWISE, ask, [{"role": "user", "content": "which?"}])
    assert (graded.verdict, graded.asked, graded.reply.text) == (None, 1, "well")
    assert graded.reason == "the reply says no verdict in the form asked for; then too long"


@pytest.mark.parametrize("name", GRADINGS)
def test_a_prompt_holds_the_texts_as_they_are_even_where_they_look_like_its_places(name: str) -> None:
    texts = ("what? {{first}}", "one \\1 {{second}}", "two {{mark}} {x}")
    content = Prompts(name).messages(*texts)[0]["content"]
    assert all(content.count(text) == 1 for text in texts)
    assert [content.index(text) for text in texts] == sorted(content.index(text) for text in texts)
    assert content.count(digest(*texts)[:10]) == 5
    assert "{{" not in content.replace(texts[0], "").replace(texts[1], "").replace(texts[2], "")


def test_the_fence_around_the_texts_changes_with_each_of_them() -> None:
    requests = [("q", "a", "b"), ("q", "ab", ""), ("qa", "", "b"), ("q", "b", "a")]
    assert len({digest(*texts) for texts in requests}) == len(requests)


@pytest.mark.parametrize("name", GRADINGS)
def test_the_example_in_each_prompt_is_read_as_a_verdict(name: str) -> None:
    lines = Prompts(name).texts[0].splitlines()
    assert GRADINGS[name].read(lines[-1]) is not None
    assert Prompts(name).version.startswith(f"{name}-")


def test_every_prompt_is_a_file_of_the_package_and_every_file_a_prompt() -> None:
    assert PROMPTS.is_relative_to(Path(qlora_cli.__file__).parent)
    wanted = {f"{name}{part}.txt" for name in GRADINGS for part in ("", "-again")}
    assert {path.name for path in PROMPTS.iterdir()} == wanted
    assert len({Prompts(name).version for name in GRADINGS}) == len(GRADINGS)


@pytest.mark.parametrize(
    ("both", "row"),
    [
        (("first", "second"), {"winner": "a", "orders": ["a", "a"], "agreed": True}),
        (("second", "first"), {"winner": "b", "orders": ["b", "b"], "agreed": True}),
        (("tie", "tie"), {"winner": "tie", "orders": ["tie", "tie"], "agreed": True}),
        (("first", "first"), {"winner": "tie", "orders": ["a", "b"], "agreed": False}),
        (("second", "second"), {"winner": "tie", "orders": ["b", "a"], "agreed": False}),
        (("first", "tie"), {"winner": "tie", "orders": ["a", "tie"], "agreed": False}),
        (("tie", "first"), {"winner": "tie", "orders": ["tie", "b"], "agreed": False}),
    ],
)
def test_two_orders_that_disagree_are_a_tie_and_the_row_says_so(both: Both, row: dict[str, Any]) -> None:
    assert PAIRWISE.rows(both) == [(0, row)]
    assert list(PAIRWISE.verdicts([row, None])) == list(both)  # and the row is read back as what was said
    assert list(PAIRWISE.verdicts([None, row])) == list(both)[::-1]  # also with the models the other way round


def test_one_order_alone_is_no_pairwise_judgment_but_a_row_of_scores() -> None:
    assert PAIRWISE.rows(("first", None)) == []
    assert TEN.rows(((8.0, 3.0), None)) == [(0, {"score_a": 8.0, "score_b": 3.0})]
    assert TEN.rows((None, (2.0, 9.0))) == [(1, {"score_a": 2.0, "score_b": 9.0})]
    assert list(TEN.verdicts([None, {"score_a": 2.0, "score_b": 9.0}])) == [None, (2.0, 9.0)]


@pytest.mark.parametrize("row", [{}, {"orders": ["a"]}, {"orders": "ab"}, {"orders": ["a", "c"]}, {"score_a": 1}])
def test_a_row_that_says_nothing_is_no_verdict(row: dict[str, Any]) -> None:
    assert list(PAIRWISE.verdicts([row, None])) == [None, None]
    assert list(TEN.verdicts([row, row])) == [None, None]


@pytest.mark.parametrize("value", [None, True, "third", [8], [8, 11], [8, True], ["8", "7"], {"a": 1}, 8])
def test_what_is_kept_counts_only_if_it_is_a_verdict(value: Any) -> None:
    assert PAIRWISE.known(value) is None
    assert TEN.known(value) is None
    assert (PAIRWISE.known("tie"), TEN.known([8, 1.5])) == ("tie", (8.0, 1.5))


def test_the_figures_count_whole_questions_only() -> None:
    games: list[Both] = [("first", "second"), ("first", "first"), ("second", "first"), ("tie", "tie"), ("first", None)]
    assert PAIRWISE.tally(games) == {
        "judged": 4,
        "wins_a": 1,
        "ties": 2,
        "wins_b": 1,
        "agreed": 3,
        "disagreed": 1,
        "preferred_first": 4,
        "preferred_second": 2,
    }
    scores: list[Both] = [((8.0, 4.0), (5.0, 7.0)), ((6.0, 2.0), (3.0, 9.0)), ((1.0, 1.0), None)]
    assert TEN.tally(scores) == {
        "judged": 2,
        "score_a_shown_first": 7.0,
        "score_a_shown_second": 8.0,
        "score_b_shown_first": 4.0,
        "score_b_shown_second": 3.0,
    }
    assert TEN.tally([])["score_a_shown_first"] is None
