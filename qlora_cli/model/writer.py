"""Writes safetensors files of any size, one tensor at a time.

Knows the format (8 bytes of length, a JSON header, the data without gaps). Invariant: no more than one piece of a
tensor is in memory, and every tensor starts at a multiple of its element size.

safetensors' own writer wants all tensors of a file at once. Here the header's room is kept free and filled at the end;
the format allows it to be padded with spaces.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qlora_cli.files import disk_errors, write_json
from qlora_cli.model.folder import INDEX
from qlora_cli.model.source import DTYPES

SHARD_BYTES = 5 * 10**9
ALIGNMENT = 8
ENTRY_BYTES = 160
"""Room in the header for a tensor besides its name: type, up to four dimensions, two offsets."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Writer:
    """Writes `model.safetensors`, or numbered shards with an index, into a folder. Use as a context, then `finish`."""

    def __init__(self, folder: Path, names: Iterable[str], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._header_bytes = -(-sum(len(json.dumps(name)) + ENTRY_BYTES for name in names) // ALIGNMENT) * ALIGNMENT
        self._file: BinaryIO | None = None
        self._shards: list[dict[str, Any]] = []
        self._offset = 0
        self._late: list[tuple[str, Tensor]] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:  # an error is on its way, and closing would only repeat it
            with contextlib.suppress(OSError):
                self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor."""
        self.add_pieces(name, tensor.dtype, tuple(tensor.shape), [tensor])

    def add_pieces(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Iterable[Tensor]) -> None:
        """Writes a tensor whose rows arrive in pieces."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        if size % ALIGNMENT:  # would misalign those after it: written at the end of the shard
            self._late.append((name, torch.cat([piece.reshape(-1) for piece in pieces]).cpu().reshape(shape)))
            return
        if self._file is not None and self._offset + size > self._shard_bytes and self._offset:
            self._close_shard()
        self._write(name, dtype, shape, pieces)

    def _write(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Iterable[Tensor]) -> None:
        with disk_errors(self._folder):
            file = self._file or self._open_shard()
            start = self._offset
            for piece in pieces:
                assert piece.dtype == dtype, f"{name}: a piece of {piece.dtype} in a tensor of {dtype}"
                self._offset += file.write(piece.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        self._shards[-1][name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, self._offset],
        }

    def _open_shard(self) -> BinaryIO:
        self._shards.append({})
        self._offset = 0
        self._file = self._path(len(self._shards)).open("wb")
        self._file.write(b" " * (8 + self._header_bytes))
        return self._file

    def _path(self, number: int, total: int | None = None) -> Path:
        if total == 1:
            return self._folder / "model.safetensors"
        return self._folder / (f"model-{number:05d}" + (f"-of-{total:05d}" if total else "") + ".safetensors")

    def _close_shard(self) -> None:
        for name, tensor in sorted(self._late, key=lambda each: -each[1].element_size()):
            self._write(name, tensor.dtype, tuple(tensor.shape), [tensor])
        self._late.clear()
        if self._file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}, separators=(",", ":")).encode()
        assert len(header) <= self._header_bytes, "the header outgrew its room"
        with disk_errors(self._folder):
            self._file.seek(0)
            self._file.write(self._header_bytes.to_bytes(8, "little") + header)
            self._file.close()
        self._file = None

    def finish(self) -> int:
        """Closes the last shard, gives the files their final names, writes the index; returns bytes of tensors."""
        self._close_shard()
        total, sizes, weight_map = len(self._shards), 0, dict[str, str]()
        for number, shard in enumerate(self._shards, 1):
            final = self._path(number, total)
            self._path(number).replace(final)
            weight_map |= dict.fromkeys(shard, final.name)
            sizes += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in shard.values())
        if total > 1:
            write_json(self._folder / INDEX, {"metadata": {"total_size": sizes}, "weight_map": weight_map})
        return sizes
