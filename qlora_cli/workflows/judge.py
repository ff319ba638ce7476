"""`qlora judge`: two files of answers, graded against each other by a judge behind an endpoint.

Sees files, prompts and the endpoint. Invariant: every question is asked in both orders; each reply is on disk before
its thread asks on, and what is on disk for the same texts, judge and prompts is never asked for again.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.errors import DataError, MachineError, QloraError
from qlora_cli.evaluation.address import Address, find_address
from qlora_cli.evaluation.endpoint import Endpoint, Patience, RefusedError, Reply
from qlora_cli.evaluation.grading import GRADINGS, Graded, Prompts, grade
from qlora_cli.workflows.events import Emit, Fact, Notice
from qlora_cli.workflows.judge_files import Question, Record, Task, model_names, pair
from qlora_cli.workflows.judge_text import TEXTS, TYPICAL_REPLY, Estimate, Judging, Price, estimated_tokens, money
from qlora_cli.workflows.prompts import check_appendable

__all__ = ["JudgePlan", "JudgeResult", "Patience", "Price", "Wanted", "plan_judge", "run_judge"]

REFUSALS = 3
"""So many requests that are refused before any was answered are no matter of single questions."""


@dataclass(frozen=True)
class Wanted:
    """Who judges, and how. Without `names`, models are called as their files are."""

    judge: str
    grade: str = "pairwise"
    names: tuple[str, str] | None = None
    parallel: int = 4
    max_questions: int | None = None
    max_tokens: int = 1024
    price: Price = field(default_factory=Price)


@dataclass(frozen=True)
class JudgeResult:
    """What the judge said so far: `tally` over questions with both verdicts, `unjudged` of `questions` without. `asked`
    requests were answered in this run, with so many tokens as the endpoint counted."""

    names: tuple[str, str]
    judge: str
    grade: str
    prompt: str
    questions: int
    tally: Mapping[str, Any]
    asked: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    output: Path
    replies: Path

    @property
    def unjudged(self) -> int:
        """Questions that lack a verdict in one order or both."""
        return self.questions - int(self.tally["judged"])

    def text(self) -> str:
        """Lines for the terminal."""
        spent = f"{self.asked:,} requests, {self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        cost = f", cost {money(self.cost)}" if self.cost is not None else ""
        lines = [TEXTS[self.grade](self.names, self.tally), f"judge {self.judge}, prompts {self.prompt}: {spent}{cost}"]
        if self.unjudged:
            lines.append(f"unjudged: {self.unjudged:,} of {self.questions:,} questions; {self.replies} says why")
        return "\n".join([*lines, f"judgments in {self.output}"])

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        values = {**asdict(self), "output": str(self.output), "replies": str(self.replies), "unjudged": self.unjudged}
        tally = values.pop("tally")
        return {"event": "result", **values, **tally}


@dataclass(frozen=True)
class JudgePlan:
    """What is to be asked, and what is there of it."""

    wanted: Wanted
    names: tuple[str, str]
    questions: tuple[Question, ...]
    address: Address
    output: Path
    record: Record
    estimate: Estimate


def plan_judge(files: tuple[Path, Path], output: Path, wanted: Wanted, emit: Emit) -> JudgePlan:
    """Reads the answers and what is there of the judgments, and estimates the cost of the others; asks nothing. Raises
    `DataError` for answers that do not pair, and `MachineError` where the environment names no endpoint."""
    address, output = find_address(os.environ), output.expanduser()
    names = wanted.names or model_names(files)
    if names[0] == names[1] or not all(map(str.strip, names)):
        raise DataError(f"the models need two names (got {names[0]!r} and {names[1]!r})", fix="give --names A B")
    _check_output(output, files)
    questions = pair(files)[: wanted.max_questions]
    prompts = Prompts(wanted.grade)
    record = Record(output, names, wanted.judge, prompts, emit)
    missing = record.missing(questions)
    texts = ["".join(m["content"] for m in prompts.messages(t.question.text, *t.shown)) for t in missing]
    estimate = Estimate(
        questions=len(questions),
        requests=len(missing),
        kept=2 * len(questions) - len(missing),
        tokens_in=sum(map(estimated_tokens, texts)),
        tokens_out=min(TYPICAL_REPLY, wanted.max_tokens) * len(missing),
        most_out=wanted.max_tokens * len(missing),
        price=wanted.price,
    )
    emit(Fact("judge", f"{wanted.judge} at {address.url}, {names[0]} against {names[1]}, prompts {prompts.version}"))
    if address.in_the_open:
        emit(Notice(f"{address.url} is not https: the key and all answers can be read on the way there"))
    emit(estimate)
    return JudgePlan(wanted, names, tuple(questions), address, output, record, estimate)


def run_judge(plan: JudgePlan, emit: Emit, patience: Patience | None = None) -> JudgeResult:
    """Asks what is missing. Raises what `Endpoint.ask` raises, with every reply until then kept."""
    spent = _Spent()
    with plan.record.open():
        plan.record.settle(plan.questions)
        if tasks := plan.record.missing(plan.questions):
            endpoint = Endpoint(plan.address, plan.wanted.judge, patience or Patience(), plan.wanted.max_tokens)
            _ask_all(_Asking(plan, endpoint, tasks), spent, emit)
    tally = GRADINGS[plan.wanted.grade].tally([plan.record.verdicts(question) for question in plan.questions])
    if not tally["judged"]:
        raise MachineError(
            f"the judge {plan.wanted.judge} gave no verdict in both orders on any of {len(plan.questions):,} questions",
            why=f"the last reason: {spent.reason}",
            fix=f"read its replies in {plan.record.replies}; take another judge, or a larger --max-tokens",
        )
    return JudgeResult(
        names=plan.names,
        judge=plan.wanted.judge,
        grade=plan.wanted.grade,
        prompt=plan.record.prompts.version,
        questions=len(plan.questions),
        tally=tally,
        asked=spent.requests,
        tokens_in=spent.tokens_in,
        tokens_out=spent.tokens_out,
        cost=plan.wanted.price.of(spent.tokens_in, spent.tokens_out),
        output=plan.output,
        replies=plan.record.replies,
    )


def _check_output(output: Path, files: tuple[Path, Path]) -> None:
    """Raises `DataError` where rows cannot or must not be appended there."""
    check_appendable(output, "judgments")
    if output.resolve() in {file.expanduser().resolve() for file in files}:
        raise DataError(f"{output} holds answers", fix="name another file for the judgments with -o")


@dataclass
class _Spent:
    """What this run was answered, and why it last got no verdict."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    unjudged: int = 0
    refused: int = 0
    answered: int = 0
    reason: str = ""

    def add(self, graded: Graded) -> None:
        self.requests += graded.asked
        self.tokens_in += graded.reply.tokens_in
        self.tokens_out += graded.reply.tokens_out
        self.unjudged += graded.verdict is None
        self.refused += graded.asked == 0
        self.answered += graded.asked > 0
        self.reason = graded.reason or self.reason


