"""Which rows make up which optimizer step, and how they become tensors.

Knows lengths and a seed. Invariant: the rows of a step are a pure function of (seed, epoch, step) and the data; they
do not depend on the number of devices, on what ran before, or on any library's random generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_cli.data.encode import Encoded

WIDTH_MULTIPLE = 32
"""Micro-batches are padded to a multiple of this, so that few shapes occur: on a CPU each costs a compiled kernel that
stays in memory, on CUDA a block in the allocator's cache."""
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
    """Rows that pass through the model together, padded at the right.

    `ids`, `attention` (1 where there is a token) and `targets` are [rows, T]; `targets[b, t]` is True where the token
    at `t + 1` carries loss, so it says at which positions the model's prediction counts. Padding is masked by
    position, never by token id: a tokenizer whose pad token is its EOS keeps its EOS targets.
    """

    ids: Tensor
    attention: Tensor
    targets: Tensor

    @property
    def labels(self) -> Tensor:
        """[N] the ids to predict, in the order of `targets`' True positions."""
        return torch.roll(self.ids, -1, dims=1)[self.targets]

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        return MicroBatch(self.ids.to(device), self.attention.to(device), self.targets.to(device))


def collate(rows: Sequence[Encoded], multiple: int = 1) -> MicroBatch:
    """Rows as one padded micro-batch whose width is a multiple of `multiple`."""
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    attention, targets = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.ids.astype(np.int64))
        attention[i, : len(row)] = 1
        targets[i, : len(row) - 1] = torch.from_numpy(row.loss[1:])
    return MicroBatch(ids, attention, targets)


def micro_batches(rows: Sequence[Encoded], size: int) -> list[Sequence[Encoded]]:
    """Rows of one step, `size` at a time, longest first: rows of a step are summed, so their order is free, equals pad
    less, and memory runs out early or never."""
    ordered = sorted(rows, key=len, reverse=True)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
