"""The files of `qlora judge`: answers that pair, and what a judge said of them.

Knows rows and files; asks nothing. Invariant: files are only appended to, a row at a time, and a row counts as there
only for the very texts, models, judge and prompts that it was written for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.data.sources import is_local, raise_all, read_rows
from qlora_cli.errors import DataError, DiskError, Problem, RunDirectoryError
from qlora_cli.evaluation.grading import GRADINGS, Both, Graded, Prompts, Verdict, digest
from qlora_cli.files import disk_errors
from qlora_cli.workflows.events import Emit, Notice
from qlora_cli.workflows.prompts import Prompt, append_row, read_prompts
from qlora_cli.workflows.runlock import locked

ORDERS = ((0, 1), (1, 0))
KEYS = ("question_id", "model_a", "model_b", "judge", "prompt", "content")
"""Fields by which a row is known: those of `qlora elo`'s rows and two more, the version of the prompts and a hash of
the texts. `model_a` is the one shown first."""
STARTS = b'{"question_id": '
Key = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question, and the answers of both models."""

    id: str | int
    text: str
    answers: tuple[str, str]


@dataclass(frozen=True)
class Task:
    """A question in one order."""

    question: Question
    order: int

    @property
    def shown(self) -> tuple[str, str]:
        """The answers as they are shown."""
        first, second = ORDERS[self.order]
        return self.question.answers[first], self.question.answers[second]


@dataclass(frozen=True)
class _Answer:
    id: str | int | None
    question: str
    answer: str
    where: str


def model_names(files: tuple[Path, Path]) -> tuple[str, str]:
    """What the files are called without suffix, with their folders as far as those tell them apart."""
    stems = [file.expanduser().absolute().with_suffix("").parts for file in files]
    for parts in range(1, max(map(len, stems)) + 1):
        names = ["/".join(stem[-parts:]) for stem in stems]
        if names[0] != names[1]:
            break
    return names[0], names[1]


def pair(files: tuple[Path, Path]) -> list[Question]:
    """The questions in the order of the first file, by `question_id` where every row has it, else by what was asked.
    Raises one `DataError` that names every row that is no answer, comes twice, or has none to pair with."""
    read = [_answers(file) for file in files]
    raise_all([row for rows in read for row in rows if isinstance(row, Problem)])
    answers = [[row for row in rows if isinstance(row, _Answer)] for rows in read]
    by_id = all(row.id is not None for rows in answers for row in rows)
    one, two = ({_key(row, by_id): row for row in rows} for rows in answers)
    problems = [*_twice(answers[0], by_id), *_twice(answers[1], by_id)]
    problems += [_alone(row, files[1], by_id) for key, row in one.items() if key not in two]
    problems += [_alone(row, files[0], by_id) for key, row in two.items() if key not in one]
    both = [(row, two[key]) for key, row in one.items() if key in two]
    problems += [
        Problem(f"question_id {a.id} asks something else than at {b.where}", where=a.where)
        for a, b in both
        if a.question != b.question
    ]
    raise_all(problems)
    return [Question(_id(a, b), a.question, (a.answer, b.answer)) for a, b in both]


def _answers(path: Path) -> list[_Answer | Problem]:
    name = str(path) if is_local(str(path)) else f"./{path}"
    rows = read_rows(name, split="")
    return [_answer(asked, row.values, row.where) for asked, row in zip(read_prompts(path), rows, strict=True)]


def _answer(asked: Prompt | Problem, values: Mapping[str, Any], where: str) -> _Answer | Problem:
    if isinstance(asked, Problem):
        return asked
    answer, given = values.get("answer"), values.get("question_id")
    if not isinstance(answer, str):
        fix = "write answers as `qlora chat --prompts` does: {prompt} or {messages}, and {answer}"
        return Problem("a row must have `answer`, a text", fix=fix, where=where)
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        return Problem(f"question_id must be a text or a whole number (got {given!r})", where=where)
    turns = [(message.role, message.content) for message in asked.messages]
    alone = len(turns) == 1 and turns[0][0] == "user"
    text = turns[0][1] if alone else "\n\n".join(f"[{role}]\n{content}" for role, content in turns)
    return _Answer(given, text, answer, where)


def _key(row: _Answer, by_id: bool) -> str:
    return str(row.id) if by_id else row.question


def _id(a: _Answer, b: _Answer) -> str | int:
    """Of rows without any, one that the question has wherever it stands."""
    given = a.id if a.id is not None else b.id
    return given if given is not None else f"q-{digest(a.question)}"


def _twice(rows: Sequence[_Answer], by_id: bool) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for row in rows:
        first = seen.setdefault(_key(row, by_id), row.where)
        if first != row.where:
            what = f"question_id {row.id} is" if by_id else "the same question is"
            fix = "leave one of them" + ("" if by_id else ", or give every row of both files a question_id")
            yield Problem(f"{what} at {first} already", fix=fix, where=row.where)


