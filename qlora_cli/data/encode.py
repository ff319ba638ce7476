"""Conversations to token ids with a loss mask.

Knows turns; nothing of files, limits or batches. Invariant: the mask follows from encoding the turns, never from
searching for marker strings, and every supervised turn ends in a supervised end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.conversation import Conversation
from qlora_cli.data.formats import RowError
from qlora_cli.data.turns import Answer, Row, TurnEncoder

LossOn = Literal["assistant", "completion", "last", "all"]
Arrays = tuple[NDArray[np.int32], NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One training row: `ids` [T] int32, `loss` [T] bool (True where the token is a target), and where it came from."""

    ids: NDArray[np.int32]
    loss: NDArray[np.bool_]
    where: str

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def targets(self) -> int:
        """Tokens that carry loss. The first token is never predicted, so it never counts."""
        return int(np.count_nonzero(self.loss[1:]))


def encode(conversation: Conversation, turns: TurnEncoder, loss_on: LossOn, where: str = "") -> list[Encoded]:
    """The conversation as one row; as several where the template rewrites earlier turns once later ones follow
    (as those do that strip reasoning from history), since then no single text holds what each turn was prompted with.

    `completion`: all that follows what the row's first answer was prompted with. A message whose `train` is False never
    carries loss; where that is no answer, nothing else between the answers around it does either. Raises `RowError`.
    """
    rows = encode_turns(conversation, turns)
    return [Encoded(*arrays, where) for arrays in _masked(conversation, rows, loss_on)]


def encode_many(
    conversations: Sequence[Conversation], turns: TurnEncoder, loss_on: LossOn
) -> list[list[Arrays] | RowError]:
    """(ids, loss) of the rows that `encode` makes of each, or the error that it raises; faster, since the tokenizer is
    called for all at once. Keeps nothing between calls, so that threads may call it at the same time."""
    pairs = zip(conversations, turns.rows(conversations), strict=True)
    return [_encoded(conversation, row, turns, loss_on) for conversation, row in pairs]


def _encoded(
    conversation: Conversation, row: Row | None, turns: TurnEncoder, loss_on: LossOn
) -> list[Arrays] | RowError:
    try:
        rows = encode_turns(conversation, turns) if row is None else [row]
    except RowError as error:
        return error
    return _masked(conversation, rows, loss_on)


def encode_turns(conversation: Conversation, turns: TurnEncoder) -> list[Row]:
    """The conversation's rows up to its last answer, turn by turn: each answer stands in the first row that holds what
    it was prompted with. Raises `RowError`."""
    rows: list[tuple[list[int], list[Answer]]] = []
    for position in conversation.assistant_turns():
        before, answer = turns.turn(conversation.messages[: position + 1], conversation.tools)
        ids = before + answer
        continues = rows and ids[: len(rows[-1][0])] == rows[-1][0]
        earlier = rows.pop()[1] if continues else []
        rows.append((ids, [*earlier, Answer(position, len(before), len(ids))]))
    return [Row(np.array(ids, np.int32), answers) for ids, answers in rows]


def _masked(conversation: Conversation, rows: Sequence[Row], loss_on: LossOn) -> list[Arrays]:
    untrained = [position for position, message in enumerate(conversation.messages) if not message.train]
    wanted = rows[-1:] if loss_on == "last" else rows
    return [(row.ids, _mask(row, loss_on, untrained)) for row in wanted]


def _mask(row: Row, loss_on: LossOn, untrained: Sequence[int]) -> NDArray[np.bool_]:
    loss = np.zeros(len(row.ids), np.bool_)
    if loss_on == "all":
        loss[:] = True
    elif loss_on == "completion":
        loss[row.answers[0].start :] = True
    else:
        for answer in row.answers[-1:] if loss_on == "last" else row.answers:
            loss[answer.start : answer.stop] = True
    if untrained:
        _silence(loss, row, untrained)
    return loss


def _silence(loss: NDArray[np.bool_], row: Row, untrained: Sequence[int]) -> None:
    """Takes the loss from what must not be learned. Where a message begins is known of answers only, so that between
    two answers it is all or nothing."""
    message, place = -1, 0
    for answer in row.answers:
        if answer.message in untrained:
            loss[answer.start : answer.stop] = False
        if any(message < position < answer.message for position in untrained):
            loss[place : answer.start] = False
        message, place = answer.message, answer.stop
