"""Sources > rows > tokens > receipt, and the held-out split.

Knows one recipe section, a tokenizer and a cache. Invariant: every row read is either trained on, held out, or counted
with the reason why not; rows of equal content never fall on both sides of the split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora_cli.cache.entries import Cache
from qlora_cli.data.conversation import Conversation
from qlora_cli.data.counting import digest, lost_rows, source_receipt, split_receipt
from qlora_cli.data.formats import RowError, detect
from qlora_cli.data.kept import day_of, kept, key, tokenizer_hash
from qlora_cli.data.mixing import Share, epoch, hold_out, mark_duplicates, mark_overlap, sequences, shares
from qlora_cli.data.reading import Encoder, Pipeline, characters_of, window
from qlora_cli.data.receipt import DataReceipt, SourceReceipt, check_limits
from qlora_cli.data.rows import Position
from qlora_cli.data.sources import Source, SourceRow, is_local, open_source
from qlora_cli.data.store import Rows, Store, StoreWriter
from qlora_cli.data.templates import TEXTS, Chosen, apply_template
from qlora_cli.data.turns import TurnEncoder, turn_encoder
from qlora_cli.data.verify import verify
from qlora_cli.errors import DataError, Problem
from qlora_cli.recipe.data_schema import DataSection, SourceSection

PEEK, VERIFIED = 20, 5
"""First rows by which a format is detected, and a template is verified."""
VERIFIED_CHARACTERS = 100_000
"""Of a row: what holds of huge ones holds of others."""


@dataclass(frozen=True)
class Opened:
    """A source whose format is known; `why` says how where it was detected."""

    name: str
    source: Source
    section: SourceSection
    format: str
    why: str = ""


Watch = Callable[[Opened, int, int], None]
"""Called with a source, how many of its rows are done, and how many bytes of its files are read."""


@dataclass(frozen=True)
class Setting:
    """What encoding needs beside the section: a tokenizer, a seed, a cache if there is one, and whom to tell."""

    tokenizer: Any
    seed: int = 0
    cache: Cache | None = None
    watch: Watch = lambda opened, rows, position: None


@dataclass(frozen=True)
class TokenData:
    """Encoded rows of both splits, their receipt, the tokens that end a turn, and what template was chosen. `parts` are
    the rows that were read, a source each, in the order of the receipt."""

    train: Rows
    held_out: Rows
    receipt: DataReceipt
    stop_ids: frozenset[int]
    chosen: Chosen
    parts: tuple[Share, ...]

    @property
    def largest_id(self) -> int:
        """The largest token id of any row."""
        return max((store.largest_id for store in (*self.train.stores, *self.held_out.stores)), default=-1)

    def lost_rows(self) -> Iterator[dict[str, Any]]:
        """Each row that was dropped, cut, a duplicate or held out too, with its place."""
        return chain.from_iterable(map(lost_rows, self.parts))


@dataclass(frozen=True)
class _Read:
    """A source, encoded."""

    opened: Opened
    store: Store

    @property
    def name(self) -> str:
        """The source's."""
        return self.opened.name

    @property
    def digest(self) -> str:
        """See `counting.digest`."""
        return digest(self.store)

    def receipt(self, part: Share) -> SourceReceipt:
        """See `counting.source_receipt`."""
        return source_receipt(self.name, self.opened.source.files, self.opened.format, part)


def load_data(data: DataSection, setting: Setting) -> TokenData:
    """Reads and encodes everything the recipe names. Raises `DataError` where nothing is left to train on, or where
    more is lost than the recipe allows."""
    opened = [_open(name, section, data) for name, section in data.named.items()]
    chosen = choose_template(data, opened, setting.tokenizer)
    read = [_read(each, data, setting, chosen) for each in opened]
    held = _read_eval(data, setting, chosen)
    parts = _parts(read, setting)
    _divide(parts, held, data)
    train = Rows([part.store for part in parts], epoch(parts, data, setting.seed))
    held_rows = _whole(held) if held else _held(parts, list(data.named))
    receipts = [each.receipt(part) for each, part in zip(read, parts, strict=True)]
    _check(data, train, held_rows, receipts, parts)
    check_limits(receipts, data.limits, "`qlora data RECIPE --lost` lists them")
    if held:
        parts.append(_held_part(held))
        receipts.append(held.receipt(parts[-1]))
    receipt = DataReceipt(tuple(receipts), split_receipt(train), split_receipt(held_rows), notes=_notes(read, chosen))
    stop_ids = frozenset().union(*(_turns(each, setting, chosen).stop_ids for each in opened))
    return TokenData(train, held_rows, receipt, stop_ids, chosen, tuple(parts))


