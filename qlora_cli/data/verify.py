"""What has to hold of a template, seen on the first rows before the rest is encoded.

Knows rows with their answers, and a tokenizer's `{% generation %}` marks; nothing of files. Invariant: rows that pass
were trained on as the model is prompted, and end their answers as it is stopped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.conversation import Conversation
from qlora_cli.data.encode import encode_turns
from qlora_cli.data.formats import RowError
from qlora_cli.data.render import RAISED
from qlora_cli.data.turns import ChatTurns, Row, TurnEncoder
from qlora_cli.errors import DataError

REWRITES = "the chat template rewrites earlier turns once later ones follow: such conversations become several rows"
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def verify(encoder: TurnEncoder, conversations: Sequence[Conversation]) -> tuple[str, ...]:
    """What is to be said of the template, if anything. Raises `DataError` that names the property that fails. Rows that
    the template refuses are left out: they are reported where they are read."""
    notes: dict[str, None] = {}
    for conversation in conversations:
        try:
            rows = encode_turns(conversation, encoder)
            for row in rows:
                _check(row, conversation, encoder)
        except RowError:
            continue
        if len(rows) > 1:
            notes[REWRITES] = None
        if isinstance(encoder, ChatTurns):
            for row in rows:
                _check_marks(row, conversation, encoder)
    return tuple(notes)


def _check(row: Row, conversation: Conversation, encoder: TurnEncoder) -> None:
    ids = row.ids.tolist()
    if encoder.bos_id is not None and ids[:2] == [encoder.bos_id] * 2:
        raise _error("a row begins with two BOS tokens", "the model was trained with one, as it is prompted with")
    for answer in row.answers:
        prompt = encoder.prompt(conversation.messages[: answer.message], conversation.tools)
        if answer.message > 0 and ids[: answer.start] != prompt:
            raise _error(
                f"what precedes answer {answer.message + 1} of a conversation is not what the model is prompted with",
                "the model would be trained on other tokens than it is used with",
            )
        if answer.stop <= answer.start or ids[answer.stop - 1] not in encoder.stop_ids:
            raise _error("an answer does not end in an end-of-turn token", "the model would never learn to stop")


def _error(what: str, why: str, fix: str = "mend the template, or choose another data.template") -> DataError:
    return DataError(f"the template does not hold on the first rows: {what}", why=why, fix=fix)


def _check_marks(row: Row, conversation: Conversation, encoder: ChatTurns) -> None:
    """Our mask against that of the template's own marks, where it has some. What follows an end-of-turn token is never
    the model's to say, so marks may end with it or before it, or with the white space behind it."""
    marked = _marked(row, conversation, encoder)
    if marked is None:
        return
    ours = np.zeros(len(row.ids), np.bool_)
    allowed = np.zeros(len(row.ids), np.bool_)
    for answer in row.answers:
        ours[answer.start : answer.stop] = True
        allowed[answer.stop - 1] = True
        for place in range(answer.stop, len(row.ids)):
            if encoder.tokenizer.decode([int(row.ids[place])]).strip():
                break
            allowed[place] = True
    first = row.answers[0]
    start = 0 if first.message == conversation.assistant_turns()[0] else first.start
    wrong = np.flatnonzero((ours != marked) & ~allowed)
    wrong = wrong[wrong >= start]
    if len(wrong):
        tokens = " ".join(encoder.tokenizer.convert_ids_to_tokens(row.ids[wrong[:8]].tolist()))
        side = "leave out" if ours[wrong[0]] else "cover"
        raise DataError(
            f"the template's {{% generation %}} marks {side} tokens {int(wrong[0])} and on of a row: {tokens}",
            why="by encoding the turns, the answers are others than the template says",
            fix="mend the marks in the template, or choose another data.template",
        )


def _marked(row: Row, conversation: Conversation, encoder: ChatTurns) -> NDArray[np.bool_] | None:
    """The tokens within the template's marks; None where it has none, or where its text has other tokens (across the
    border to an answer) or a turn begins or ends in white space, of which transformers knows no token."""
    messages = conversation.messages[: row.answers[-1].message + 1]
    template, tools = encoder.tokenizer.chat_template, [dict(tool) for tool in conversation.tools] or None
    if not isinstance(template, str) or not _MARK.search(template):
        return None
    if any(message.content != message.content.strip() for message in messages if message.role == "assistant"):
        return None
    try:
        made = encoder.tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            tools=tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except RAISED:
        return None
    size = len(row.ids)
    if list(made["input_ids"])[:size] != row.ids.tolist():
        return None
    return np.array(made["assistant_masks"][:size], np.bool_)
