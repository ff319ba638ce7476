"""Checks of single fields: what is said of one that is missing, of another type, or no text at all.

Knows objects and the paths of values in them (`messages[3].content`); nothing of formats. Invariant: text that passes
is Unicode, and what `RowError` says can be printed, whatever stood in the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_cli.data.conversation import Conversation, Message

Row = Mapping[str, Any]
DEEPEST = 100
"""Levels of lists and objects in a value that is passed on as it is; a template that prints it recurses."""
MOST_NAMED = 12
LONGEST_QUOTE = 60


class RowError(Exception):
    """A row that does not have its format's shape; the message names field and reason, `fix` what to do."""

    def __init__(self, what: str, fix: str = "mend the row") -> None:
        super().__init__(what)
        self.fix = fix


def quoted(value: str) -> str:
    """`value` in backquotes, cut where it is long; what is no printable character is escaped."""
    shown = value if len(value) <= LONGEST_QUOTE else f"{value[:LONGEST_QUOTE]}..."
    return f"`{''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in shown)}`"


def named(keys: Iterable[str]) -> str:
    """Field names in alphabetical order, the first dozen of them."""
    ordered = sorted(map(str, keys))
    more = f" and {len(ordered) - MOST_NAMED:,} more" if len(ordered) > MOST_NAMED else ""
    return ", ".join(map(quoted, ordered[:MOST_NAMED])) + more


def kind(value: Any) -> str:
    """The JSON type of `value` in words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), type(value).__name__)


def path(key: str, inside: str) -> str:
    """How a field is called in a message: by its path, or as a field of the row."""
    return f"{inside}.{key}" if inside else f"field `{key}`"


def value_of(holder: Row, key: str, inside: str = "") -> Any:
    """The value of a field that must be there. `inside` is the path of `holder` in the row."""
    if key in holder:
        return holder[key]
    if inside:
        raise RowError(f"{inside}.{key} is missing (it has: {named(holder) or 'nothing'})")
    fix = "name the column that holds it in data.columns, or set data.format"
    raise RowError(f"field `{key}` is missing (the row has: {named(holder) or 'no fields'})", fix)


def text_of(holder: Row, key: str, inside: str = "") -> str:
    """The text of a field. It may be blank: rows whose answers say nothing are of the right shape, and are counted by
    those who read them."""
    return as_text(value_of(holder, key, inside), path(key, inside))


def as_text(value: Any, where: str) -> str:
    """`value`, which must be Unicode text: JSON may escape half of a character (`\\ud83d` alone), which no tokenizer
    takes."""
    if not isinstance(value, str):
        raise RowError(f"{where} must be text, but is {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{where} is not Unicode text: {error.reason} (character {error.start + 1})") from error
    return value


def list_of(holder: Row, key: str, what: str, inside: str = "") -> list[Any]:
    """The items of a field that must be a list and have some."""
    items = value_of(holder, key, inside)
    if not isinstance(items, list):
        raise RowError(f"{path(key, inside)} must be a list of {what}, but is {kind(items)}")
    if not items:
        raise RowError(f"{path(key, inside)} must be a list of {what}, but is empty")
    return items


def as_object(value: Any, where: str, what: str) -> Row:
    """`value`, which must be an object with the fields that `what` names."""
    if not isinstance(value, Mapping):
        raise RowError(f"{where} must be an object with {what}, but is {kind(value)}")
    return value


def flag(holder: Row, key: str, absent: bool, inside: str = "") -> bool:
    """A field that is true or false; `absent` where it is missing or null."""
    value = holder.get(key)
    if value is not None and not isinstance(value, bool):
        raise RowError(f"{path(key, inside)} must be true or false, but is {kind(value)}")
    return absent if value is None else value


def untouched(value: Any, where: str) -> Any:
    """`value` as it is: JSON that a template can print."""
    left = [(value, 0)]
    while left:
        item, depth = left.pop()
        if depth > DEEPEST:
            raise RowError(f"{where} is nested more than {DEEPEST} levels deep")
        if isinstance(item, str):
            as_text(item, where)
        elif isinstance(item, dict):
            left += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            left += [(part, depth + 1) for part in item]
        elif item is not None and not isinstance(item, (bool, int, float)):
            raise RowError(f"{where} holds a value that JSON does not have: {kind(item)}")
    return value


def from_json(value: str, where: str) -> Any:
    """What the JSON text `value` says."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, nesting without end
        raise RowError(f"{where} is not JSON: {str(error)[:100]}") from error


def conversation(messages: Sequence[Message], where: str, tools: tuple[Row, ...] = ()) -> Conversation:
    """`messages`, which must have an answer to learn from; `where` is the field that they come from."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise RowError(f"field `{where}` has no assistant turn: there is nothing to learn in it")
    if not any(message.train for message in answers):
        raise RowError(f"field `{where}` has `train: false` on every assistant turn: there is nothing to learn in it")
    return Conversation(tuple(messages), tools)


def pair(prompt: str, answer: str) -> Conversation:
    """A question and its answer."""
    return Conversation((Message("user", prompt), Message("assistant", answer)))
