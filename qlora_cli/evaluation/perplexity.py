"""Loss, perplexity and bits per byte on held-out rows.

Knows a model and rows. Invariant: means are over target tokens, never over rows or batches, and evaluating leaves the
model in the mode and with the weights that it had.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_cli.data.batches import Batching
from qlora_cli.data.encode import Encoded
from qlora_cli.data.store import Rows
from qlora_cli.errors import NonFiniteError
from qlora_cli.model.loss import TargetLosses
from qlora_cli.model.ranks import Ranks

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Decode = Callable[[Sequence[int]], str]
"""Token ids as text, without special tokens."""
AT_ONCE = 1024
"""Rows that are packed together."""
LARGEST_EXPONENT = 700
"""Beyond it, exp() overflows."""
BROKEN = "\ufffd"
"""What a byte of a character is decoded as, where the rest of it is missing."""
NAMED = 3
"""Rows that an error names, of those it is about."""


def perplexity_of(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < LARGEST_EXPONENT else math.inf


@dataclass(frozen=True)
class Figures:
    """Mean cross-entropy per target token in nats, and over how much it was taken; `bytes` are those of the targets'
    text in UTF-8, 0 where they were not counted."""

    loss: float
    rows: int
    tokens: int
    targets: int
    bytes: int = 0

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return perplexity_of(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of the targets' text: what can be compared between tokenizers. What a
        turn's end costs counts, its marker's bytes do not (Gao et al. 2020, arXiv:2101.00027, section 3.1)."""
        return self.loss * self.targets / math.log(2) / self.bytes if self.bytes else None

    def line(self) -> str:
        """A few words."""
        bits = f", {self.bits_per_byte:.3f} bits per byte" if self.bits_per_byte is not None else ""
        many = f"{self.targets:,} tokens of {self.rows:,} rows"
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.3f}{bits} over {many}"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        more = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        found = {**asdict(self), **more}
        return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in found.items()}


@dataclass(frozen=True)
class SourceFigures(Figures):
    """The figures of one source's rows."""

    name: str = ""


