"""4-bit codes of weights on a CPU: bitsandbytes' own arithmetic with a table in place of its search.

Knows the 16 values that codes stand for, and floats. Invariant: codes and absmax are those of
`bitsandbytes.functional.quantize_4bit`, bit for bit.

Both scale each block to [-1, 1] and count the midpoints between neighbouring values that lie below a number.
bitsandbytes searches 15 midpoints for each number; here [-1, 1] is cut into cells that hold one midpoint at most, so
that the cell's count and a single comparison give the same, about ten times as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = 4096
CHUNK = 1 << 17
"""Elements at once: they and what is computed of them stay in a core's cache. A multiple of every blocksize."""


class Coder:
    """Codes for one table of 16 values in [-1, 1]."""

    def __init__(self, values: Tensor) -> None:
        order = torch.argsort(values)
        midpoints = (values[order[:-1]] + values[order[1:]]) / 2
        cells = _cell(midpoints)
        assert len(cells.unique()) == len(midpoints), "two midpoints in one cell"
        below = torch.searchsorted(cells, torch.arange(CELLS, dtype=torch.int32))
        self._midpoint = torch.full((CELLS,), torch.inf)
        self._midpoint[cells.long()] = midpoints
        self._code = order[torch.stack([below, (below + 1).clamp(max=15)], dim=1).reshape(-1)].to(torch.uint8)

    def encode(self, weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        """(codes [n/2], two in a byte; absmax [n/blocksize] float32) of a flat `weight` of whole blocks."""
        blocks = weight.float().view(-1, blocksize)
        absmax = blocks.abs().amax(dim=1)
        scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1).view(-1)
        cell = _cell(scaled)
        index = cell * 2
        index += scaled > self._midpoint.index_select(0, cell)
        pairs = self._code.index_select(0, index).view(torch.int16)  # little-endian: the first code is the low byte
        return ((pairs << 4) | (pairs >> 8)).to(torch.uint8), absmax


def _cell(scaled: Tensor) -> Tensor:
    """The cell of each number; monotone, so that all numbers of lower cells are smaller, however it rounds. What is not
    a number falls into the first or the last."""
    return ((scaled + 1) * (CELLS / 2)).to(torch.int32).clamp_(0, CELLS - 1)
