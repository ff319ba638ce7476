"""A row as the model sees it: tokens, what of them carries loss, and the text they stand for.

Knows a tokenizer and one sequence of ids. Invariant: the pieces of a text, joined, are what the tokenizer makes of all
its tokens together, and the first token of a sequence, which nothing predicts, never carries loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.encode import Encoded


@dataclass(frozen=True)
class Piece:
    """Text of a run of tokens that are marked alike."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Fate:
    """What became of a row: `train`, `held out`, `left out` (by skip and take) or `dropped`; what the receipt counts it
    as beside that; and what is wrong with it."""

    became: str
    counts: tuple[str, ...] = ()
    what: str = ""

    def line(self) -> str:
        """In a few words."""
        head = f"{self.became}: {', '.join(self.counts)}" if self.counts else self.became
        return f"{head} ({self.what})" if self.what else head


@dataclass(frozen=True)
class SeenRow:
    """A sequence, `part` of the `parts` that a row became; `values` is the row itself where it became none."""

    where: str
    fate: Fate
    part: int = 1
    parts: int = 1
    ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    loss: tuple[bool, ...] = ()
    """True where the token is a target; the first token never is."""
    pieces: tuple[Piece, ...] = ()
    values: str = ""

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "event": "row",
            "where": self.where,
            "became": self.fate.became,
            "counts": self.fate.counts,
            **({"what": self.fate.what} if self.fate.what else {}),
            "part": self.part,
            "parts": self.parts,
            "supervised_tokens": sum(self.loss),
            "ids": self.ids,
            "tokens": self.tokens,
            "loss": self.loss,
            "text": "".join(piece.text for piece in self.pieces),
            **({"values": self.values} if self.values else {}),
        }


def see(row: Encoded, fate: Fate, tokenizer: Any, part: tuple[int, int]) -> SeenRow:
    """The sequence, the first of `part` of as many as its second."""
    ids, loss = row.ids.tolist(), row.loss.copy()
    loss[:1] = False

    def decode(some: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    tokens = tuple(map(str, tokenizer.convert_ids_to_tokens(ids)))
    return SeenRow(
        row.where, fate, *part, tuple(ids), tokens, tuple(loss.tolist()), tuple(pieces_of(decode, ids, loss))
    )


def pieces_of(decode: Callable[[Sequence[int]], str], ids: Sequence[int], loss: NDArray[np.bool_]) -> Iterator[Piece]:
    """Runs of tokens that are marked alike, as text; joined, they are the text of all tokens. A character that two runs
    share goes to the later one."""
    if not len(ids):
        return
    borders = [0, *(np.flatnonzero(loss[1:] != loss[:-1]) + 1).tolist(), len(ids)]
    whole, done = decode(ids), 0
    for start, stop in pairwise(borders):
        end = _common(decode(ids[:stop]), whole) if stop < len(ids) else len(whole)
        yield Piece(whole[done:end], bool(loss[start]))
        done = max(done, end)


def _common(part: str, whole: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(part, whole, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(part), len(whole)))