@dataclass(frozen=True)
class EvalResult(Figures):
    """The figures of all rows, and those of each source."""

    sources: tuple[SourceFigures, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values, which `read` takes."""
        return {**super().as_json(), "sources": [each.as_json() for each in self.sources]}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> EvalResult:
        """What `as_json` wrote. Raises `KeyError` or `TypeError` for anything else."""
        sources = tuple(SourceFigures(**_stored(each), name=each["name"]) for each in values.get("sources", ()))
        return cls(**_stored(values), sources=sources)


def _stored(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: values[name] for name in ("loss", "rows", "tokens", "targets")}
    return {**found, "bytes": values.get("bytes", 0), "loss": math.nan if found["loss"] is None else found["loss"]}


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows to evaluate on: encoded sequences, of each the number of its source, and the sources' names."""

    rows: Sequence[Encoded]
    source: Counts
    names: tuple[str, ...]
    decode: Decode

    @classmethod
    def of(cls, rows: Rows, decode: Decode) -> HeldOut:
        """The sequences of stores, in their order."""
        return cls(rows, rows.sources, rows.names, decode)

    @cached_property
    def listed(self) -> list[Encoded]:
        """The sequences, each made once. Where several sources read the same rows, `where` names the source too."""
        rows, readers = list(self.rows), defaultdict[str, set[int]](set)
        for row, source in zip(rows, self.source.tolist(), strict=True):
            readers[row.where].add(source)
        pairs = zip(rows, self.source.tolist(), strict=True)
        return [
            replace(row, where=f"{row.where} ({self.names[source]})") if len(readers[row.where]) > 1 else row
            for row, source in pairs
        ]

    @cached_property
    def owners(self) -> Counts:
        """Of each sequence, the number of the row that it was made of."""
        numbers = {where: number for number, where in enumerate(dict.fromkeys(row.where for row in self.listed))}
        return np.array([numbers[row.where] for row in self.listed], np.int64)

    @cached_property
    def tokens(self) -> Counts:
        """Of each sequence."""
        return np.array([len(row) for row in self.listed], np.int64)

    @cached_property
    def targets(self) -> Counts:
        """Of each sequence, the tokens that carry loss."""
        return np.array([row.targets for row in self.listed], np.int64)

    @cached_property
    def bytes(self) -> Counts:
        """Of each sequence, UTF-8 bytes of its targets' text."""
        return np.array([_size(self.decode(row.ids[1:][row.loss[1:]].tolist())) for row in self.listed], np.int64)

    @property
    def count(self) -> int:
        """Rows, of which some may have become several sequences."""
        return int(self.owners.max()) + 1

    def result(self, sums: Floats) -> EvalResult:
        """The figures, from each sequence's summed loss."""
        whole = self._figures(sums, np.ones(len(sums), np.bool_))
        found = [(name, self.source == number) for number, name in enumerate(self.names)]
        sources = [SourceFigures(**asdict(self._figures(sums, mine)), name=name) for name, mine in found if mine.any()]
        return EvalResult(**asdict(whole), sources=tuple(sources))

    def _figures(self, sums: Floats, chosen: NDArray[np.bool_]) -> Figures:
        targets = int(self.targets[chosen].sum())
        loss, rows = math.fsum(sums[chosen]) / targets, len(np.unique(self.owners[chosen]))
        return Figures(loss, rows, int(self.tokens[chosen].sum()), targets, int(self.bytes[chosen].sum()))


def _size(text: str) -> int:
    """Bytes in UTF-8. Of a character that an end of the text cuts through, those that are there."""
    whole = text.strip(BROKEN)
    return len(whole.encode()) + len(text) - len(whole)


def evaluate(model: Any, losses: TargetLosses, held: HeldOut, batching: Batching, ranks: Ranks) -> EvalResult:
    """Token-weighted loss of `model` on rows, shared among the processes. See `check_finite`."""
    sums = sequence_losses(model, losses, held.listed, batching, ranks)
    check_finite(held, sums)
    return held.result(sums)


def check_finite(held: HeldOut, sums: Floats) -> None:
    """Raises `NonFiniteError`, with the rows, where the loss of some is no number."""
    bad = list(dict.fromkeys(held.listed[place].where for place in np.flatnonzero(~np.isfinite(sums))))
    if bad:
        named = ", ".join(bad[:NAMED]) + (" ..." if len(bad) > NAMED else "")
        raise NonFiniteError(
            f"the loss of {len(bad):,} of {held.count:,} held-out rows is not a finite number: {named}",
            why="the weights hold such numbers, or an activation overflows",
            fix="check the weights; if they are good, set quantization.compute_dtype to bfloat16 or float32",
        )


@torch.no_grad()
def sequence_losses(
    model: Any, losses: TargetLosses, rows: Sequence[Encoded], batching: Batching, ranks: Ranks
) -> Floats:
    """The summed cross-entropy of each of `rows`, in nats."""
    was_training = model.training
    model.eval()
    rows = list(rows)  # those of a store are made anew each time they are read
    places = {id(row): place for place, row in enumerate(rows)}
    sums = np.zeros(len(rows))
    for _, batch in ranks.mine(divided(rows, batching)):
        moved = batching.collate(batch).to(ranks.device)
        with ranks.autocast():
            found = losses(moved.inputs, moved.targets, moved.labels)
        of_row = np.repeat(np.arange(len(batch)), [row.targets for row in batch])
        sums[[places[id(row)] for row in batch]] = np.bincount(of_row, found.double().cpu().numpy(), len(batch))
    model.train(was_training)
    return ranks.sum(torch.from_numpy(sums)).cpu().numpy()


def divided(rows: Sequence[Encoded], batching: Batching) -> list[Sequence[Encoded]]:
    """The micro-batches of an evaluation. Rows are packed a window at a time: it takes time by their square."""
    windows = (rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE))
    return [batch for window in windows for batch in batching.split(window)]
