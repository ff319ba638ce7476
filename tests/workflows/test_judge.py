"""`qlora judge` from files of answers to judgments, with a judge on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qlora_cli.cli.judge import judge as command
from qlora_cli.errors import DataError, DiskError, MachineError, QloraError, RunDirectoryError
from qlora_cli.evaluation.endpoint import RefusedError
from qlora_cli.workflows.events import Event
from qlora_cli.workflows.judge import JudgePlan, JudgeResult, Patience, Price, Wanted, plan_judge, run_judge
from qlora_cli.workflows.judge_text import estimated_tokens, money
from tests.conftest import write_jsonl
from tests.evaluation.judge_stub import HTML, KEY, Answers, Said, Stub, failed, in_turn, said, serving, shown

ROOT = Path(__file__).parents[2]
QUICK = Patience(timeout=5, tries=2, backoff=0.001)
LONGER = "longer is better"


def longer(body: dict[str, Any]) -> Said:
    """A judge that prefers the longer answer, in whichever place."""
    first, second = (len(text) for text in shown(body))
    return said(f"{LONGER}\nVerdict: {'tie' if first == second else 1 if first > second else 2}")


def scores(body: dict[str, Any]) -> Said:
    """A judge that gives a point per character, and one more for being first."""
    first, second = (len(text) for text in shown(body))
    return said(f"Scores: {min(10, first + 1)} {min(10, second)}")


def answers(path: Path, texts: list[str], ids: bool = True) -> Path:
    """A file of answers, as `qlora chat --prompts` writes it and with ids."""
    return write_jsonl(
        path,
        [
            {**({"question_id": f"q{i}"} if ids else {}), "prompt": f"question {i}?", "answer": text, "stopped": True}
            for i, text in enumerate(texts)
        ],
    )


A, B = ["aaaa", "aa", "aaa", "a"], ["b", "bbb", "bbb", "bb"]


class Desk:
    """Two files, a judge, and what was told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self.files = (answers(folder / "alpha.jsonl", A), answers(folder / "beta.jsonl", B))
        self.output = folder / "judgments.jsonl"
        self.replies = folder / "judgments.replies.jsonl"
        self.events: list[Event] = []
        self._running: list[Any] = []

    def serve(self, answer: Answers) -> Stub:
        """The endpoint from now on."""
        self._running.append(serving(answer))
        stub: Stub = self._running[-1].__enter__()
        self._patch.setenv("QLORA_JUDGE_URL", stub.url)
        return stub

    def plan(self, **wanted: Any) -> JudgePlan:
        """Reads and estimates."""
        return plan_judge(self.files, self.output, Wanted(**{"judge": "judge-1", **wanted}), self.events.append)

    def run(self, patience: Patience = QUICK, **wanted: Any) -> JudgeResult:
        """All of it."""
        return run_judge(self.plan(**wanted), self.events.append, patience)

    def rows(self, path: Path | None = None) -> list[dict[str, Any]]:
        """The judgments, or what is in another file."""
        return [json.loads(line) for line in (path or self.output).read_text(encoding="utf-8").splitlines()]

    def told(self) -> str:
        """All lines."""
        return "\n".join(event.line() for event in self.events)

    def close(self) -> None:
        """Ends all servers."""
        for each in self._running:
            each.__exit__(None, None, None)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """Four questions: a wins the first, b the second and fourth, the third is a tie."""
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "QLORA_JUDGE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QLORA_JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Desk(tmp_path, monkeypatch)
    yield made
    made.close()


