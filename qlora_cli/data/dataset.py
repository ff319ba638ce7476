"""Rows > conversations > tokens > receipt, and the held-out split.

Knows one recipe section and a tokenizer. Invariant: every row read is either trained on, held out, or counted as
dropped with its reason; rows of equal content never fall on both sides of the split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.encode import Encoded, encode, shorten
from qlora_cli.data.formats import FORMATS, RowError, fitting, renamed
from qlora_cli.data.receipt import DataReceipt, SourceReceipt, SplitReceipt, Tally
from qlora_cli.data.sources import SourceRow, raise_all, read_rows
from qlora_cli.data.turns import TurnEncoder, turn_encoder
from qlora_cli.errors import DataError, Problem
from qlora_cli.recipe.schema import DataSection


@dataclass(frozen=True)
class TokenData:
    """Encoded rows of both splits, their receipt, and the tokens that end a turn."""

    train: tuple[Encoded, ...]
    held_out: tuple[Encoded, ...]
    receipt: DataReceipt
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class _Encoder:
    """What it takes to encode the rows of a source."""

    data: DataSection
    turns: TurnEncoder

    def row(self, row: SourceRow, tally: Tally) -> list[Encoded]:
        """The row's sequences that fit. The row counts once: as kept, as kept but cut, or as dropped (nothing of it is
        left). Raises `RowError`."""
        conversation = FORMATS[self.data.format].build(renamed(row.values, self.data.columns))
        if conversation.messages[-1].role != "assistant":
            tally.trailing_turns += 1
        sequences = encode(conversation, self.turns, self.data.loss_on, row.where)
        fitted = [self._fit(sequence) for sequence in sequences]
        kept = [sequence for sequence in fitted if sequence.targets]
        cut = sum(map(len, fitted)) < sum(map(len, sequences))
        if not kept:
            tally.dropped[self._too_long if cut else "no token carries loss"] += 1
        elif cut:
            tally.truncated += 1
        return kept

    def _fit(self, sequence: Encoded) -> Encoded:
        """What the recipe's limit leaves of a sequence, perhaps nothing."""
        limit = self.data.max_length
        if len(sequence) <= limit:
            return sequence
        if self.data.too_long == "error":
            raise RowError(f"{len(sequence):,} tokens, more than data.max_length ({limit:,})")
        kept = 0 if self.data.too_long == "drop" else limit
        return shorten(sequence, kept, self.turns.stop_ids)

    @property
    def _too_long(self) -> str:
        limit = f"{self.data.max_length:,} tokens"
        return f"longer than {limit}" if self.data.too_long == "drop" else f"no answer within {limit}"


def load_data(data: DataSection, tokenizer: Any) -> TokenData:
    """Reads and encodes everything the recipe names. Raises `DataError` where nothing is left to train on."""
    encoder = _Encoder(data, turn_encoder(tokenizer, data.template, data.format))
    rows = read_rows(data.train, data.split)
    encoded, tally = _encode_all(encoder, data.train, rows)
    chosen = _held_out(rows, data.eval_split)
    train = [sequence for sequence in encoded if sequence.where not in chosen]
    held = [sequence for sequence in encoded if sequence.where in chosen]
    sources = [_source_receipt(rows, tally, train, held)]
    if data.eval is not None:
        held, receipt = _eval_source(encoder, data.eval)
        sources.append(receipt)
    _check(data, train, held, len(rows))
    receipt_ = DataReceipt(tuple(sources), _split(train), _split(held))
    return TokenData(tuple(train), tuple(held), receipt_, encoder.turns.stop_ids)


def load_held_out(data: DataSection, tokenizer: Any) -> tuple[tuple[Encoded, ...], dict[str, str]]:
    """(the held-out rows, content hash of the source they came from). Where the recipe holds none out, an error that
    says how to name some."""
    if data.eval is None and data.eval_split is None:
        raise DataError(
            "the recipe holds no rows out",
            why="evaluation on training rows would measure memory",
            fix="set data.eval to a file, or data.eval_split before training",
        )
    encoder = _Encoder(data, turn_encoder(tokenizer, data.template, data.format))
    if data.eval is not None:
        held, receipt = _eval_source(encoder, data.eval)
        source, digest = data.eval, receipt.sha256
    else:
        rows = read_rows(data.train, data.split)
        chosen = _held_out(rows, data.eval_split)
        held, _ = _encode_all(encoder, data.train, [row for row in rows if row.where in chosen])
        source, digest = data.train, _digest(rows)
    _check_held(held)
    return tuple(held), {source: digest}