class HeldRows(NamedTuple):
    """The held-out rows, the content hash of each source they came from, and the template that was chosen."""

    rows: Rows
    digests: dict[str, str]
    chosen: Chosen


def load_held_out(data: DataSection, setting: Setting) -> HeldRows:
    """The rows that a recipe holds out. Where it holds none out, an error that says how to name some."""
    if data.eval is None and data.eval_split is None:
        raise DataError(
            "the recipe holds no rows out",
            why="evaluation on training rows would measure memory",
            fix="set data.eval to a file, or data.eval_split before training",
        )
    if data.eval is not None:
        opened = _open_eval(data.eval, data)
        chosen = choose_template(data, [opened], setting.tokenizer)
        held = _read(opened, data, setting, chosen)
        rows, digests = _whole(held), {held.name: held.digest}
    else:
        every = [_open(name, section, data) for name, section in data.named.items()]
        chosen = choose_template(data, every, setting.tokenizer)
        read = [_read(each, data, setting, chosen) for each in every]
        parts = _parts(read, setting)
        hold_out(parts, data.eval_split or 0, data.title)
        rows, digests = _held(parts, list(data.named)), {each.name: each.digest for each in read}
    _check_held(rows)
    return HeldRows(rows, digests, chosen)


def choose_template(data: DataSection, opened: Sequence[Opened], tokenizer: Any) -> Chosen:
    """Sets the template on the tokenizer. Of several formats the first that is a conversation decides."""
    formats = [each.format for each in opened]
    spoken = next((name for name in formats if name not in TEXTS), formats[0])
    return apply_template(tokenizer, data.template, spoken, data.new_tokens)


def _open(name: str, section: SourceSection, data: DataSection) -> Opened:
    source = open_source(section.path, section.split, section.config, section.revision)
    columns = data.columns if section.columns is None else section.columns
    section = section.model_copy(update={"columns": columns})
    if (row_format := section.format or data.format) != "auto":
        return Opened(name, source, section, row_format)
    first = [each for each in islice(source.rows(), PEEK) if isinstance(each, SourceRow)]
    if not first:
        raise DataError(f"{name}: none of its first rows can be read", fix="name its data.format to see what is wrong")
    try:
        found = detect([row.values for row in first])
    except RowError as error:
        raise DataError(f"{name}: {error}", fix=error.fix) from error
    return Opened(name, source, section, found.name, found.why)


def _open_eval(path: str, data: DataSection) -> Opened:
    name, _, split = path.partition(":") if not is_local(path) else (path, "", "")
    return replace(_open(path, SourceSection(path=name, split=split or "train"), data), name=path)


def _read_eval(data: DataSection, setting: Setting, chosen: Chosen) -> _Read | None:
    return _read(_open_eval(data.eval, data), data, setting, chosen) if data.eval is not None else None


def _turns(opened: Opened, setting: Setting, chosen: Chosen) -> TurnEncoder:
    """A text has no turns; everything else is rendered by the one template."""
    return turn_encoder(setting.tokenizer, "none" if opened.format == "text" else chosen.name, opened.format)


