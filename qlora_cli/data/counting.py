"""What became of the rows of a source, in numbers and row by row.

Knows stores and masks over their rows; nothing of how they came about. Invariant: every row of a store is counted once
as kept, held out, left out or dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qlora_cli.data.mixing import Mask, Share, keys_of, sequences
from qlora_cli.data.reading import BAD
from qlora_cli.data.receipt import SourceReceipt, SplitReceipt
from qlora_cli.data.store import CUT, KEPT, Rows, Store

OVERLAP = "also held out"
DUPLICATE = "duplicate"


def digest(store: Store) -> str:
    """A hash of what its rows say, whatever their order."""
    return hashlib.sha256(np.sort(keys_of(store)).tobytes()).hexdigest()


def split_receipt(rows: Rows) -> SplitReceipt:
    """Counts of chosen rows."""
    return SplitReceipt.of(rows.source_rows(), rows.lengths, rows.targets)


def fates(store: Store) -> dict[str, int]:
    """How many rows met each fate."""
    counts = np.bincount(store.rows["fate"], minlength=len(store.fates))
    return {name: int(count) for name, count in zip(store.fates, counts, strict=True) if count}


def source_receipt(name: str, files: tuple[str, ...], row_format: str, part: Share) -> SourceReceipt:
    """What became of a source's rows."""
    met = fates(part.store)
    dropped = {name: count for name, count in met.items() if name not in (KEPT, CUT)}
    gone = {OVERLAP: int(part.overlap.sum()), DUPLICATE: int((part.duplicate & ~part.train).sum())}
    dropped |= {name: count for name, count in gone.items() if count}
    places = sequences(part, part.train)
    table = part.store.sequences[places]
    lengths, targets = table["length"].astype(np.int64), table["targets"].astype(np.int64)
    return SourceReceipt(
        source=name,
        files=files,
        format=row_format,
        sha256=digest(part.store),
        read=len(part.usable),
        kept=int(part.train.sum()),
        held_out=int(part.held.sum()),
        left_out=int((part.left_out & part.usable).sum()),
        cut=met.get(CUT, 0),
        duplicate=int(part.duplicate.sum()),
        overlap=int(part.overlap.sum()),
        bad=met.get(BAD, 0),
        trailing_turns=part.store.facts["trailing_turns"],
        dropped=dropped,
        trained=SplitReceipt.of(int(part.train.sum()), lengths, targets),
    )


def lost_rows(share: Share) -> Iterator[dict[str, Any]]:
    """Each row that was dropped, cut, a duplicate or held out too, with its place."""
    store, notes = share.store, share.store.notes()
    kept_fate = store.fates.index(KEPT)
    counted: Mapping[str, Mask] = {DUPLICATE: share.duplicate, OVERLAP: share.overlap}
    interesting = (store.rows["fate"] != kept_fate) | share.duplicate | share.overlap
    for row in np.flatnonzero(interesting):
        fate = store.fates[int(store.rows["fate"][row])]
        counts = [name for name, mask in counted.items() if mask[row]] + ([fate] if fate != KEPT else [])
        note = {"what": notes[int(row)]} if int(row) in notes else {}
        yield {"where": store.where(int(row)), "counts": counts, **note}