def test_every_question_is_asked_in_both_orders_and_the_rows_are_those_of_elo(desk: Desk) -> None:
    stub = desk.serve(longer)
    result = desk.run()
    pairs = [shown(body) for body in stub.asked]
    assert sorted(pairs) == sorted([*zip(A, B, strict=True), *zip(B, A, strict=True)])
    rows = {row["question_id"]: row for row in desk.rows()}
    assert len(desk.rows()) == 4
    assert [rows[f"q{i}"]["winner"] for i in range(4)] == ["a", "b", "tie", "b"]
    assert {(r["model_a"], r["model_b"], r["judge"], r["agreed"]) for r in rows.values()} == {
        ("alpha", "beta", "judge-1", True)
    }
    assert rows["q0"]["orders"] == ["a", "a"]
    assert result.tally["wins_b"] == 2
    assert (result.asked, result.tokens_in, result.tokens_out, result.unjudged) == (8, 800, 80, 0)
    assert "both orders agree on 4 of 4" in result.text()


def test_a_judge_that_prefers_what_it_sees_first_makes_ties_and_is_found_out(desk: Desk) -> None:
    desk.serve(lambda _: said("Verdict: 1"))
    result = desk.run()
    assert [(row["winner"], row["orders"], row["agreed"]) for row in desk.rows()] == [("tie", ["a", "b"], False)] * 4
    assert (result.tally["ties"], result.tally["disagreed"]) == (4, 4)
    assert (result.tally["preferred_first"], result.tally["preferred_second"]) == (8, 0)
    assert "both orders agree on 0 of 4 (0.0%); the others count as ties" in result.text()


def test_ten_point_grades_are_a_row_for_each_order_with_the_first_shown_as_model_a(desk: Desk) -> None:
    desk.serve(scores)
    result = desk.run(grade="ten-point")
    found = {
        (row["question_id"], row["model_a"], row["model_b"]): (row["score_a"], row["score_b"]) for row in desk.rows()
    }
    assert len(desk.rows()) == len(found) == 8
    assert found["q0", "alpha", "beta"] == (5.0, 1.0)
    assert found["q0", "beta", "alpha"] == (2.0, 4.0)
    assert result.tally == {
        "judged": 4,
        "score_a_shown_first": 3.5,
        "score_a_shown_second": 2.5,
        "score_b_shown_first": 3.25,
        "score_b_shown_second": 2.25,
    }
    assert "alpha" in result.text()


def test_what_was_judged_is_not_asked_again(desk: Desk) -> None:
    stub = desk.serve(longer)
    first = desk.run(max_questions=2)
    assert (first.questions, len(stub.asked)) == (2, 4)
    before = desk.rows()
    second = desk.run()
    assert (second.questions, second.asked, len(stub.asked)) == (4, 4, 8)
    assert desk.rows()[:2] == before
    third = desk.run()
    assert (third.asked, len(stub.asked)) == (0, 8)
    assert third.tally == second.tally
    assert len(desk.rows()) == 4


def test_two_commands_never_pay_for_the_same_questions(desk: Desk) -> None:
    stub = desk.serve(longer)
    early = desk.plan()
    with desk.replies.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunDirectoryError, match="in use by another process"):
            desk.run()
    assert not stub.asked
    desk.run()
    with pytest.raises(RunDirectoryError, match="has changed"):
        run_judge(early, desk.events.append, QUICK)
    assert len(stub.asked) == 8


@pytest.mark.parametrize("kept", ["judgments", "replies"])
@pytest.mark.parametrize(("grade", "count"), [("pairwise", 4), ("ten-point", 8)])
def test_either_file_alone_is_enough_to_go_on(desk: Desk, kept: str, grade: str, count: int) -> None:
    stub = desk.serve(longer if grade == "pairwise" else scores)
    first = desk.run(grade=grade)
    rows = sorted(map(json.dumps, desk.rows()))
    (desk.replies if kept == "judgments" else desk.output).unlink()
    second = desk.run(grade=grade)
    assert (second.asked, len(stub.asked), second.tally) == (0, 8, first.tally)
    assert sorted(map(json.dumps, desk.rows())) == rows
    assert len(rows) == count