Outcome = tuple[Graded, RefusedError | None]


class _Asking:
    """Asks in several threads, each of which keeps a reply before it asks on. They are daemons: an interrupted run
    waits for none of them."""

    def __init__(self, plan: JudgePlan, endpoint: Endpoint, tasks: Sequence[Task]) -> None:
        self.plan, self.endpoint, self.total = plan, endpoint, len(tasks)
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Outcome | QloraError | str | None] = queue.SimpleQueue()
        for task in tasks:
            self._tasks.put(task)
        self._ended, self._writing, self.kept = False, threading.Lock(), 0
        endpoint.tell = self._done.put

    def outcomes(self, emit: Emit) -> Iterator[Outcome]:
        """Each as it comes; after the first error those that are under way, and then that error."""
        count = min(self.plan.wanted.parallel, self.total)
        for _ in range(count):
            threading.Thread(target=self._work, daemon=True).start()
        failed: QloraError | None = None
        told = 0
        try:
            while count:
                item = self._done.get()
                if item is None:
                    count -= 1
                elif isinstance(item, str):
                    emit(Notice(f"the endpoint {item}"))
                elif isinstance(item, QloraError):
                    failed = failed or item
                    self.stop()
                else:
                    told += 1
                    yield item
        finally:
            self.stop()
        if failed is not None:
            raise failed
        if told < self.total:
            raise RuntimeError(f"a thread ended early: {told} of {self.total} requests have an outcome")

    def stop(self) -> None:
        """Nothing more is begun."""
        self._ended = True
        self.endpoint.stop()

    def _work(self) -> None:
        try:
            while not self._ended:
                self._done.put(self._graded(self._tasks.get_nowait()))
        except queue.Empty:
            pass
        except QloraError as error:
            self._done.put(error)
        finally:
            self._done.put(None)

    def _graded(self, task: Task) -> Outcome:
        """What the judge said, which is then on disk."""
        grading, prompts = GRADINGS[self.plan.wanted.grade], self.plan.record.prompts
        try:
            graded = grade(grading, self.endpoint.ask, prompts.messages(task.question.text, *task.shown))
            refusal = None
        except RefusedError as error:
            graded, refusal = Graded(None, Reply(""), 0, error.problems[0].what), error
        with self._writing:
            self.plan.record.take(task, graded)
            self.kept += 1
        return graded, refusal


def _ask_all(asking: _Asking, spent: _Spent, emit: Emit) -> None:
    """Raises what stopped the judge; what it said before is kept."""
    started, done, replies = time.monotonic(), 0, asking.plan.record.replies
    try:
        for graded, refusal in asking.outcomes(emit):
            spent.add(graded)
            done += 1
            logged = done * 10 // asking.total != (done - 1) * 10 // asking.total
            emit(Judging(done, asking.total, spent.unjudged, time.monotonic() - started, logged))
            if refusal is not None and spent.refused >= REFUSALS and not spent.answered:
                raise refusal
    except BaseException:
        asking.stop()
        emit(Notice(f"{asking.kept:,} of {asking.total:,} replies are kept in {replies}; the same command goes on"))
        raise
