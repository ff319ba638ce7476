"""Prompts from a file, and conversations into one.

Knows rows and files. Invariant: a row that is no prompt is an error with file and line, all of them at once; and what
is appended is a row that training reads, or nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.data.conversation import Message
from qlora_cli.data.formats import FORMATS, RowError
from qlora_cli.data.sources import SourceRow, is_local, read_rows
from qlora_cli.errors import DataError, DiskError, Problem


@dataclass(frozen=True)
class Prompt:
    """Messages that want an answer, and where they stand."""

    messages: tuple[Message, ...]
    where: str = ""


def read_prompts(path: Path) -> list[Prompt | Problem]:
    """The rows of a .jsonl file: `{"prompt": ...}`, or `{"messages": [...]}` that end with the user's turn; what is
    wrong with a row in its place."""
    name = str(path) if is_local(str(path)) else f"./{path}"
    return [_prompt(row) for row in read_rows(name, split="")]


def _prompt(row: SourceRow) -> Prompt | Problem:
    try:
        return Prompt(_messages(row.values), row.where)
    except RowError as error:
        return Problem(str(error), fix=error.fix, where=row.where)


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """What training's formats make of the row with an answer put behind it."""
    fields = [field for field in ("prompt", "messages") if field in row]
    if len(fields) != 1:
        has = ", ".join(f"`{name}`" for name in sorted(row)) or "no fields"
        raise RowError(f"a row must have `prompt` or `messages`, one of them (it has: {has})")
    if fields == ["prompt"]:
        return FORMATS["prompt-completion"].build({"prompt": row["prompt"], "completion": ""}).messages[:1]
    turns = row["messages"]
    answered = [*turns, {"role": "assistant", "content": ""}] if isinstance(turns, list) and turns else turns
    messages = FORMATS["messages"].build({"messages": answered}).messages[:-1]
    if messages[-1].role != "user":
        raise RowError("messages ends with no user turn: there is nothing to answer", "end it with the user's turn")
    return messages


def as_rows(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as a row of data holds them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def check_appendable(output: Path, rows: str) -> None:
    """Raises `DataError` where `rows` (what they are called) cannot be appended to `output`."""
    if output.suffix.lower() not in {".jsonl", ".ndjson"}:
        raise DataError(f"{rows} are rows of a .jsonl file (got -o {output})", fix="name one such file")
    if not output.parent.is_dir():
        raise DataError(f"{output.parent} is no folder", fix=f"create it, or name another file than {output} with -o")


def append_row(path: Path, row: Mapping[str, Any]) -> bool:
    """Appends `row` to a .jsonl file, on a line of its own; whether the file was there before. Creates no folder."""
    path = path.expanduser()
    if path.suffix.lower() not in {".jsonl", ".ndjson"}:
        raise DataError(f"not saved: training reads rows from .jsonl files only (got {path})", fix="name one such file")
    try:
        existed = path.exists()
        with path.open("a+b") as file:
            text = json.dumps(row, ensure_ascii=False) + "\n"
            file.write((b"" if _at_line_start(file) else b"\n") + text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}", fix="name a file in a folder that exists") from error
    return existed


def _at_line_start(file: Any) -> bool:
    """Whether what is written to the end begins a line: a file may have lost its last line break."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