@pytest.mark.parametrize(("grade", "count"), [("pairwise", 4), ("ten-point", 8)])
def test_the_same_files_the_other_way_round_are_the_same_games(desk: Desk, grade: str, count: int) -> None:
    stub = desk.serve(longer if grade == "pairwise" else scores)
    first = desk.run(grade=grade)
    desk.files = (desk.files[1], desk.files[0])
    desk.replies.unlink()
    second = desk.run(grade=grade)
    assert (second.asked, len(stub.asked), len(desk.rows())) == (0, 8, count)
    if grade == "pairwise":
        assert (second.tally["wins_a"], second.tally["wins_b"]) == (first.tally["wins_b"], first.tally["wins_a"])
    else:
        assert second.tally["score_a_shown_first"] == first.tally["score_b_shown_first"]


@pytest.mark.parametrize("change", ["answer", "judge", "grade", "names"])
def test_other_answers_judges_grades_and_names_are_asked_for_anew(desk: Desk, change: str) -> None:
    stub = desk.serve(lambda body: longer(body) if "Verdict" in body["messages"][0]["content"] else scores(body))
    desk.run()
    wanted: dict[str, Any] = {}
    if change == "answer":
        answers(desk.files[1], [*B[:3], "bbbbbb"])
    else:
        values: dict[str, Any] = {"judge": "judge-2", "grade": "ten-point", "names": ("x", "y")}
        wanted = {change: values[change]}
    result = desk.run(**wanted)
    assert result.asked == (2 if change == "answer" else 8)
    assert len(stub.asked) == 8 + result.asked


def test_the_estimate_comes_first_and_says_how_it_was_made(desk: Desk) -> None:
    stub = desk.serve(longer)
    plan = desk.plan(max_tokens=200, price=Price(2.0, 10.0))
    assert stub.asked == []
    e = plan.estimate
    assert (e.questions, e.requests, e.kept, e.tokens_out, e.most_out) == (4, 8, 0, 1200, 1600)
    run_judge(plan, desk.events.append, QUICK)
    sent = sum(estimated_tokens(body["messages"][0]["content"]) for body in stub.asked)
    assert e.tokens_in == sent > 8 * 200
    cost = (2 * sent + 10 * 1200) / 1e6
    assert e.as_json()["cost"] == pytest.approx(cost)
    assert "8 requests for 4 questions in both orders" in e.line()
    assert "4 ASCII characters counted as a token" in e.line()
    assert f"costs about {money(cost)}, at most {money((2 * sent + 10 * 1600) / 1e6)}" in e.line()
    assert desk.plan().estimate.line().startswith("estimate: 0 requests (8 more are there already)")


def test_tokens_are_estimated_from_characters() -> None:
    assert [estimated_tokens(text) for text in ("", "abcd", "abcde", "日本", "ab日")] == [0, 1, 2, 2, 2]


def test_what_cannot_be_read_is_asked_once_more_and_then_counted_as_unjudged(desk: Desk) -> None:
    def vague(body: dict[str, Any]) -> Said:
        return said("both are nice") if "question 2?" in body["messages"][0]["content"] else longer(body)

    stub = desk.serve(vague)
    result = desk.run()
    assert (result.unjudged, result.tally["judged"], result.asked, len(stub.asked)) == (1, 3, 10, 10)
    assert {row["question_id"] for row in desk.rows()} == {"q0", "q1", "q3"}
    without = [row for row in desk.rows(desk.replies) if row["verdict"] is None]
    assert [(row["question_id"], row["reply"], row["asked"]) for row in without] == [("q2", "both are nice", 2)] * 2
    assert without[0]["reason"] == "the reply says no verdict in the form asked for"
    assert "unjudged: 1 of 4 questions" in result.text()
    desk.serve(longer)
    assert (desk.run().unjudged, len(desk.rows())) == (0, 4)  # another run asks for what is lacking


def test_no_verdict_at_all_is_an_error(desk: Desk) -> None:
    desk.serve(lambda _: said("both are nice"))
    with pytest.raises(MachineError, match="gave no verdict in both orders on any of 4 questions"):
        desk.run()
    assert len(desk.rows(desk.replies)) == 8


