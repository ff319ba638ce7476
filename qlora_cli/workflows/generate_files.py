"""The files of `qlora eval --generate`: rows of prompts, and the answers to them.

Knows rows and files; asks no model. Invariant: a file of answers holds a row for each of the first n prompts, in their
order and all made alike, or it is refused as it is; it is only appended to, and cut only where a killed process left a
row unfinished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora_cli.data.sources import SourceRow, is_local, read_rows
from qlora_cli.errors import DataError, Problem
from qlora_cli.files import disk_errors
from qlora_cli.workflows.events import Emit, Notice
from qlora_cli.workflows.prompts import Prompt, check_appendable, read_prompts

MADE_BY = "made_by"
ANSWERED: dict[str, type] = {"answer": str, "stopped": bool, "tokens": int}
"""What an answer adds to the row of its prompt, behind `MADE_BY`."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A row of prompts: what is asked, and all that the row holds."""

    prompt: Prompt
    fields: Row

    @property
    def where(self) -> str:
        """`FILE:NUMBER`."""
        return self.prompt.where


def encoded(row: Row) -> bytes:
    """A row as it stands in the file, without the line break."""
    return json.dumps(row, ensure_ascii=False).encode()


def check_output(output: Path) -> None:
    """Raises `DataError` where rows cannot be appended there."""
    check_appendable(output, "answers")
    if output.exists() and not output.is_file():
        raise DataError(f"{output} is no regular file", fix="name another file with -o")


def read_questions(path: Path, output: Path) -> list[Question | Problem]:
    """The rows of a file of prompts; what is wrong with a row in its place. Raises `DataError` for a file of prompts
    that is the output too."""
    name = str(path) if is_local(str(path)) else f"./{path}"
    rows = read_rows(name, split="")
    if output.resolve() in {Path(file).expanduser().resolve() for file in {row.file for row in rows}}:
        raise DataError(f"{output} holds the prompts", fix="name another file for the answers with -o")
    read = [_question(row, prompt) for row, prompt in zip(rows, read_prompts(path), strict=True)]
    twice = {each.where: each for each in _twice([each for each in read if isinstance(each, Question)])}
    return [twice.get(each.where, each) for each in read]


def _question(row: SourceRow, prompt: Prompt | Problem) -> Question | Problem:
    if isinstance(prompt, Problem):
        return prompt
    if taken := [f"`{name}`" for name in (MADE_BY, *ANSWERED) if name in row.values]:
        what = f"a prompt must not have {', '.join(taken)}: rows of answers get fields of that name"
        return Problem(what, fix="rename or remove them", where=row.where)
    given = row.values.get("question_id")
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        return Problem(f"question_id must be a text or a whole number (got {given!r})", where=row.where)
    try:
        encoded(row.values)
    except (TypeError, ValueError) as error:  # a date of a Parquet file, text that is not Unicode
        return Problem(f"the row cannot be written as JSON: {error}", fix="mend or remove that field", where=row.where)
    return Question(prompt, row.values)


def _twice(questions: Sequence[Question]) -> Iterator[Problem]:
    """Rows that a judge could not tell apart: by `question_id` where every row has it, else by what they ask."""
    by_id = all(each.fields.get("question_id") is not None for each in questions)
    seen: dict[Any, str] = {}
    for each in questions:
        key = str(each.fields["question_id"]) if by_id else tuple((m.role, m.content) for m in each.prompt.messages)
        first = seen.setdefault(key, each.where)
        if first != each.where:
            what = f"question_id {key} is" if by_id else "the same question is"
            fix = "leave one of them" + ("" if by_id else ", or give every row a question_id")
            yield Problem(f"{what} at {first} already", fix=fix, where=each.where)