def _alone(row: _Answer, other: Path, by_id: bool) -> Problem:
    what = f"question_id {row.id}" if by_id else f"the question {row.question[:60]!r}"
    fix = "let both models answer the same file of prompts"
    return Problem(f"{what} has no answer in {other}", fix=fix, where=row.where)


class Record:
    """What was said: every reply in `replies`, and what follows from them in `output`, as rows of `qlora elo`."""

    def __init__(self, output: Path, names: tuple[str, str], judge: str, prompts: Prompts, emit: Emit) -> None:
        self.output, self.replies = output, output.with_name(f"{output.stem}.replies{output.suffix}")
        self.prompts = prompts
        self._names, self._judge, self._grading = names, judge, GRADINGS[prompts.grading]
        self._rows = dict(_read(self.output, emit))
        read = ((key, self._grading.known(row.get("verdict"))) for key, row in _read(self.replies, emit))
        self._verdicts: dict[Key, Verdict] = {key: verdict for key, verdict in read if verdict is not None}
        self._sized = self._sizes()

    def missing(self, questions: Sequence[Question]) -> list[Task]:
        """The orders in which questions have no verdict."""
        both = ((question, self.verdicts(question)) for question in questions)
        return [Task(each, order) for each, said in both for order, verdict in enumerate(said) if verdict is None]

    def verdicts(self, question: Question) -> Both:
        """Those of the question in both orders, as far as they are there."""
        judged = enumerate(self._judged(question))
        return [self._verdicts.get(self._key(question, order), known) for order, known in judged]

    def take(self, task: Task, graded: Graded) -> None:
        """Appends a reply, and what follows from it."""
        said = {"grade": self._grading.name, "verdict": graded.verdict, "reply": graded.reply.text}
        why = {"reason": graded.reason} if graded.reason else {}
        spent = {"asked": graded.asked, "tokens_in": graded.reply.tokens_in, "tokens_out": graded.reply.tokens_out}
        append_row(self.replies, {**self._fields(task.question, task.order), **said, **why, **spent})
        if graded.verdict is not None:
            self._verdicts[self._key(task.question, task.order)] = graded.verdict
            self.settle([task.question])

    def settle(self, questions: Sequence[Question]) -> None:
        """Appends the judgments that follow from the replies and are not there; a killed run may owe one."""
        for question in questions:
            there = self._judged(question)
            for order, row in self._grading.rows(self.verdicts(question)):
                if there[order] is None:
                    self._append(question, order, row)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Both files can be written, and no other process asks for them. `RunDirectoryError` where one does, or has
        since they were read: what it paid for would be paid for again."""
        with locked(self.replies):
            if self._sizes() != self._sized:
                why = "another process has judged since the estimate"
                raise RunDirectoryError(f"{self.output} has changed", why=why, fix="give the same command again")
            with disk_errors(self.output):
                self.output.open("ab").close()
            yield

    def _sizes(self) -> list[int]:
        return [path.stat().st_size if path.exists() else 0 for path in (self.output, self.replies)]

    def _append(self, question: Question, order: int, row: Mapping[str, Any]) -> None:
        whole = {**self._fields(question, order), **row}
        append_row(self.output, whole)
        self._rows[self._key(question, order)] = whole

    def _judged(self, question: Question) -> Both:
        """What the rows of judgments say; the files may have been named the other way round then."""
        return self._grading.verdicts([self._rows.get(self._key(question, order)) for order in range(len(ORDERS))])

    def _fields(self, question: Question, order: int) -> dict[str, Any]:
        first, second = ORDERS[order]
        content = digest(question.text, question.answers[first], question.answers[second])
        values = (question.id, self._names[first], self._names[second], self._judge, self.prompts.version, content)
        return dict(zip(KEYS, values, strict=True))

    def _key(self, question: Question, order: int) -> Key:
        return tuple(map(str, self._fields(question, order).values()))


def _read(path: Path, emit: Emit) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """The rows of a file that a run may have left unfinished. Raises `DataError` for one that is no such file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", fix="name another file with -o") from error
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            yield tuple(str(row.get(name)) for name in KEYS), row
        elif number == len(lines) and _is_piece(line):
            _cut(path, len(data) - len(line))
            emit(Notice(f"{path}:{number}: the last row was cut short when a run was killed; it is removed"))
        elif line.strip():
            fix = "mend or remove that line, or name another file with -o"
            raise DataError(
                "not a JSON object: judgments are appended to files of such rows only", "", fix, f"{path}:{number}"
            )


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_piece(line: bytes) -> bool:
    """Whether it is the beginning of a row that was written here."""
    return bool(line) and (line.startswith(STARTS) or STARTS.startswith(line))


def _cut(path: Path, size: int) -> None:
    try:
        with path.open("r+b") as file:
            file.truncate(size)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}", fix="name another file with -o") from error