def test_requests_that_are_refused_leave_their_questions_unjudged(desk: Desk) -> None:
    def short(body: dict[str, Any]) -> Said:
        return failed(400, "context too long") if "question 0?" not in body["messages"][0]["content"] else longer(body)

    desk.serve(short)
    result = desk.run(parallel=1)
    assert (result.unjudged, result.tally["judged"], result.asked) == (3, 1, 2)
    assert any("context too long" in row.get("reason", "") for row in desk.rows(desk.replies))


def test_a_judge_that_refuses_every_request_is_one_error(desk: Desk) -> None:
    stub = desk.serve(lambda _: failed(400, "unknown field"))
    with pytest.raises(RefusedError, match="HTTP 400: unknown field"):
        desk.run(parallel=1)
    assert 3 <= len(stub.asked) <= 8


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (failed(401), "does not accept the key"),
        (failed(404), "answers HTTP 404"),
        (failed(503), "answers HTTP 503"),
        (failed(429, headers={"Retry-After": "0"}), "answers HTTP 429"),
        (Said(200, HTML, {"Content-Type": "text/html"}), "HTML page"),
        (Said(200, b'{"choices": [{'), "no JSON"),
        (Said(200, b'{"choices": {}}'), "no chat completion"),
    ],
)
def test_when_the_endpoint_fails_what_it_said_before_is_kept_and_the_same_command_goes_on(
    desk: Desk, answer: Said, words: str
) -> None:
    lock, count = threading.Lock(), [0]

    def failing(body: dict[str, Any]) -> Said:
        with lock:
            count[0] += 1
            return longer(body) if count[0] <= 5 else answer

    desk.serve(failing)
    with pytest.raises(MachineError, match=words) as caught:
        desk.run(parallel=2)
    assert len(caught.value.problems) == 1
    assert len(desk.rows(desk.replies)) == 5
    assert f"5 of 8 replies are kept in {desk.replies}; the same command goes on" in desk.told()
    desk.serve(longer)
    result = desk.run()
    assert (result.asked, result.tally["judged"], len(desk.rows())) == (3, 4, 4)


def test_rate_limits_and_errors_on_the_way_change_nothing_but_are_told(desk: Desk) -> None:
    stub = desk.serve(in_turn(failed(429, headers={"Retry-After": "0"}), failed(500), *[said("Verdict: tie")] * 9))
    result = desk.run(patience=Patience(5, 4, 0.001), parallel=1)
    assert (result.tally["ties"], len(stub.asked)) == (4, 10)
    assert "answers HTTP 429" in desk.told()
    assert "answers HTTP 500" in desk.told()


def test_an_endpoint_that_is_down_is_one_error_and_nothing_is_lost(desk: Desk) -> None:
    stub = desk.serve(longer)
    desk.run(max_questions=1)
    url = stub.url
    desk.close()
    desk._running.clear()
    with pytest.raises(MachineError, match=f"{url} cannot be reached"):
        desk.run(patience=Patience(5, 5, backoff=60))
    assert len(desk.rows()) == 1


def test_the_key_is_in_no_file_event_or_result(desk: Desk) -> None:
    stub = desk.serve(lambda _: said(f"the header says {KEY}\nVerdict: 1"))
    result = desk.run()
    assert stub.headers[0]["Authorization"] == f"Bearer {KEY}"
    files = [path.read_text(encoding="utf-8") for path in desk.folder.iterdir()]
    assert len(files) == 4
    everything = [*files, desk.told(), json.dumps([e.as_json() for e in desk.events]), result.text(), repr(result)]
    assert [text for text in everything if KEY in text] == []
    assert "[secret]" in "".join(files)


def test_a_row_that_a_killed_run_left_unfinished_is_cut_off_and_said(desk: Desk) -> None:
    desk.serve(longer)
    desk.run()
    for path in (desk.output, desk.replies):
        data = path.read_bytes()
        path.write_bytes(data[: data.rindex(b"\n", 0, -1) + 30])
    desk.events.clear()
    result = desk.run()
    assert result.asked in {0, 1}  # the judgment that is left may tell what the lost reply said
    assert desk.told().count("the last row was cut short when a run was killed; it is removed") == 2
    assert len({row["question_id"] for row in desk.rows()}) == len(desk.rows()) == 4


