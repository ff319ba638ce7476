"""What became of every row: read, kept, cut, dropped, and how many tokens carry loss.

Knows counts only. Invariant: `read == kept + held out + left out + dropped` for every source, so that no row is lost
uncounted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.errors import DataError
from qlora_cli.recipe.data_schema import LimitsSection

QUANTILES = (0.0, 0.5, 0.9, 1.0)
LABELS = {"0%": "shortest", "50%": "median", "90%": "90%", "100%": "longest"}


@dataclass(frozen=True)
class SplitReceipt:
    """Counts for the rows of one split (training or held-out), or of a source's part in training."""

    rows: int
    sequences: int
    tokens: int
    supervised_tokens: int
    length_quantiles: dict[str, int]

    @classmethod
    def of(cls, rows: int, lengths: NDArray[np.int64], targets: NDArray[np.int64]) -> SplitReceipt:
        """`rows` source rows became sequences of these lengths (more where a template rewrites history)."""
        quantiles = np.quantile(lengths, QUANTILES, method="lower") if len(lengths) else [0] * len(QUANTILES)
        named = {f"{q:.0%}": int(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
        return cls(rows, len(lengths), int(lengths.sum()), int(targets.sum()), named)


@dataclass(frozen=True)
class SourceReceipt:
    """What became of one source's rows. `cut` rows are kept, but something of them was cut; `duplicate` ones say what
    an earlier training row says, and `overlap` ones are held out too and dropped from training; `bad` ones, which could
    not be read, are among the dropped; `left_out` are those that `skip` and `take` leave out of a shuffled source."""

    source: str
    files: tuple[str, ...]
    format: str
    sha256: str
    read: int
    kept: int
    held_out: int
    left_out: int
    cut: int
    duplicate: int
    overlap: int
    bad: int
    trailing_turns: int
    dropped: dict[str, int]
    trained: SplitReceipt


@dataclass(frozen=True)
class DataReceipt:
    """The receipt of a run's data. `packing` is the share of positions that hold tokens, where rows are packed."""

    sources: tuple[SourceReceipt, ...]
    train: SplitReceipt
    held_out: SplitReceipt
    packing: float | None = None
    notes: tuple[str, ...] = field(default=())

    def with_packing(self, share: float | None) -> DataReceipt:
        """The same, with what packing came to."""
        return replace(self, packing=share)

    def as_json(self) -> dict[str, Any]:
        """Plain values for data_receipt.json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """One line per fact for the console."""
        packed = [] if self.packing is None else [f"packed: {self.packing:.1%} of positions hold tokens"]
        return [*map(_source_line, self.sources), *self.notes, *self._split_lines(), *packed]

    def _split_lines(self) -> list[str]:
        named = (("train", self.train), ("held out", self.held_out))
        return [_split_line(name, split) for name, split in named if split.rows]


def _source_line(source: SourceReceipt) -> str:
    parts = [f"{source.read:,} rows read", f"{source.kept:,} kept"]
    parts += [f"{source.held_out:,} held out"] if source.held_out else []
    parts += [f"{source.left_out:,} left out (skip, take)"] if source.left_out else []
    parts += [f"{count:,} dropped ({why})" for why, count in source.dropped.items()] or ["0 dropped"]
    parts += [f"{source.cut:,} cut"]
    parts += [f"{source.duplicate:,} duplicates"] if source.duplicate else []
    parts += [f"{source.trailing_turns:,} with unanswered last turns left off"] if source.trailing_turns else []
    return f"{source.source}: {', '.join(parts)}"


def _split_line(name: str, split: SplitReceipt) -> str:
    share = split.supervised_tokens / split.tokens if split.tokens else 0.0
    lengths = ", ".join(f"{LABELS[q]} {v:,}" for q, v in split.length_quantiles.items())
    extra = f" as {split.sequences:,} sequences" if split.sequences != split.rows else ""
    tokens = f"{split.tokens:,} tokens, {split.supervised_tokens:,} carry loss ({share:.0%})"
    return f"{name}: {split.rows:,} rows{extra}, {tokens}; lengths {lengths}"


def check_limits(sources: Sequence[SourceReceipt], limits: LimitsSection, where: str) -> None:
    """Raises `DataError` for everything of which more was lost than the recipe allows; `where` says which rows."""
    read = sum(source.read for source in sources)
    counts = {
        "dropped": sum(sum(source.dropped.values()) for source in sources),
        "cut": sum(source.cut for source in sources),
        "duplicate": sum(source.duplicate for source in sources),
        "overlap": sum(source.overlap for source in sources),
        "bad": sum(source.bad for source in sources),
    }
    assert counts.keys() == LimitsSection.model_fields.keys()
    found = [
        f"{name}: {counts[name]:,} of {read:,} rows ({counts[name] / max(1, read):.2%}), at most {limit} are allowed"
        for name, limit in limits
        if limit is not None and counts[name] > _allowed(limit, read)
    ]
    if found:
        raise DataError(
            "; ".join(found),
            why="data.limits says how much may be lost before a run stops",
            fix=f"mend the rows ({where}), or raise data.limits",
        )


def _allowed(limit: int | str, read: int) -> float:
    return limit if isinstance(limit, int) else float(limit.removesuffix("%")) / 100 * read
