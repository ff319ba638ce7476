"""`qlora data`: what became of every row, and rows as the model sees them.

Sees the whole recipe and a tokenizer; no model. Invariant: ids and marks of a row that is trained on or held out are
those that training and evaluation are given; a row of which nothing is left is encoded without the limits it failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.cache.entries import Cache, cache_place
from qlora_cli.data.counting import DUPLICATE, OVERLAP, lost_rows
from qlora_cli.data.dataset import TokenData, load_data
from qlora_cli.data.encode import encode
from qlora_cli.data.formats import RowError
from qlora_cli.data.mixing import Share, sequences
from qlora_cli.data.reading import Encoder
from qlora_cli.data.receipt import DataReceipt, check_limits
from qlora_cli.data.sources import SourceRow, open_source
from qlora_cli.data.store import KEPT
from qlora_cli.data.turns import turn_encoder
from qlora_cli.errors import DataError, Problem
from qlora_cli.model.base import load_tokenizer
from qlora_cli.model.folder import find_base
from qlora_cli.recipe.data_schema import DataSection, LimitsSection
from qlora_cli.recipe.load import LoadedRecipe
from qlora_cli.workflows.events import Emit, Notice, Stage
from qlora_cli.workflows.plan import order_of, steps_and_rows
from qlora_cli.workflows.rows import packing_share, setting_of
from qlora_cli.workflows.seen import Fate, SeenRow, see

MOST_FILES = 10
"""That an error names."""
MOST_CHARACTERS = 2000
"""Of a row that cannot be encoded."""
Place = tuple[str, int]
"""File and line."""


@dataclass(frozen=True)
class Wanted:
    """What is to be shown beside the receipt: so many rows spread over the training (or held-out) ones, the rows at
    these places, so many of those that were lost."""

    rows: int = 0
    held_out: bool = False
    places: Sequence[Place] = ()
    lost: int = 0


@dataclass(frozen=True)
class Preview:
    """What is to be shown. `lost` are the first of `all_lost` rows; `refusal` is why training would stop here."""

    receipt: DataReceipt
    rows: tuple[SeenRow, ...]
    lost: tuple[dict[str, Any], ...] = ()
    all_lost: int = 0
    refusal: DataError | None = None


@dataclass(frozen=True)
class Cleared:
    """What was removed from the cache of encoded rows, and how many entries stay because they are in use."""

    place: Path | None
    entries: int = 0
    bytes: int = 0
    in_use: int = 0

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"event": "result", **asdict(self), "place": str(self.place) if self.place else None}


def preview(loaded: LoadedRecipe, wanted: Wanted, emit: Emit) -> Preview:
    """Reads the recipe's data as a run would, and shows it. Limits come last, so that what they refuse can be seen.
    Raises what `load_data` raises, and `DataError` for a place that the data does not have."""
    recipe = loaded.recipe
    section = recipe.data
    if wanted.held_out and section.eval is None and section.eval_split is None:
        raise DataError("the recipe holds no rows out", fix="set data.eval to a file, or data.eval_split")
    tokenizer = load_tokenizer(find_base(recipe.model.base, recipe.model.revision, weights=False))
    emit(Stage(f"reading {section.title}"))
    data = load_data(section.model_copy(update={"limits": LimitsSection()}), setting_of(recipe, tokenizer, emit))
    order = order_of(recipe, data)
    receipt = data.receipt.with_packing(packing_share(recipe, data, order, steps_and_rows(recipe, order)[1]))
    viewer = _Viewer(section, data, tokenizer)
    rows = (*viewer.spread(wanted.rows, wanted.held_out), *viewer.at(wanted.places))
    lost = viewer.lost() if wanted.lost else iter(())
    first = tuple(islice(lost, wanted.lost))
    return Preview(receipt, rows, first, len(first) + sum(1 for _ in lost), _refusal(receipt, section))


def clear_cache(emit: Emit) -> Cleared:
    """Removes every encoded row that is kept on disk and not in use; of quantised bases, none."""
    place = cache_place()
    if place is None:
        return Cleared(None)
    cache = Cache(place, 0, lambda text: emit(Notice(text)), lambda text: emit(Notice(text)), kind="rows")
    entries, size = cache.clear()
    return Cleared(cache.place, entries, size, sum(entry.parent == cache.place for entry in cache.entries()))


def _refusal(receipt: DataReceipt, section: DataSection) -> DataError | None:
    try:
        check_limits(receipt.sources[: len(section.named)], section.limits, "`qlora data RECIPE --lost` lists them")
    except DataError as error:
        return error
    return None


@dataclass(frozen=True)
class _Table:
    """The rows of one source, and what became of them."""

    share: Share
    format: str
    notes: dict[int, str]

    def fate(self, row: int) -> Fate:
        share = self.share
        masks = (("train", share.train), ("held out", share.held), ("left out", share.left_out & share.usable))
        became = next((name for name, mask in masks if mask[row]), "dropped")
        counts = [name for name, mask in ((DUPLICATE, share.duplicate), (OVERLAP, share.overlap)) if mask[row]]
        fate = share.store.fates[int(share.store.rows["fate"][row])]
        return Fate(became, (*counts, *([fate] if fate != KEPT else [])), self.notes.get(row, ""))

    def files(self) -> Iterator[tuple[str, int, int]]:
        """Each file with its first and last line that was read."""
        rows = self.share.store.rows
        for number, file in enumerate(self.share.store.files):
            lines = rows["line"][rows["file"] == number]
            yield file, int(lines.min()), int(lines.max())

    def rows_at(self, file: str, line: int) -> NDArray[np.intp]:
        """Rows at this line of files that `file` names."""
        rows, names = self.share.store.rows, self.share.store.files
        meant = [number for number, name in enumerate(names) if _names(file, name)]
        return np.flatnonzero(np.isin(rows["file"], meant) & (rows["line"] == line))


def _names(asked: str, file: str) -> bool:
    """Whether `asked` is `file`, the end of its path, or another way to write it."""
    if asked == file:
        return True
    wanted = PurePath(asked).parts
    with suppress(OSError, ValueError, RuntimeError):
        same = Path(asked).exists() and Path(asked).resolve() == Path(file).resolve()
        return same or PurePath(file).parts[-len(wanted) :] == wanted
    return False


class _Viewer:
    """Shows rows of data that was read."""

    def __init__(self, section: DataSection, data: TokenData, tokenizer: Any) -> None:
        self._section, self._chosen, self._tokenizer = section, data.chosen, tokenizer
        self._tables = [
            _Table(part, receipt.format, part.store.notes())
            for part, receipt in zip(data.parts, data.receipt.sources, strict=True)
        ]

    def spread(self, count: int, held_out: bool) -> Iterator[SeenRow]:
        """The first sequence, and others at equal distances: `count` if there are as many."""
        kept = [sequences(t.share, t.share.held if held_out else t.share.train) for t in self._tables]
        total = sum(map(len, kept))
        count = min(count, total)
        return (self._nth(kept, i * total // count) for i in range(count))

    def at(self, places: Sequence[Place]) -> Iterator[SeenRow]:
        """Every row at the places. Raises one `DataError` for all that there are none at."""
        found = {place: [(t, int(row)) for t in self._tables for row in t.rows_at(*place)] for place in places}
        if missing := [place for place, rows in found.items() if not rows]:
            raise DataError.of([self._missing(*place) for place in missing])
        for rows in found.values():
            for table, row in rows:
                yield from self._row(table, row)

    def lost(self) -> Iterator[dict[str, Any]]:
        """Every row that the receipt counts as something else than kept, with its place and the reason."""
        return chain.from_iterable(lost_rows(table.share) for table in self._tables)

    def _nth(self, kept: Sequence[NDArray[np.int64]], position: int) -> SeenRow:
        for table, places in zip(self._tables, kept, strict=True):
            if position < len(places):
                return self._sequence(table, int(places[position]))
            position -= len(places)
        raise AssertionError("a position within the total is in one of the tables")

    def _sequence(self, table: _Table, place: int) -> SeenRow:
        store = table.share.store
        row = int(store.sequences["row"][place])
        start, stop = np.searchsorted(store.sequences["row"], (row, row + 1))
        return see(store.sequence(place), table.fate(row), self._tokenizer, (place - int(start) + 1, int(stop - start)))

    def _row(self, table: _Table, row: int) -> Iterator[SeenRow]:
        store = table.share.store
        start, stop = np.searchsorted(store.sequences["row"], (row, row + 1))
        if start < stop:
            yield from (self._sequence(table, place) for place in range(start, stop))
        else:
            yield from self._lost(table, store.where(row), table.fate(row))

    def _lost(self, table: _Table, where: str, fate: Fate) -> Iterator[SeenRow]:
        """A row of which no token was kept, read again and encoded without limits of length."""
        row = _read_again(table.share, where)
        turns = turn_encoder(self._tokenizer, "none" if table.format == "text" else self._chosen.name, table.format)
        encoder = Encoder(self._section, table.format, dict(table.share.source.columns or {}), turns)
        try:
            found = encode(encoder.conversation(row), turns, self._section.loss_on, where) if row else []
        except RowError:  # the note says what is wrong
            found = []
        for part, each in enumerate(found, 1):
            yield see(each, fate, self._tokenizer, (part, len(found)))
        if not found:
            yield SeenRow(where, fate, values=_shortened(row.values) if row else "")

    def _missing(self, file: str, line: int) -> Problem:
        known = [each for table in self._tables for each in table.files()]
        meant = [each for each in known if _names(file, each[0])]
        shown = [f"{name} ({first:,} to {last:,})" for name, first, last in (meant or known)[:MOST_FILES]]
        more = len(meant or known) - len(shown)
        what = "no row that was read begins there" if meant else "the data has no such file"
        fix = f"name one of {', '.join(shown)}{f' or of {more:,} more files' if more else ''}"
        return Problem(what, fix=fix, where=f"{file}:{line}")


def _read_again(share: Share, where: str) -> SourceRow | None:
    """The row at `where`; None where it cannot be read, or its source no longer holds it."""
    source, file = share.source, where.rpartition(":")[0]
    on_hub = file == f"{source.path}[{source.split}]"
    with suppress(DataError):
        opened = open_source(source.path, source.split, source.config, source.revision) if on_hub else open_source(file)
        found = next((row for row in opened.rows() if row.where == where), None)
        return found if isinstance(found, SourceRow) else None
    return None


def _shortened(values: dict[str, Any]) -> str:
    text = json.dumps(values, ensure_ascii=False, default=str)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}... ({len(text):,} characters)"