def test_a_last_row_that_lacks_only_its_line_break_counts(desk: Desk) -> None:
    stub = desk.serve(longer)
    desk.run(max_questions=1)
    for path in (desk.output, desk.replies):
        path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    desk.run()
    assert (len(stub.asked), len(desk.rows()), len(desk.rows(desk.replies))) == (8, 4, 8)


def test_a_run_that_is_killed_asks_only_for_what_is_lacking(desk: Desk) -> None:
    seen, free = threading.Event(), threading.Event()
    lock, count = threading.Lock(), [0]

    def slow(body: dict[str, Any]) -> Said:
        with lock:
            count[0] += 1
            held = count[0] > 3
        if held:
            seen.set()
            free.wait(20)
        return longer(body)

    desk.serve(slow)
    code = (
        "import sys; from pathlib import Path; from qlora_cli.workflows.judge import *\n"
        "a, b, out = map(Path, sys.argv[1:])\n"
        "run_judge(plan_judge((a, b), out, Wanted('judge-1', parallel=1), lambda _: None), lambda _: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, desk.files), str(desk.output)], cwd=ROOT)
    try:
        assert seen.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    finally:
        free.set()
        process.kill()
    assert len(desk.rows(desk.replies)) == 3
    stub = desk.serve(longer)
    assert (desk.run().asked, len(stub.asked), len(desk.rows())) == (5, 5, 4)


def test_other_rows_of_the_file_stay_as_they_are(desk: Desk) -> None:
    desk.serve(longer)
    other = {"question_id": 1, "model_a": "x", "model_b": "y", "winner": "a", "judge": "human"}
    write_jsonl(desk.output, [other])
    desk.run()
    assert desk.rows()[0] == other
    assert len(desk.rows()) == 5


@pytest.mark.parametrize("content", ["notes of mine", "[1]\n", '{"question_id": 1}\nnull\n', '{"a": 1}\n{"b'])
def test_a_file_of_something_else_is_refused_and_left_alone(desk: Desk, content: str) -> None:
    stub = desk.serve(longer)
    desk.output.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"judgments\.jsonl:\d: not a JSON object"):
        desk.run()
    assert desk.output.read_text(encoding="utf-8") == content
    assert stub.asked == []


def pair_error(desk: Desk, a: list[Any], b: list[Any]) -> str:
    """What is said of two files that do not pair; nothing is asked."""
    stub = desk.serve(longer)
    for path, rows in zip(desk.files, (a, b), strict=True):
        write_jsonl(path, rows)
    with pytest.raises(DataError) as caught:
        desk.run()
    assert stub.asked == []
    assert not desk.output.exists()
    return "\n".join(map(str, caught.value.problems))


def row(number: int, **more: Any) -> dict[str, Any]:
    """An answer."""
    return {"prompt": f"p{number}", "answer": "x", **more}


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([row(1), row(2)], [row(1)], ["alpha.jsonl:2", "the question 'p2' has no answer in", "beta.jsonl"]),
        ([row(1)], [row(1), row(2)], ["beta.jsonl:2: the question 'p2' has no answer in"]),
        ([row(1, question_id=1)], [row(1, question_id=2)], ["question_id 1 has no", "question_id 2 has no"]),
        ([row(1, question_id=1)], [row(2, question_id=1)], ["question_id 1 asks something else than at"]),
        ([row(1), row(1)], [row(1)], ["alpha.jsonl:2: the same question is at", "alpha.jsonl:1 already"]),
        ([row(1, question_id=1), row(2, question_id=1)], [row(1, question_id=1)], ["question_id 1 is at"]),
        ([{"prompt": "p"}], [row(1)], ["alpha.jsonl:1: a row must have `answer`, a text"]),
        ([{"prompt": "p", "answer": 5}], [row(1)], ["alpha.jsonl:1: a row must have `answer`, a text"]),
        ([{"answer": "x"}], [row(1)], ["alpha.jsonl:1: a row must have `prompt` or `messages`"]),
        ([row(1, question_id=1.5)], [row(1)], ["question_id must be a text or a whole number (got 1.5)"]),
        ([], [row(1)], ["alpha.jsonl has no rows"]),
        ([row(1)], [], ["beta.jsonl has no rows"]),
    ],
)
def test_answers_that_do_not_pair_are_named_by_file_and_line(
    desk: Desk, a: list[Any], b: list[Any], words: list[str]
) -> None:
    told = pair_error(desk, a, b)
    assert [each for each in words if each not in told] == []


