"""Formats whose turns must be found: in text by their markers, in a tree of replies by their ranks.

Knows markers and trees; nothing of templates. Invariant: speakers take turns, the human first; text that does not
read so is refused, since a marker may as well be a quotation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlora_cli.data.conversation import Conversation, Message, Role
from qlora_cli.data.fields import (
    Row,
    RowError,
    as_object,
    conversation,
    flag,
    kind,
    quoted,
    text_of,
    value_of,
)

# A line that begins with more `#` is a heading, no marker; behind text (`in C#### Assistant:`) the last three are one.
GUANACO = re.compile(r"(?m:^)#{4,} (?:Human|Assistant):|\n?### (Human|Assistant):")
CHIP2 = re.compile(r"(?:^|\n)<(human|bot)>:")
HH_RLHF = re.compile(r"(?:^|\n\n)(Human|Assistant):")
SPEAKERS: Mapping[str, Role] = {"human": "user", "assistant": "assistant", "bot": "assistant"}
REPLIES_TO: Mapping[str, str] = {"prompter": "assistant", "assistant": "prompter"}


def guanaco(row: Row) -> Conversation:
    """`{"text": "### Human: ...### Assistant: ...### Human: ..."}`, as in `timdettmers/openassistant-guanaco`."""
    return _marked(row, "text", GUANACO)


def chip2(row: Row) -> Conversation:
    """`{"text": "<human>: ...\\n<bot>: ..."}`, as in LAION's OIG chip2."""
    return _marked(row, "text", CHIP2)


def hh_rlhf(row: Row) -> Conversation:
    """`{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ..."}`, as in `Anthropic/hh-rlhf`; `rejected` is not read."""
    return _marked(row, "chosen", HH_RLHF)


def _marked(row: Row, field: str, pattern: re.Pattern[str]) -> Conversation:
    """The turns between markers. The space behind a marker and one before the next belong to neither turn."""
    text = text_of(row, field)
    marks = [mark for mark in pattern.finditer(text) if mark[1]]
    speakers = [mark[1].lower() for mark in marks]
    _check_start(text, marks, field)
    _check_order(speakers, marks, field)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = [text[mark.end() : end].removeprefix(" ").removesuffix(" ") for mark, end in zip(marks, ends, strict=True)]
    return conversation(
        [Message(SPEAKERS[speaker], turn) for speaker, turn in zip(speakers, turns, strict=True)], field
    )


def _check_start(text: str, marks: list[re.Match[str]], field: str) -> None:
    if not marks:
        raise RowError(f"field `{field}` has no marker of a turn", "set data.format: text to learn all of it")
    if text[: marks[0].start()].strip():
        raise RowError(f"field `{field}` has text before its first marker (character {marks[0].start() + 1})")


def _check_order(speakers: list[str], marks: list[re.Match[str]], field: str) -> None:
    if SPEAKERS[speakers[0]] != "user":
        raise RowError(f"field `{field}` must begin with the human's turn, but begins with the {speakers[0]}'s")
    for earlier, later, mark in zip(speakers, speakers[1:], marks[1:], strict=False):
        if earlier == later:
            where = f"character {mark.start(1) + 1}"
            raise RowError(f"field `{field}` has two turns of the {later} one after the other (the second at {where})")


def oasst(row: Row) -> Conversation:
    """An OpenAssistant tree, `{"prompt": {"text": ..., "role": "prompter", "replies": [...]}}`: the path of the reply
    of lowest rank at each turn (the first of equals, those without a rank last), up to its last answer. Replies that
    were deleted or rejected in review are not on it."""
    node, where = as_object(value_of(row, "prompt"), "field `prompt`", "`text`, `role` and `replies`"), "prompt"
    if not _usable(node, where):
        raise RowError("prompt was deleted or rejected in review", "leave the row out")
    role, turns = "prompter", [_turn(node, "prompter", where)]
    while best := _best_reply(node, where):
        (node, where), role = best, REPLIES_TO[role]
        turns.append(_turn(node, role, where))
    answered = turns if turns[-1].role == "assistant" else turns[:-1]
    if not answered:
        raise RowError("prompt has no reply that can be used: there is nothing to learn in it", "leave the row out")
    return conversation(answered, "prompt")


def _turn(node: Row, role: str, where: str) -> Message:
    if (found := text_of(node, "role", where)) != role:
        raise RowError(
            f"{where}.role must be `{role}`, but is {quoted(found)}: speakers take turns, the prompter first"
        )
    return Message("user" if role == "prompter" else "assistant", text_of(node, "text", where))


def _best_reply(node: Row, where: str) -> tuple[Row, str] | None:
    replies = [] if node.get("replies") is None else node["replies"]
    if not isinstance(replies, list):
        raise RowError(f"{where}.replies must be a list of replies, but is {kind(replies)}")
    places = [f"{where}.replies[{position}]" for position in range(len(replies))]
    nodes = [as_object(reply, place, "`text` and `role`") for reply, place in zip(replies, places, strict=True)]
    usable = [(reply, place) for reply, place in zip(nodes, places, strict=True) if _usable(reply, place)]
    return min(usable, key=lambda choice: _rank(*choice), default=None)


def _usable(node: Row, where: str) -> bool:
    return not flag(node, "deleted", False, where) and flag(node, "review_result", True, where)


def _rank(node: Row, where: str) -> tuple[bool, float]:
    rank: Any = node.get("rank")
    whole = type(rank) is int or (isinstance(rank, float) and rank.is_integer())  # tables have 0.0 where some are null
    if rank is not None and not whole:
        raise RowError(f"{where}.rank must be a whole number, but is {rank if type(rank) is float else kind(rank)}")
    return (rank is None, 0 if rank is None else rank)