def _read(opened: Opened, data: DataSection, setting: Setting, chosen: Chosen) -> _Read:
    source, section = opened.source, opened.section
    turns, vocabulary = _turns(opened, setting, chosen), setting.tokenizer.get_vocab
    encoder = Encoder(data, opened.format, dict(section.columns or {}), turns, vocabulary)
    content = source.fingerprint() if setting.cache else ""

    def write(folder: Path) -> None:
        position = Position()
        rows = source.rows(position)
        rows = rows if section.shuffle else window(rows, section.skip, section.take)
        first = list(islice(rows, VERIFIED))
        check = partial(verify, encoder.turns, list(_said(encoder, first)))
        with StoreWriter(folder) as writer:
            pipeline = Pipeline(encoder, writer, lambda done: setting.watch(opened, done, position.bytes))
            writer.finish(pipeline.run(chain(first, rows), check))
        if setting.cache and source.fingerprint() != content:
            raise DataError(f"{opened.name} changed while it was read", fix="run again when it is whole")

    if setting.cache is None:
        return _Read(opened, kept(None, "", write))
    settings = {"format": opened.format, "template": chosen.name, "tokenizer": tokenizer_hash(setting.tokenizer)}
    settings["day"] = day_of(setting.tokenizer)
    return _Read(opened, kept(setting.cache, key(content, source.files, section, data, settings), write))


def _parts(read: Sequence[_Read], setting: Setting) -> list[Share]:
    return shares([each.store for each in read], [each.opened.section for each in read], setting.seed)


def _said(encoder: Encoder, rows: Sequence[SourceRow | Problem]) -> Iterator[Conversation]:
    """What the rows say; those that say nothing are reported with their place when they are read."""
    found = (_conversation(encoder, row) for row in rows if isinstance(row, SourceRow))
    return (each for each in found if each is not None and characters_of(each) < VERIFIED_CHARACTERS)


def _conversation(encoder: Encoder, row: SourceRow) -> Conversation | None:
    try:
        return encoder.conversation(row)
    except RowError:
        return None


def _divide(parts: list[Share], held: _Read | None, data: DataSection) -> None:
    if held is not None:
        mark_overlap(parts, held.store)
    elif data.eval_split is not None:
        hold_out(parts, data.eval_split, data.title)
    mark_duplicates(parts, data.duplicates == "drop")


def _notes(read: Sequence[_Read], chosen: Chosen) -> tuple[str, ...]:
    known = [(each.name, each.opened) for each in read if each.opened.why]
    found = [f"{name}: format {opened.format}, because {opened.why}" for name, opened in known]
    found += [f"{each.name}: {note}" for each in read for note in each.store.facts["notes"]]
    added = [f"new special tokens, with embeddings of their own to train: {', '.join(chosen.added)}"]
    return (*found, *(added if chosen.added else []))


def _whole(read: _Read) -> Rows:
    return Rows([read.store], [np.arange(len(read.store.sequences))], [read.name])


def _held(parts: Sequence[Share], names: Sequence[str]) -> Rows:
    return Rows([part.store for part in parts], [sequences(part, part.held) for part in parts], names)


def _held_part(read: _Read) -> Share:
    """The whole of a source, held out."""
    part = shares([read.store], [read.opened.section], 0)[0]
    part.held, part.train = part.usable, np.zeros_like(part.usable)
    return part


def _check(
    data: DataSection, train: Rows, held: Rows, receipts: Sequence[SourceReceipt], parts: Sequence[Share]
) -> None:
    if not len(train):
        reasons = Counter({"held out": sum(each.held_out for each in receipts)})
        for each in receipts:
            reasons.update(each.dropped)
        first = next((row for part in parts for row in lost_rows(part)), None)
        example = f"; the first is {first['where']} {first.get('what', '')}".rstrip() if first else ""
        raise DataError(
            f"{data.title}: 0 supervised tokens are left of {sum(each.read for each in receipts):,} rows",
            why=", ".join(f"{count:,} {why}" for why, count in reasons.items() if count) + example,
            fix=f"look at data.max_length ({data.max_length:,}), data.eval_split, data.loss_on and the rows themselves",
        )
    if data.eval or data.eval_split:
        _check_held(held)


def _check_held(held: Rows) -> None:
    if not len(held):
        raise DataError(
            "no held-out row is left",
            why="all were dropped as too long or without a target",
            fix="raise data.max_length",
        )