def test_of_many_rows_that_do_not_pair_ten_are_named_and_the_others_counted(desk: Desk) -> None:
    told = pair_error(desk, [row(i) for i in range(30)], [row(0)])
    assert told.count("has no answer in") == 10
    assert "19 more rows like these" in told


def test_answers_pair_by_what_was_asked_where_not_all_have_an_id(desk: Desk) -> None:
    desk.serve(longer)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    write_jsonl(desk.files[0], [row(1, question_id=7), {"messages": turns, "answer": "long answer"}, row(2)])
    write_jsonl(desk.files[1], [{"messages": turns, "answer": "x"}, row(2), row(1)])
    stub = desk.serve(longer)
    result = desk.run()
    ids = [row["question_id"] for row in sorted(desk.rows(), key=lambda row: str(row["question_id"]))]
    assert ids[0] == 7
    assert all(str(each).startswith("q-") for each in ids[1:])
    assert (len(ids), result.tally["wins_a"], result.tally["ties"]) == (3, 1, 2)
    assert any("[system]\nbe brief\n\n[user]\nhi" in body["messages"][0]["content"] for body in stub.asked)


def test_models_are_called_as_their_files_with_as_much_of_the_path_as_tells_them_apart(desk: Desk) -> None:
    desk.serve(longer)
    assert desk.plan().names == ("alpha", "beta")
    assert desk.plan(names=("one", "two")).names == ("one", "two")
    for name in ("x", "y"):
        (desk.folder / name).mkdir()
    desk.files = (answers(desk.folder / "x" / "out.jsonl", A), answers(desk.folder / "y" / "out.jsonl", B))
    assert desk.plan().names == ("x/out", "y/out")
    desk.files = (desk.files[0], desk.files[0])
    for names in (None, ("x", "x"), ("x", " ")):
        with pytest.raises(DataError, match="the models need two names"):
            desk.plan(names=names)


def test_an_output_that_cannot_be_is_refused_before_anything_is_asked(desk: Desk) -> None:
    stub = desk.serve(longer)
    (desk.folder / "folder.jsonl").mkdir()
    outputs = [desk.files[0], desk.folder / "out.txt", desk.folder / "none" / "out.jsonl", desk.folder / "folder.jsonl"]
    for desk.output in outputs:
        with pytest.raises((DataError, DiskError)):
            desk.run()
    assert stub.asked == []
    assert len(desk.files[0].read_text(encoding="utf-8").splitlines()) == 4


def test_without_an_endpoint_in_the_environment_that_is_the_error(desk: Desk) -> None:
    with pytest.raises(MachineError, match="no endpoint is named"):
        desk.plan()


def test_requests_run_side_by_side_up_to_the_number_given(desk: Desk) -> None:
    together = threading.Barrier(3)

    def waits(body: dict[str, Any]) -> Said:
        together.wait(20)  # breaks, and fails the request, unless three are here at once
        return longer(body)

    desk.serve(waits)
    assert desk.run(patience=Patience(30, 1), parallel=3, max_questions=3).tally["judged"] == 3


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(desk: Desk) -> Cli:
    """A function that runs the command on the desk's files."""
    app = typer.Typer()
    app.command()(command)

    def run(*arguments: str) -> tuple[int, str, str]:
        options = [*map(str, desk.files), "--model", "judge-1", "-o", str(desk.output), *arguments]
        done = CliRunner().invoke(app, options)
        if isinstance(done.exception, QloraError):
            return done.exception.exit_code, done.stdout, str(done.exception)
        return done.exit_code, done.stdout, done.stderr

    return run


