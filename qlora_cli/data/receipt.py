"""What became of every row: read, kept, cut, dropped, and how many tokens carry loss.

Knows counts only. Invariant: `read == kept + held out + dropped` for every source, so that no row is lost uncounted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qlora_cli.data.encode import Encoded

QUANTILES = (0.0, 0.5, 0.9, 1.0)
LABELS = {"0%": "shortest", "50%": "median", "90%": "90%", "100%": "longest"}


@dataclass(frozen=True)
class SplitReceipt:
    """Counts for the rows of one split (training or held-out)."""

    rows: int
    sequences: int
    tokens: int
    supervised_tokens: int
    length_quantiles: dict[str, int]

    @classmethod
    def of(cls, rows: int, encoded: Sequence[Encoded]) -> SplitReceipt:
        """`rows` source rows became these sequences (more where a template rewrites history)."""
        lengths = [len(row) for row in encoded]
        quantiles = np.quantile(lengths, QUANTILES, method="lower") if lengths else [0] * len(QUANTILES)
        named = {f"{q:.0%}": int(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
        return cls(rows, len(encoded), sum(lengths), sum(row.targets for row in encoded), named)


@dataclass
class Tally:
    """Counts of one source's rows while it is being read; `truncated` rows are kept, but something of them was cut."""

    source: str
    read: int = 0
    truncated: int = 0
    trailing_turns: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class SourceReceipt:
    """What became of one source's rows."""

    source: str
    sha256: str
    read: int
    kept: int
    held_out: int
    also_trained_on: int
    truncated: int
    trailing_turns: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class DataReceipt:
    """The receipt of a run's data."""

    sources: tuple[SourceReceipt, ...]
    train: SplitReceipt
    held_out: SplitReceipt

    def as_json(self) -> dict[str, Any]:
        """Plain values for data_receipt.json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """One line per fact for the console."""
        return [*(_source_line(source) for source in self.sources), *self._split_lines()]

    def _split_lines(self) -> list[str]:
        named = (("train", self.train), ("held out", self.held_out))
        return [_split_line(name, split) for name, split in named if split.rows]


def _source_line(source: SourceReceipt) -> str:
    parts = [f"{source.read:,} rows read", f"{source.kept:,} kept"]
    parts += [f"{source.held_out:,} held out"] if source.held_out else []
    parts += [f"{source.also_trained_on:,} of them ALSO TRAINED ON"] if source.also_trained_on else []
    parts += [f"{count:,} dropped ({why})" for why, count in source.dropped.items()] or ["0 dropped"]
    parts += [f"{source.truncated:,} cut"]
    parts += [f"{source.trailing_turns:,} with unanswered last turns left off"] if source.trailing_turns else []
    return f"{source.source}: {', '.join(parts)}"


def _split_line(name: str, split: SplitReceipt) -> str:
    share = split.supervised_tokens / split.tokens if split.tokens else 0.0
    lengths = ", ".join(f"{LABELS[q]} {v:,}" for q, v in split.length_quantiles.items())
    extra = f" as {split.sequences:,} sequences" if split.sequences != split.rows else ""
    tokens = f"{split.tokens:,} tokens, {split.supervised_tokens:,} carry loss ({share:.0%})"
    return f"{name}: {split.rows:,} rows{extra}, {tokens}; lengths {lengths}"