def _eval_source(encoder: _Encoder, source: str) -> tuple[list[Encoded], SourceReceipt]:
    name, _, split = source.partition(":") if not source.endswith(".jsonl") else (source, "", "")
    rows = read_rows(name, split or "train")
    held, tally = _encode_all(encoder, source, rows)
    return held, _source_receipt(rows, tally, [], held)


def _encode_all(encoder: _Encoder, source: str, rows: Sequence[SourceRow]) -> tuple[list[Encoded], Tally]:
    tally, encoded, problems = Tally(source), list[Encoded](), list[Problem]()
    for row in rows:
        tally.read += 1
        try:
            encoded += encoder.row(row, tally)
        except RowError as error:
            problems.append(Problem(str(error), fix=_other_format(row, encoder.data), where=row.where))
    raise_all(problems)
    return encoded, tally


def _other_format(row: SourceRow, data: DataSection) -> str:
    names = [name for name in fitting(renamed(row.values, data.columns)) if name != data.format]
    if names:
        return f"the row looks like data.format: {' or '.join(names)}"
    return "mend the row, or map its columns with data.columns"


def _key(row: SourceRow) -> str:
    return hashlib.sha256(json.dumps(row.values, sort_keys=True, default=str).encode()).hexdigest()


def _digest(rows: Sequence[SourceRow]) -> str:
    """A hash of the rows' content, whatever their order."""
    return hashlib.sha256("".join(sorted(_key(row) for row in rows)).encode()).hexdigest()


def _held_out(rows: Sequence[SourceRow], wanted: int | float | None) -> frozenset[str]:
    """Places of the rows held out: those with the smallest content hashes, so that the choice does not depend on the
    order of the rows and equal rows stay together. A share below 1 takes hashes below that share of their range."""
    if wanted is None:
        return frozenset()
    keys = {row.where: _key(row) for row in rows}
    ordered = sorted(set(keys.values()))
    if isinstance(wanted, int):
        limit = ordered[min(wanted, len(ordered)) - 1]
    else:
        below = [key for key in ordered if int(key[:13], 16) < wanted * 16**13]
        limit = below[-1] if below else ordered[0]
    return frozenset(where for where, key in keys.items() if key <= limit)


def _source_receipt(
    rows: Sequence[SourceRow], tally: Tally, kept: Sequence[Encoded], held_out: Sequence[Encoded]
) -> SourceReceipt:
    return SourceReceipt(
        source=tally.source,
        sha256=_digest(rows),
        read=tally.read,
        kept=_rows(kept),
        held_out=_rows(held_out),
        truncated=tally.truncated,
        trailing_turns=tally.trailing_turns,
        dropped=dict(tally.dropped),
    )


def _rows(encoded: Sequence[Encoded]) -> int:
    return len({row.where for row in encoded})


def _split(encoded: Sequence[Encoded]) -> SplitReceipt:
    return SplitReceipt.of(_rows(encoded), encoded)


def _check(data: DataSection, train: Sequence[Encoded], held: Sequence[Encoded], read: int) -> None:
    if not train:
        raise DataError(
            f"{data.train}: 0 supervised tokens are left of {read:,} rows",
            why="every row was dropped, held out, or has no token that carries loss",
            fix=f"look at data.max_length ({data.max_length:,}), data.eval_split, data.loss_on and the rows themselves",
        )
    if data.eval or data.eval_split:
        _check_held(held)


def _check_held(held: Sequence[Encoded]) -> None:
    if not held:
        raise DataError(
            "no held-out row is left",
            why="all were dropped as too long or without a target",
            fix="raise data.max_length",
        )
