"""Which rows make up which optimizer step, and how they become tensors.

Knows lengths and a seed. Invariant: the rows of a step are a pure function of (seed, epoch, step) and the data; they
do not depend on the number of devices, on what ran before, or on any library's random generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_cli.data.encode import Encoded

WIDTH_MULTIPLE = 32
"""Micro-batches are padded to a multiple of this, so that few shapes occur: on a CPU each costs a compiled kernel that
stays in memory, on CUDA a block in the allocator's cache."""
LONG_LINE, LONG_MULTIPLE = 512, 64
"""Packed lines of more tokens than the first are padded to a multiple of the second, to the same end."""
MEGABATCH = 50
"""Batches that are sorted by length together: shuffled order over the epoch, similar lengths within a batch."""


def shuffled(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """A permutation of `range(count)`: rows sorted by the splitmix64 hash of (seed, epoch, row).

    splitmix64 is Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    index = np.arange(count, dtype=np.uint64)
    start = np.uint64((seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**64)
    with np.errstate(over="ignore"):
        mixed = start + index * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable").astype(np.int64)


@dataclass(frozen=True, eq=False)
class Order:
    """The order of `lengths` over the whole run: rows follow each other epoch after epoch, `batch_size` a step."""

    lengths: tuple[int, ...]
    batch_size: int
    seed: int
    group_by_length: bool = False

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps that `epochs` passes take; the last one may be smaller."""
        return math.ceil(round(epochs * len(self.lengths)) / self.batch_size) or 1

    def step_rows(self, step: int, total_rows: int) -> list[int]:
        """Row indices of 0-based `step`; rows at and after `total_rows` in the run are not drawn."""
        first, last = step * self.batch_size, min((step + 1) * self.batch_size, total_rows)
        count = len(self.lengths)
        epochs = {epoch: self._epoch(epoch) for epoch in range(first // count, (last - 1) // count + 1)}
        return [int(epochs[position // count][position % count]) for position in range(first, last)]

    @lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as its run
    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        order = shuffled(self.seed, epoch, len(self.lengths))
        return self._grouped(order, epoch) if self.group_by_length else order

    def _grouped(self, order: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Sorted by length within megabatches, whose batches are then put in random order."""
        lengths = np.array(self.lengths)
        size = MEGABATCH * self.batch_size
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        flat = np.concatenate([chunk[np.argsort(-lengths[chunk], kind="stable")] for chunk in chunks])
        batches = [flat[i : i + self.batch_size] for i in range(0, len(flat), self.batch_size)]
        whole = [b for b in batches if len(b) == self.batch_size]
        rest = [b for b in batches if len(b) < self.batch_size]
        mixed = shuffled(self.seed + 1, epoch, len(whole))
        return np.concatenate([*(whole[i] for i in mixed), *rest])


@dataclass(frozen=True)
class MicroBatch:
    """Rows that pass through the model together: one under the other, padded at the right, or packed into one line.

    `ids`, `attention` (1 where there is a token) and `targets` are [rows, T], or [1, T] where packed; `targets[b, t]`
    is True where the token at `t + 1` carries loss, so it says at which positions the model's prediction counts.
    `packed` are the lengths of a line's rows in their order, the padding at its end as a last row; None: not packed.
    Padding is masked by position, never by token id: a tokenizer whose pad token is its EOS keeps its EOS targets.
    """

    ids: Tensor
    attention: Tensor
    targets: Tensor
    packed: tuple[int, ...] | None = None

    @property
    def labels(self) -> Tensor:
        """[N] the ids to predict, in the order of `targets`' True positions."""
        return torch.roll(self.ids, -1, dims=1)[self.targets]

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with. Of packed rows it gets positions that begin anew with each (no mask: with one,
        transformers would let rows see each other), and the borders that variable-length attention takes."""
        if self.packed is None:
            return {"input_ids": self.ids, "attention_mask": self.attention}
        device = self.ids.device
        positions = torch.cat([torch.arange(length, device=device) for length in self.packed])
        borders = torch.tensor([0, *accumulate(self.packed)], dtype=torch.int32, device=device)
        longest = max(self.packed)
        return {
            "input_ids": self.ids,
            "position_ids": positions[None],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        return MicroBatch(self.ids.to(device), self.attention.to(device), self.targets.to(device), self.packed)


def collate(rows: Sequence[Encoded], multiple: int = 1) -> MicroBatch:
    """Rows as one padded micro-batch whose width is a multiple of `multiple`."""
    width = round_up(max(len(row) for row in rows), multiple)
    batch = _empty(len(rows), width)
    for i, row in enumerate(rows):
        _put(batch, i, 0, row)
    return batch


def round_up(length: int, multiple: int) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple


def join(rows: Sequence[Encoded], width: int = 0) -> MicroBatch:
    """Rows as one packed line of at least `width` positions. No target crosses a border: the last token of a row
    predicts nothing."""
    lengths = [len(row) for row in rows]
    padding = max(width - sum(lengths), 0)
    batch = _empty(1, sum(lengths) + padding)
    for row, start in zip(rows, accumulate(lengths, initial=0), strict=False):
        _put(batch, 0, start, row)
    return replace(batch, packed=(*lengths, *([padding] if padding else [])))


def _empty(rows: int, width: int) -> MicroBatch:
    ids = torch.zeros((rows, width), dtype=torch.int64)
    return MicroBatch(ids, torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool))


def _put(batch: MicroBatch, line: int, start: int, row: Encoded) -> None:
    end = start + len(row)
    batch.ids[line, start:end] = torch.from_numpy(row.ids.astype(np.int64))
    batch.attention[line, start:end] = 1
    batch.targets[line, start : end - 1] = torch.from_numpy(row.loss[1:].copy())


@dataclass(frozen=True)
class Batching:
    """How the rows of a step become micro-batches of at most `rows` rows of `length` tokens each; packed, of as many
    rows as `rows * length` tokens hold."""

    rows: int
    length: int
    packed: bool

    def line(self) -> str:
        """A few words."""
        many = f"up to {self.rows * self.length:,} tokens" if self.packed else f"{self.rows} rows"
        return f"micro-batches of {many}"

    def split(self, rows: Sequence[Encoded]) -> list[Sequence[Encoded]]:
        """A step's rows, divided. Rows of a step are summed, so their order is free: longest first, so that memory
        runs out early or never."""
        return packs(rows, self.rows * self.length) if self.packed else micro_batches(rows, self.rows)

    def collate(self, rows: Sequence[Encoded]) -> MicroBatch:
        """The tensors of one micro-batch."""
        return join(rows, self.positions(rows)) if self.packed else collate(rows, WIDTH_MULTIPLE)

    def positions(self, rows: Sequence[Encoded]) -> int:
        """Of a micro-batch: the positions that the model computes, padding included."""
        lengths = [len(row) for row in rows]
        return self._width(sum(lengths)) if self.packed else len(rows) * round_up(max(lengths), WIDTH_MULTIPLE)

    def _width(self, tokens: int) -> int:
        """Of a packed line of so many tokens. What pads it is a row, and no longer than a row may be."""
        full = round_up(max(tokens, self.rows * self.length), WIDTH_MULTIPLE)
        long = tokens > LONG_LINE and self.length >= LONG_MULTIPLE
        return min(full, round_up(tokens, LONG_MULTIPLE if long else WIDTH_MULTIPLE))

    def bound(self, lengths: Sequence[int]) -> int:
        """At least the positions of the largest micro-batch of a step with rows of these lengths; quick."""
        if self.packed:
            return self._width(max(*lengths, min(sum(lengths), self.rows * self.length), 0))
        return min(len(lengths), self.rows) * round_up(max(lengths), WIDTH_MULTIPLE)

    def halved(self) -> Batching | None:
        """Micro-batches of half the size; None where they cannot be smaller."""
        if self.rows > 1:
            return replace(self, rows=self.rows // 2)
        return replace(self, length=self.length // 2) if self.length > 1 else None


def micro_batches(rows: Sequence[Encoded], size: int) -> list[Sequence[Encoded]]:
    """Rows of one step, `size` at a time, longest first, so that equals are padded together."""
    ordered = sorted(rows, key=len, reverse=True)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def packs(rows: Sequence[Encoded], most: int) -> list[Sequence[Encoded]]:
    """Rows of one step in packs of at most `most` tokens: best-fit decreasing (Johnson 1974), each row into the fullest
    pack that has room. A row longer than `most` is a pack of its own. Depends on nothing but the rows and their order.
    """
    found: list[list[Encoded]] = []
    room: list[int] = []
    for row in sorted(rows, key=len, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= len(row)]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            found[best].append(row)
            room[best] -= len(row)
        else:
            found.append([row])
            room.append(most - len(row))
    return list(found)
