"""Copies of 4-bit weights for bitsandbytes' AVX512-BF16 kernel, which multiplies few rows several times faster.

Knows the kernel's layout and arguments. Invariant: the stored weight is only read; a copy's product is the stored
weight's up to the copy's constants, which are rounded to bfloat16 (at most 0.4 % each).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.model.nf4 import dequantize, packed_kernel, quantized_shape, scales

ROWS = 32
"""Rows of a weight that the kernel takes at once."""
_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURE = ctypes.CFUNCTYPE(None, *[_LONG] * 3, *[_POINTER] * 4, *[_LONG] * 3)
"""rows, out, in; x, codes, constants, result; blocksize, strides of x and of the result."""


class PackedCopy:
    """A 4-bit layer's weight [out, in] once more, in 0.53 bytes per parameter at blocksize 64. The kernel is called
    directly: bitsandbytes' own wrapper takes as long as a small product."""

    def __init__(self, layer: Any) -> None:
        """`layer` must be one that `fits`."""
        self._out, self._in = quantized_shape(layer)
        self._blocksize = layer.weight.quant_state.blocksize
        self._codes = _packed(layer.weight.data.view(torch.uint8).view(self._out, -1))
        self._scales = scales(layer).T.to(torch.bfloat16).contiguous()
        self._weight = (self._codes.data_ptr(), self._scales.data_ptr())
        self._kernel = _SIGNATURE(ctypes.cast(packed_kernel(layer), _POINTER).value or 0)

    @property
    def bytes(self) -> int:
        """What the copy holds."""
        return sum(t.numel() * t.element_size() for t in (self._codes, self._scales))

    def product(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], both in bfloat16."""
        x, out = x.contiguous(), x.new_empty(*x.shape[:-1], self._out)
        rows, sizes = x.numel() // self._in, (self._blocksize, self._in, self._out)
        self._kernel(rows, self._out, self._in, x.data_ptr(), *self._weight, out.data_ptr(), *sizes)
        return out


def _packed(stored: Tensor) -> Tensor:
    """Stored bytes [out, in / 2] hold two columns of a row each, the first in the high half. The kernel wants, for 32
    rows and a pair of columns, 32 bytes: byte i holds column i % 2 of row i // 2 (low) and of row 16 + i // 2."""
    tiles = stored.view(-1, ROWS, stored.shape[1]).transpose(1, 2).contiguous()
    low, high = tiles[..., : ROWS // 2], tiles[..., ROWS // 2 :]
    return torch.stack([(low >> 4) | (high & 0xF0), (low & 0xF) | (high << 4)], -1).view(stored.shape)


def fits(layer: Any) -> bool:
    """Whether the kernel takes this layer, here and in its compute type, and gives what it should."""
    shape, state = (layer.out_features, layer.in_features), layer.weight.quant_state
    whole = shape == quantized_shape(layer) and shape[0] % ROWS == 0 and shape[1] % state.blocksize == 0
    here = layer.weight.device.type == "cpu" and packed_kernel(layer) is not None
    return whole and here and layer.compute_dtype == torch.bfloat16


def copied_bytes(layer: Any) -> int:
    """What a copy of the layer will hold."""
    elements, blocksize = layer.out_features * layer.in_features, layer.weight.quant_state.blocksize
    return elements // 2 + 2 * elements // blocksize


def available_memory() -> int:
    """Bytes that new processes could have without swapping, by Linux's estimate; 0 where it is not known."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def agrees(layer: Any, copy: PackedCopy) -> bool:
    """Whether the copy's product is the layer's. The kernel is no public interface of bitsandbytes; a release that
    changes it shall make decoding slow, not wrong."""
    x = torch.linspace(-1, 1, layer.in_features).sin().to(torch.bfloat16)
    exact = dequantize(layer).float() @ x.float()
    return bool((copy.product(x).float() - exact).norm() <= 0.02 * exact.norm())
