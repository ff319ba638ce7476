"""Conversations to token ids with a loss mask.

Knows turns and limits; nothing of files or batches. Invariant: the mask follows from encoding the turns, never from
searching for marker strings, and every supervised turn ends in a supervised end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.conversation import Conversation
from qlora_cli.data.turns import TurnEncoder

LossOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One training row: `ids` [T] int32, `loss` [T] bool (True where the token is a target), and where it came from."""

    ids: NDArray[np.int32]
    loss: NDArray[np.bool_]
    where: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens that carry loss. The first token is never predicted, so it never counts."""
        return int(self.loss[1:].sum())


def encode(conversation: Conversation, turns: TurnEncoder, loss_on: LossOn, where: str = "") -> list[Encoded]:
    """The conversation as one row; as several where the template rewrites earlier turns once later ones follow
    (as those do that strip reasoning from history), since then no single text holds what each turn was prompted with.
    """
    rows: list[tuple[list[int], list[bool]]] = []
    for position in conversation.assistant_turns():
        before, answer = turns.turn(conversation.messages[: position + 1])
        ids, answer_from = before + answer, len(before)
        previous = rows[-1] if rows else ([], [])
        if rows and ids[: len(previous[0])] == previous[0]:
            rows.pop()
            history = previous[1]
        else:
            history = []
        mask = history + [False] * (answer_from - len(history)) + [True] * (len(ids) - answer_from)
        rows.append((ids, mask))
    return _apply(loss_on, [Encoded(np.array(i, np.int32), np.array(m, np.bool_), where) for i, m in rows])


def _apply(loss_on: LossOn, rows: list[Encoded]) -> list[Encoded]:
    if loss_on == "all":
        return [replace(row, loss=np.ones(len(row), np.bool_)) for row in rows]
    if loss_on == "last":
        return [_only_last_run(rows[-1])]
    return rows


def _only_last_run(row: Encoded) -> Encoded:
    loss = row.loss.copy()
    masked = np.flatnonzero(~loss)
    if len(masked):
        loss[: masked[-1] + 1] = False
    return replace(row, loss=loss)


def shorten(row: Encoded, max_length: int, stop_ids: Collection[int]) -> Encoded:
    """The first `max_length` tokens or fewer, the last of them an end-of-turn target.

    A cut through an answer replaces its last kept token by the end-of-turn token that the row ended with, unless that
    would be all of the answer: silence is not what the row teaches. A cut before an answer drops its prompt too, back
    to the end of the answer before it (perhaps to nothing).
    """
    ids, loss = row.ids[:max_length].copy(), row.loss[:max_length].copy()
    if loss[-1:].any() and int(ids[-1]) not in stop_ids:
        ids[-1] = row.ids[-1]
        loss[-1] = loss[-2:-1].any()
    targets = np.flatnonzero(loss)
    kept = targets[-1] + 1 if len(targets) else 0
    return replace(row, ids=ids[:kept], loss=loss[:kept])
