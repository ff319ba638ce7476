"""Which rows are trained on, which are held out, and how often each comes in an epoch.

Knows hashes of what rows say, weights and a seed; nothing of tokens. Invariant: rows that say the same are never on
both sides, and every choice is a function of the rows' content and of the seed, not of what ran before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.batches import shuffled
from qlora_cli.data.store import CUT, KEPT, NO_KEY, Store
from qlora_cli.errors import DataError
from qlora_cli.recipe.data_schema import DataSection, SourceSection

Mask = NDArray[np.bool_]
Keys = NDArray[np.bytes_]


@dataclass
class Share:
    """The rows of one source, as masks over them: what may be used, and what became of it."""

    store: Store
    source: SourceSection
    keys: Keys
    usable: Mask
    """Kept, with something that carries loss."""
    left_out: Mask
    """By `skip` and `take`."""
    train: Mask
    held: Mask
    duplicate: Mask
    overlap: Mask


def shares(stores: Sequence[Store], sources: Sequence[SourceSection], seed: int) -> list[Share]:
    """Everything usable to be trained on, for a start."""
    found = []
    for store, source in zip(stores, sources, strict=True):
        fates = [store.fates.index(name) for name in (KEPT, CUT)]
        usable = np.isin(store.rows["fate"], fates)
        left_out = _left_out(len(usable), source, seed)
        none = np.zeros(len(usable), np.bool_)
        parts = (none.copy() for _ in range(3))
        found.append(Share(store, source, keys_of(store), usable, left_out, usable & ~left_out, *parts))
    return found


def keys_of(store: Store) -> Keys:
    """The hash of what each row says, 16 bytes that compare as such."""
    return np.ascontiguousarray(store.rows["key"]).view("S16").reshape(-1)


def _left_out(count: int, source: SourceSection, seed: int) -> Mask:
    """Rows that `skip` and `take` leave out of a shuffled source; of others they are never read."""
    found = np.zeros(count, np.bool_)
    if source.shuffle:
        last = count if source.take is None else source.skip + source.take
        found[:] = True
        found[shuffled(seed, 0, count)[source.skip : last]] = False
    return found


def mark_overlap(parts: Sequence[Share], held_out: Store) -> None:
    """Takes the rows that `held_out` holds too out of the training rows."""
    known = keys_of(held_out)
    for part in parts:
        part.overlap = part.train & np.isin(part.keys, known) & (part.keys != NO_KEY)
        part.train &= ~part.overlap


def hold_out(parts: Sequence[Share], wanted: int | float, title: str) -> None:
    """Moves the rows with the smallest content hashes from training to the held-out side, so that the choice does not
    depend on the order of the rows and equal rows stay together. A count is of distinct rows; a share takes the hashes
    below that share of their range (at least one)."""
    ordered = np.unique(np.concatenate([part.keys[part.train] for part in parts]))
    limit = _limit(ordered, wanted, title)
    for part in parts:
        part.held = part.train & (part.keys <= limit)
        part.train &= ~part.held


def _limit(ordered: Keys, wanted: int | float, title: str) -> np.bytes_:
    """The largest hash held out."""
    if not len(ordered):
        return np.bytes_(b"")
    if isinstance(wanted, int):
        if wanted >= len(ordered):
            raise DataError(
                f"data.eval_split is {wanted}, but {title} has only {len(ordered)} distinct rows",
                why="no row would be left to train on",
                fix="lower data.eval_split, or name held-out rows in data.eval",
            )
        return np.bytes_(ordered[wanted - 1])
    border = math.floor(wanted * 2**64).to_bytes(8, "big")
    below = int(np.searchsorted(ordered, np.bytes_(border)))
    return np.bytes_(ordered[max(0, below - 1)])


def mark_duplicates(parts: Sequence[Share], drop: bool) -> None:
    """Training rows that say what an earlier one says, also of an earlier source; left out if `drop`."""
    keys = np.concatenate([part.keys[part.train] for part in parts])
    first = np.zeros(len(keys), np.bool_)
    first[np.unique(keys, return_index=True)[1]] = True
    start = 0
    for part in parts:
        places = np.flatnonzero(part.train)
        part.duplicate[places] = ~first[start : start + len(places)]
        start += len(places)
        if drop:
            part.train &= ~part.duplicate


def sequences(part: Share, rows: Mask) -> NDArray[np.int64]:
    """Places of the sequences of these rows."""
    return np.flatnonzero(rows[part.store.sequences["row"]])


def epoch(parts: Sequence[Share], data: DataSection, seed: int) -> list[NDArray[np.int64]]:
    """The sequences of an epoch, by source."""
    every = [sequences(part, part.train) for part in parts]
    weights = [part.source.weight for part in parts]
    if data.mix == "concat":
        counts = [round(len(each) * weight) for each, weight in zip(every, weights, strict=True)]
    else:
        counts = _interleaved([len(each) for each in every], weights, data.stop == "all_exhausted")
    return [_repeated(each, count, seed + i) for i, (each, count) in enumerate(zip(every, counts, strict=True))]


def _interleaved(sizes: Sequence[int], weights: Sequence[float], until_last: bool) -> list[int]:
    """How many of each source are drawn, in the proportion of the weights, until the first of them (or the last) has
    none left."""
    lengths = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    whole = max(lengths) if until_last else min(lengths)
    return [round(weight * whole) for weight in weights]


def _repeated(every: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """`count` of them: all as often as they fit, and for the rest some, chosen at random."""
    if not len(every):
        return every
    times, rest = divmod(count, len(every))
    some = np.sort(shuffled(seed, 1, len(every))[:rest])
    return np.concatenate([np.tile(every, times), every[some]]).astype(np.int64)