class AnswerFile:
    """The file of answers, as far as it has come. `made_by` is what all rows must be made by."""

    def __init__(self, path: Path, file: BinaryIO, questions: Sequence[Question], made_by: Row) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._file, self._questions, self._made_by = file, questions, made_by

    def read(self, emit: Emit) -> None:
        """Takes in the rows that are there; a last one that was cut short is removed. Raises `DataError` for any that
        is not the answer to its prompt, or was made by something else."""
        with disk_errors(self.path):
            self._file.seek(0)
            *lines, piece = self._file.read().split(b"\n")
        for number, line in enumerate(lines, start=1):
            self.rows.append(self._checked(number, line))
        if piece:
            self._cut(piece)
            where = f"{self.path}:{len(lines) + 1}"
            emit(Notice(f"{where}: the last row was cut short when a run was killed; it is removed"))

    def _checked(self, number: int, line: bytes) -> Row:
        """The row of that line."""
        where, row = f"{self.path}:{number}", _parsed(line)
        typed = row is not None and all(type(row.get(name)) is kind for name, kind in ANSWERED.items())
        if row is None or not typed or not isinstance(row.get(MADE_BY), dict):
            raise _refused("not a row of answers as this command writes them", where)
        if told := _differences(row[MADE_BY], self._made_by):
            why = "answers of different making in one file could not be told apart by who judges them"
            raise _refused(f"made by something else: {'; '.join(told)}", where, why)
        if number > len(self._questions):
            raise _refused(f"there are only {len(self._questions):,} prompts, and this is one more answer", where)
        if line != encoded(self._row(number - 1, row)):
            raise _refused(f"not as the answer to {self._questions[number - 1].where} was written", where)
        return row

    def _row(self, index: int, answer: Row) -> dict[str, Any]:
        fields = {**self._questions[index].fields, MADE_BY: self._made_by}
        return {**fields, **{name: answer[name] for name in ANSWERED}}

    def _cut(self, piece: bytes) -> None:
        """Removes the beginning of a row, if it is one that would stand there."""
        index, blank = len(self.rows), dict.fromkeys(ANSWERED, "")
        begun = encoded(self._row(index, blank)).rpartition(b'"answer": ""')[0] if index < len(self._questions) else b""
        if not begun or not (piece.startswith(begun) or begun.startswith(piece)):
            raise _refused("the last row is cut short, and is no answer to the next prompt", f"{self.path}:{index + 1}")
        with disk_errors(self.path):
            self._file.truncate(self._file.seek(0, os.SEEK_END) - len(piece))
            os.fsync(self._file.fileno())

    def take(self, start: int, answers: Sequence[Row]) -> int:
        """Appends answers from prompt `start` on, as far as they are not there, and returns how many; they are then on
        the disk. Raises `DataError` where one that is there is another now."""
        rows = [self._row(start + place, answer) for place, answer in enumerate(answers)]
        there = self.rows[start:]
        for number, (old, new) in enumerate(zip(there, rows, strict=False), start=start + 1):
            if old != new:
                raise _refused(
                    "computed anew, this answer is another one",
                    f"{self.path}:{number}",
                    why="another machine or other libraries round otherwise, or the answer was changed",
                    fix=f"remove the last {len(there):,} rows, which are answered together with the next ones, "
                    "or name another file with -o",
                )
        self._append(rows[len(there) :])
        return len(rows) - len(there)

    def _append(self, rows: Sequence[Row]) -> None:
        data = memoryview(b"".join(encoded(row) + b"\n" for row in rows))
        with disk_errors(self.path):
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        self.rows += rows


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _differences(there: Row, now: Row) -> list[str]:
    old, new = _flat(there), _flat(now)
    names = [*new, *(name for name in old if name not in new)]
    shown = ((name, old.get(name), new.get(name)) for name in names)
    return [f"{name} ({json.dumps(a)} there, {json.dumps(b)} now)" for name, a, b in shown if a != b]


def _flat(values: Row) -> dict[str, Any]:
    """`decoding.seed` for what stands one level down."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(
            {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat


def _refused(what: str, where: str, why: str = "", fix: str = "name another file with -o") -> DataError:
    return DataError(what, why, fix, where)
