"""What the recipe's limits leave of a row.

Knows a row's ids and loss, and nothing of messages: an answer is a run of tokens that carry loss. Invariant: every
answer that remains ends in a supervised end-of-turn token, except in a text, whose every token carries loss and which
may be cut into pieces or lose its beginning. The caller's row is left alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.encode import Encoded
from qlora_cli.data.formats import RowError


@dataclass(frozen=True)
class Fitted:
    """The rows that remain (none without a target), and whether something of the row is lost (perhaps all of it)."""

    rows: tuple[Encoded, ...]
    cut: bool


def fit(  # noqa: PLR0913 - the limits as the recipe names them
    row: Encoded,
    *,
    max_length: int,
    too_long: Literal["drop", "truncate", "split", "error"],
    truncate: Literal["end", "start"] = "end",
    source_max_length: int | None = None,
    target_max_length: int | None = None,
    stop_ids: Collection[int],
    bos_id: int | None = None,
) -> Fitted:
    """The row within the limits, arguments as in the recipe. `source_max_length` is for what precedes the first answer
    (of several turns too), and `target_max_length` for each answer; both come before `max_length`. Raises `RowError`
    where the recipe wants a longer row to stop the run, or a row to be split that is no text."""
    short = row if target_max_length is None else shorten_answers(row, target_max_length, stop_ids)
    short = short if source_max_length is None else shorten_source(short, source_max_length, bos_id)
    pieces: tuple[Encoded, ...] = (short,)
    if len(short) <= max_length:
        pass
    elif too_long == "error":
        raise RowError(f"{len(short):,} tokens, more than data.max_length ({max_length:,})")
    elif too_long == "split":
        pieces = split(short, max_length)
        return Fitted(tuple(piece for piece in pieces if piece.targets), len(short) < len(row) or not pieces)
    elif too_long == "drop":
        pieces = ()
    else:
        pieces = (shorten(short, max_length, stop_ids) if truncate == "end" else behead(short, max_length, bos_id),)
    return Fitted(tuple(piece for piece in pieces if piece.targets), sum(map(len, pieces)) < len(row))


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


def behead(row: Encoded, max_length: int, bos_id: int | None) -> Encoded:
    """The last `max_length` tokens; BOS stays in front of them where the row began with it.

    What is left of an answer whose beginning is lost stays as context, without loss: it would teach to begin in the
    middle. The last answer has to stay whole, or nothing is left. Of a text the rest carries loss as before.
    """
    opening = _opening(row, bos_id, max_length)
    start = len(row) - (max_length - opening)
    loss = row.loss.copy()
    if not _is_text(row):
        answers = _answers(row)
        if not len(answers) or answers[-1][0] < start:
            return replace(row, ids=row.ids[:0], loss=row.loss[:0])
        for first, stop in answers:
            if first < start:
                loss[first:stop] = False
    return _without(replace(row, loss=loss), opening, start)


def split(row: Encoded, max_length: int) -> tuple[Encoded, ...]:
    """The text in pieces of `max_length` tokens. Each begins with the last token of the piece before, without loss, so
    that every token is predicted once; only the last piece ends in the end-of-turn token. Raises `RowError`."""
    if not _is_text(row):
        raise RowError(
            f"{len(row):,} tokens, more than data.max_length ({max_length:,}), and not all of them carry loss",
            "set data.too_long to drop or truncate: only plain text can be split",
        )
    if max_length < 2:
        return ()
    pieces = []
    for start in range(0, len(row) - 1, max_length - 1):
        loss = row.loss[start : start + max_length].copy()
        loss[0] &= start == 0
        pieces.append(replace(row, ids=row.ids[start : start + max_length].copy(), loss=loss))
    return tuple(pieces)


def shorten_source(row: Encoded, limit: int, bos_id: int | None) -> Encoded:
    """Cuts the start of what precedes the first answer; BOS stays, as one of the `limit` tokens."""
    targets = np.flatnonzero(row.loss)
    source = int(targets[0]) if len(targets) else 0
    if source <= limit:
        return row
    opening = _opening(row, bos_id, limit)
    return _without(row, opening, source - (limit - opening))


def shorten_answers(row: Encoded, limit: int, stop_ids: Collection[int]) -> Encoded:
    """Cuts the end of each answer of more than `limit` tokens; the last token left of it is its end-of-turn token. With
    a limit of 1 that would be all of it, which carries no loss: silence is not what the row teaches."""
    keep, ids, loss = np.ones(len(row), np.bool_), row.ids.copy(), row.loss.copy()
    for first, stop in _answers(row):
        if stop - first > limit:
            keep[first + limit : stop] = False
            if int(ids[stop - 1]) in stop_ids:
                ids[first + limit - 1] = ids[stop - 1]
            loss[first : first + limit] = limit > 1
    if keep.all():
        return row
    return replace(row, ids=ids[keep], loss=loss[keep])


def _answers(row: Encoded) -> NDArray[np.intp]:
    """[N, 2]: the first token of each run of tokens that carry loss, and the place behind its last."""
    padded = np.concatenate(([False], row.loss, [False]))
    return np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)


def _is_text(row: Encoded) -> bool:
    """Every token that can be predicted carries loss."""
    return bool(row.loss[1:].all())


def _opening(row: Encoded, bos_id: int | None, limit: int) -> int:
    """1 where the row begins with BOS and there is room for more than that, else 0."""
    return int(limit > 1 and len(row) > 0 and bos_id is not None and int(row.ids[0]) == bos_id)


def _without(row: Encoded, start: int, stop: int) -> Encoded:
    """The row without a span."""
    keep = np.ones(len(row), np.bool_)
    keep[start:stop] = False
    return replace(row, ids=row.ids[keep], loss=row.loss[keep])
