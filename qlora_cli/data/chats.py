"""Formats whose rows are lists of turns: `messages`, `sharegpt`, and prompts and completions that may be such lists.

Knows roles and the fields of turns; nothing of templates. Invariant: a turn's fields that a template may read are
passed on as they are or refused by name; the order of turns is the row's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from qlora_cli.data.conversation import Conversation, Message, Role
from qlora_cli.data.fields import (
    Row,
    RowError,
    as_object,
    as_text,
    conversation,
    flag,
    from_json,
    kind,
    list_of,
    pair,
    quoted,
    text_of,
    untouched,
    value_of,
)

ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SPEAKERS: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def messages(row: Row) -> Conversation:
    """`{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}], "tools": [...]}`."""
    return conversation(turns(row, "messages"), "messages", _tools(row))


def sharegpt(row: Row) -> Conversation:
    """`{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}], "system": ..., "tools": [...]}`.
    Whoever speaks first is kept; the value of a `function_call` is `{"name": ..., "arguments": ...}` as JSON."""
    items = list_of(row, "conversations", "turns")
    spoken = tuple(_spoken(item, f"conversations[{position}]") for position, item in enumerate(items))
    return conversation(_system(row, spoken) + spoken, "conversations", _tools(row))


def prompt_completion(row: Row) -> Conversation:
    """`{"prompt": ..., "completion": ...}`, both text or both lists of messages; answers in the prompt carry no
    loss."""
    if not any(isinstance(value_of(row, field), list) for field in ("prompt", "completion")):
        return pair(text_of(row, "prompt"), text_of(row, "completion"))
    given = tuple(replace(turn, train=False) if turn.role == "assistant" else turn for turn in turns(row, "prompt"))
    learned = conversation(turns(row, "completion"), "completion").messages
    return Conversation(given + learned, _tools(row))


def turns(row: Row, field: str) -> tuple[Message, ...]:
    """The messages in a field, whoever has the last word."""
    return tuple(_message(item, f"{field}[{i}]") for i, item in enumerate(list_of(row, field, "messages")))


def _message(item: Any, where: str) -> Message:
    turn = as_object(item, where, "`role` and `content`")
    role = _word(turn, "role", where, ROLES)
    extra = _extra(turn, role, where)
    content = "" if "tool_calls" in extra and turn.get("content") is None else _content(turn, where)
    return Message(role, content, _train(turn, where), extra)


def _word(turn: Row, key: str, where: str, known: Mapping[str, Role]) -> Role:
    word = text_of(turn, key, where)
    if word not in known:
        words = "roles" if key == "role" else "speakers"
        raise RowError(f"{where}.{key} is {quoted(word)}; known {words} are {', '.join(known)}")
    return known[word]


def _content(turn: Row, where: str) -> str:
    """Text, or a list of text parts, which are joined."""
    content = value_of(turn, "content", where)
    if not isinstance(content, list):
        return as_text(content, f"{where}.content")
    return "".join(_part(part, f"{where}.content[{position}]") for position, part in enumerate(content))


def _part(item: Any, where: str) -> str:
    part = as_object(item, where, "`type` and `text`")
    if text_of(part, "type", where) != "text":
        raise RowError(f"{where}.type is {quoted(part['type'])}; only `text` parts can be read")
    return text_of(part, "text", where)


def _train(turn: Row, where: str) -> bool:
    """Whether a turn may carry loss. Other tools' spellings are refused rather than passed over."""
    if turn.get("weight") not in (None, 1):
        raise RowError(f"{where}.weight is not read", "write `train: false` where a turn is not to be learned")
    return flag(turn, "train", True, where)


def _extra(turn: Row, role: Role, where: str) -> dict[str, Any]:
    """Fields for the template. Null and an empty list say the same as no field: tables fill what a row lacks."""
    if turn.get("function_call") is not None:
        raise RowError(f"{where}.function_call is not read", "write it as an item of `tool_calls`")
    there = [key for key in EXTRA if turn.get(key) is not None and turn[key] != []]
    for key in there:
        owner, check = EXTRA[key]
        if owner not in (None, role):
            raise RowError(f"{where}.{key} belongs to a turn of role {owner}, but this one's is {role}")
        check(turn[key], f"{where}.{key}")
    return {key: turn[key] for key in there}


def _objects(value: Any, where: str) -> tuple[Row, ...]:
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of objects, but is {kind(value)}")
    for position, item in enumerate(value):
        untouched(as_object(item, f"{where}[{position}]", "a function's name"), f"{where}[{position}]")
    return tuple(value)


# Fields of a message that go to the template: the role that they belong to (None: any), and their check.
EXTRA: Mapping[str, tuple[Role | None, Callable[[Any, str], Any]]] = {
    "name": (None, as_text),
    "reasoning_content": ("assistant", as_text),
    "tool_calls": ("assistant", _objects),
    "tool_call_id": ("tool", as_text),
}


def _tools(row: Row) -> tuple[Row, ...]:
    """What the model may call: a list, or one as JSON text, as tables keep it since tools differ in their fields."""
    value = row.get("tools")
    if isinstance(value, str) and value:
        value = from_json(as_text(value, "field `tools`"), "field `tools`")
    return () if value is None or value == "" else _objects(value, "field `tools`")


def _spoken(item: Any, where: str) -> Message:
    turn = as_object(item, where, "`from` and `value`")
    role = _word(turn, "from", where, SPEAKERS)
    value = text_of(turn, "value", where)
    if turn["from"] == "function_call":
        return Message(role, "", _train(turn, where), {"tool_calls": _calls(value, f"{where}.value")})
    return Message(role, value, _train(turn, where))


def _calls(value: str, where: str) -> list[dict[str, Any]]:
    """The calls in a `function_call` turn, one or a list of them, as `messages` would have them."""
    found = from_json(value, where)
    calls = [_call(call, where) for call in (found if isinstance(found, list) else [found])]
    if not calls:
        raise RowError(f"{where} must be a function's `name` and `arguments`, but is an empty list")
    return calls


def _call(item: Any, where: str) -> dict[str, Any]:
    call = as_object(item, where, "`name` and `arguments`")
    name, arguments = text_of(call, "name", where), untouched(value_of(call, "arguments", where), f"{where}.arguments")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _system(row: Row, spoken: tuple[Message, ...]) -> tuple[Message, ...]:
    if row.get("system") in (None, ""):
        return ()
    if any(turn.role == "system" for turn in spoken):
        raise RowError("field `system` and a turn of `conversations` both are the system's", "keep one of them")
    return (Message("system", text_of(row, "system")),)
