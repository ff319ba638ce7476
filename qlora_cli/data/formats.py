"""Row formats: one function per format turns a row's fields into a `Conversation`.

Knows field names and their types; nothing of files or tokens. Invariant: a row either becomes a conversation or
raises `RowError` with the field that is wrong; nothing is guessed or repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.conversation import Conversation, Message, Role

Row = Mapping[str, Any]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


class RowError(Exception):
    """A row that does not have its format's shape; the message names field and reason, `fix` what to do."""

    def __init__(self, what: str, fix: str = "mend the row") -> None:
        super().__init__(what)
        self.fix = fix


def _missing(row: Row, field: str) -> RowError:
    has = ", ".join(f"`{name}`" for name in sorted(row)) or "no fields"
    fix = "name the column that holds it in data.columns, or set data.format"
    return RowError(f"field `{field}` is missing (the row has: {has})", fix)


def _text(row: Row, field: str) -> str:
    if field not in row:
        raise _missing(row, field)
    if not isinstance(row[field], str):
        raise RowError(f"field `{field}` must be text, but is {_kind(row[field])}")
    return _unicode(row[field], f"field `{field}`")


def _unicode(value: str, name: str) -> str:
    """JSON may escape half of a character (`\\ud83d` alone), which is no text and which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name} is not Unicode text: {error.reason} (character {error.start + 1})") from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _message(item: Any, position: int) -> Message:
    where = f"messages[{position}]"
    if not isinstance(item, Mapping):
        raise RowError(f"{where} must be an object with `role` and `content`, but is {_kind(item)}")
    for key in ("role", "content"):
        if key not in item:
            raise RowError(f"{where}.{key} is missing (it has: {', '.join(sorted(item)) or 'nothing'})")
        if not isinstance(item[key], str):
            raise RowError(f"{where}.{key} must be text, but is {_kind(item[key])}")
    if item["role"] not in ROLES:
        raise RowError(f"{where}.role is `{item['role']}`; known roles are {', '.join(ROLES)}")
    return Message(item["role"], _unicode(item["content"], f"{where}.content"))


def messages(row: Row) -> Conversation:
    """`{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}`."""
    if "messages" not in row:
        raise _missing(row, "messages")
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"field `messages` must be a list of messages, but is {_kind(turns) if turns else 'empty'}")
    conversation = Conversation(tuple(_message(item, i) for i, item in enumerate(turns)))
    if not conversation.assistant_turns():
        raise RowError("field `messages` has no assistant turn: there is nothing to learn in it")
    return conversation


def prompt_completion(row: Row) -> Conversation:
    """`{"prompt": ..., "completion": ...}`."""
    return Conversation((Message("user", _text(row, "prompt")), Message("assistant", _text(row, "completion"))))


def alpaca(row: Row) -> Conversation:
    """`{"instruction": ..., "input": ..., "output": ...}`; `input` may be absent or empty."""
    instruction, extra = _text(row, "instruction"), _text(row, "input") if row.get("input") else ""
    prompt = f"{instruction}\n\n{extra}" if extra else instruction
    return Conversation((Message("user", prompt), Message("assistant", _text(row, "output"))))


def text(row: Row) -> Conversation:
    """`{"text": ...}`: everything is learned."""
    return Conversation((Message("assistant", _text(row, "text")),))


@dataclass(frozen=True)
class Format:
    """A named row shape: the fields that it must have, and how they become a conversation."""

    build: Callable[[Row], Conversation]
    fields: tuple[str, ...]


FORMATS: Mapping[str, Format] = {
    "messages": Format(messages, ("messages",)),
    "prompt-completion": Format(prompt_completion, ("prompt", "completion")),
    "alpaca": Format(alpaca, ("instruction", "output")),
    "text": Format(text, ("text",)),
}


def fitting(row: Row) -> tuple[str, ...]:
    """Names of the formats whose fields this row has."""
    return tuple(name for name, shape in FORMATS.items() if all(field in row for field in shape.fields))


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under the format's field names, where the recipe says that its columns are called otherwise. A column
    that no row has would leave the mapping without effect, so it is an error; only alpaca's `input` may be absent."""
    if not columns:
        return row
    for field, column in columns.items():
        if column not in row and field != "input":
            has = ", ".join(f"`{name}`" for name in sorted(row))
            raise RowError(f"column `{column}` is missing (the row has: {has})", f"mend data.columns.{field}")
    taken = set(columns.values())
    return {**{k: v for k, v in row.items() if k not in taken}, **{f: row[c] for f, c in columns.items() if c in row}}
