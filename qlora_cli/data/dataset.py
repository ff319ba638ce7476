"""Rows > conversations > tokens > receipt, and the held-out split.

Knows one recipe section and a tokenizer. Invariant: every row read is either trained on, held out, or counted as
dropped with its reason; rows of equal content never fall on both sides of the split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.conversation import Conversation
from qlora_cli.data.encode import Encoded, encode, shorten
from qlora_cli.data.formats import FORMATS, RowError, fitting, renamed
from qlora_cli.data.receipt import DataReceipt, SourceReceipt, SplitReceipt, Tally
from qlora_cli.data.sources import SourceRow, is_local, raise_all, read_rows
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

    def conversation(self, row: SourceRow) -> Conversation:
        """What the row says. Raises `RowError`."""
        return FORMATS[self.data.format].build(renamed(row.values, self.data.columns))

    def sequences(self, conversation: Conversation, where: str, tally: Tally) -> list[Encoded]:
        """The row's sequences that fit. The row counts once: as kept, as kept but cut, or as dropped (nothing of it is
        left). Raises `RowError`."""
        if conversation.messages[-1].role != "assistant":
            tally.trailing_turns += 1
        if any(not conversation.messages[turn].content.strip() for turn in conversation.assistant_turns()):
            tally.dropped["an answer is empty"] += 1
            return []
        sequences = encode(conversation, self.turns, self.data.loss_on, where)
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


@dataclass(frozen=True)
class _Source:
    """A source's rows, encoded: sequences, counts, and a hash of what each row says by the row's place."""

    encoded: list[Encoded]
    tally: Tally
    keys: dict[str, str]

    def split(self, wanted: int | float | None) -> tuple[list[Encoded], list[Encoded]]:
        """(sequences to train on, sequences held out)."""
        chosen = _held_out(self.keys, wanted, self.tally.source)
        train = [sequence for sequence in self.encoded if sequence.where not in chosen]
        return train, [sequence for sequence in self.encoded if sequence.where in chosen]

    @property
    def digest(self) -> str:
        """A hash of the rows' content, whatever their order."""
        return hashlib.sha256("".join(sorted(self.keys.values())).encode()).hexdigest()

    def receipt(self, kept: Sequence[Encoded], held_out: Sequence[Encoded], overlap: int = 0) -> SourceReceipt:
        """What became of the rows."""
        return SourceReceipt(
            source=self.tally.source,
            sha256=self.digest,
            read=self.tally.read,
            kept=_rows(kept),
            held_out=_rows(held_out),
            also_trained_on=overlap,
            truncated=self.tally.truncated,
            trailing_turns=self.tally.trailing_turns,
            dropped=dict(self.tally.dropped),
        )


def load_data(data: DataSection, tokenizer: Any) -> TokenData:
    """Reads and encodes everything the recipe names. Raises `DataError` where nothing is left to train on."""
    encoder = _Encoder(data, turn_encoder(tokenizer, data.template, data.format))
    source = _encode_all(encoder, data.train, read_rows(data.train, data.split))
    train, held = source.split(data.eval_split)
    receipts = [source.receipt(train, held)]
    if data.eval is not None:
        other = _eval_source(encoder, data.eval)
        held = other.encoded
        trained = set(source.keys.values())
        receipts.append(other.receipt([], held, sum(key in trained for key in other.keys.values())))
    _check(data, train, held, source.tally.read)
    receipt = DataReceipt(tuple(receipts), _split(train), _split(held))
    return TokenData(tuple(train), tuple(held), receipt, encoder.turns.stop_ids)


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
        source = _eval_source(encoder, data.eval)
        held = source.encoded
    else:
        source = _encode_all(encoder, data.train, read_rows(data.train, data.split))
        held = source.split(data.eval_split)[1]
    _check_held(held)
    return tuple(held), {source.tally.source: source.digest}


def _eval_source(encoder: _Encoder, source: str) -> _Source:
    name, _, split = source.partition(":") if not is_local(source) else (source, "", "")
    return _encode_all(encoder, source, read_rows(name, split or "train"))


def _encode_all(encoder: _Encoder, source: str, rows: Sequence[SourceRow]) -> _Source:
    read, problems = _Source([], Tally(source), {}), list[Problem]()
    for row in rows:
        read.tally.read += 1
        try:
            conversation = encoder.conversation(row)
            read.keys[row.where] = _key(conversation)
            read.encoded.extend(encoder.sequences(conversation, row.where, read.tally))
        except RowError as error:
            problems.append(Problem(str(error), fix=_other_format(row, encoder.data) or error.fix, where=row.where))
    raise_all(problems)
    return read


def _other_format(row: SourceRow, data: DataSection) -> str:
    """What to set where the row has the fields of other formats than the recipe's; empty where it has not."""
    names = fitting(row.values)
    return f"the row looks like data.format: {' or '.join(names)}" if names and data.format not in names else ""


def _key(conversation: Conversation) -> str:
    said = [(message.role, message.content) for message in conversation.messages]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _held_out(keys: Mapping[str, str], wanted: int | float | None, source: str) -> frozenset[str]:
    """Places of the rows held out: those with the smallest content hashes, so that the choice does not depend on the
    order of the rows and equal rows stay together. A count is of distinct rows; a share takes the hashes below that
    share of their range (at least one)."""
    if wanted is None:
        return frozenset()
    ordered = sorted(set(keys.values()))
    if isinstance(wanted, int):
        if wanted >= len(ordered):
            raise DataError(
                f"data.eval_split is {wanted}, but {source} has only {len(ordered)} distinct rows",
                why="no row would be left to train on",
                fix="lower data.eval_split, or name held-out rows in data.eval",
            )
        limit = ordered[wanted - 1]
    else:
        below = [key for key in ordered if int(key[:13], 16) < wanted * 16**13]
        limit = below[-1] if below else ordered[0]
    return frozenset(where for where, key in keys.items() if key <= limit)


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