def test_the_command_prints_the_estimate_on_stderr_and_the_table_on_stdout(desk: Desk, cli: Cli) -> None:
    desk.serve(longer)
    code, out, err = cli("--names", "one", "two", "--price-in", "1", "--price-out", "2")
    assert (code, err.splitlines()[0].split()[0]) == (0, "judge")
    assert "estimate: 8 requests for 4 questions in both orders" in err
    assert out.splitlines()[:3] == [
        "model  wins  ties  losses  wins + ties/2",
        "one       1     1       2          37.5%",
        "two       2     1       1          62.5%",
    ]
    assert out.splitlines()[-1] == f"judgments in {desk.output}"


def test_the_command_prints_json_events_that_end_in_the_result(desk: Desk, cli: Cli) -> None:
    desk.serve(scores)
    code, out, err = cli("--json", "--grade", "ten-point")
    events = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [event["event"] for event in events[:2]] == ["fact", "estimate"]
    result = events[-1]
    assert (result["event"], result["names"], result["judged"], result["unjudged"]) == (
        "result",
        ["alpha", "beta"],
        4,
        0,
    )
    assert (result["output"], result["score_a_shown_first"]) == (str(desk.output), 3.5)


def test_a_wrong_key_ends_the_command_with_the_code_of_the_environment(desk: Desk, cli: Cli) -> None:
    desk.serve(lambda _: failed(401))
    code, out, err = cli("--quiet")
    assert (code, out) == (6, "")
    assert "does not accept the key (HTTP 401)" in err


@pytest.mark.parametrize(("typed", "asked"), [("y\n", 8), ("n\n", 0), ("\n", 0)])
@pytest.mark.parametrize("quiet", [False, True])
def test_a_person_at_a_terminal_is_told_the_estimate_and_asked_for_leave(
    desk: Desk,
    typed: str,
    asked: int,
    quiet: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = desk.serve(longer)
    near, far = pty.openpty()
    os.write(near, typed.encode())
    with os.fdopen(far, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        run_command(desk, *(["--quiet"] if quiet else []))
        captured = capsys.readouterr()
        assert len(stub.asked) == asked
        assert captured.err.index("estimate: 8 requests") < captured.err.index("ask the judge? [y/N]")
        assert ("nothing was asked" in captured.err, bool(captured.out)) == (asked == 0, asked > 0)
        run_command(desk, "--yes")
    os.close(near)
    assert "ask the judge?" not in capsys.readouterr().err
    assert len(stub.asked) == 8


def run_command(desk: Desk, *arguments: str) -> None:
    """The command in this process, with its streams."""
    app = typer.Typer()
    app.command()(command)
    options = [*map(str, desk.files), "--model", "judge-1", "-o", str(desk.output), *arguments]
    assert not typer.main.get_command(app).main(options, standalone_mode=False)


def test_ctrl_c_waits_for_no_judge_and_says_what_is_kept(desk: Desk) -> None:
    free, main = threading.Event(), threading.main_thread().ident or 0

    def stuck(body: dict[str, Any]) -> Said:
        if "question 2?" in body["messages"][0]["content"]:
            signal.pthread_kill(main, signal.SIGINT)
            free.wait(60)
        return longer(body)

    desk.serve(stuck)
    with pytest.raises(KeyboardInterrupt):
        desk.run(patience=Patience(60, 1), parallel=1)
    assert not free.is_set()
    assert f"4 of 8 replies are kept in {desk.replies}" in desk.told()
    assert len(desk.rows(desk.replies)) == 4
    free.set()
