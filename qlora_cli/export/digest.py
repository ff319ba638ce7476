"""Tensors written, and the proof that the disk gives them back.

Knows safetensors folders. Invariant: a tensor's digest is taken of the bytes handed to the writer, before they reach a
file, and covers its type and shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.model.folder import BaseFolder
from qlora_cli.model.source import Source
from qlora_cli.model.writer import Writer

PIECE_BYTES = 1 << 24
"""How much of a tensor is read at once."""


class DigestWriter(Writer):
    """A `Writer` that keeps the digest of every tensor it is given."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.digests: dict[str, str] = {}

    def __enter__(self) -> DigestWriter:
        return self

    def add_pieces(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Iterable[Tensor]) -> None:
        """See `Writer`."""
        digest = _begun(dtype, shape)
        super().add_pieces(name, dtype, shape, _through(digest, pieces))
        self.digests[name] = digest.hexdigest()


def check_digests(folder: Path, digests: Mapping[str, str], advance: Callable[[int], None]) -> None:
    """Reads every tensor of `folder` and compares it with what was written; tells `advance` the bytes read. Raises
    `ModelError` that names those that differ."""
    source = Source(BaseFolder(folder.name, folder, None))
    problems = sorted(source.entries.keys() ^ digests.keys())
    for name in source.entries.keys() & digests.keys():
        if _read(source, name) != digests[name]:
            problems.append(name)
        advance(source.entries[name].bytes)
    if problems:
        raise ModelError(
            f"{len(problems)} tensors do not read back as they were written, e.g. {problems[0]}",
            why="the disk or its driver gave other bytes than it was given",
            fix="check the disk, or choose another place with -o DIR",
        )


def _read(source: Source, name: str) -> str:
    entry = source.entries[name]
    digest = _begun(entry.dtype, entry.shape)
    for _ in _through(digest, source.pieces(name, PIECE_BYTES)):
        pass
    return str(digest.hexdigest())


def _begun(dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
    return hashlib.sha256(f"{dtype} {tuple(shape)} ".encode())


def _through(digest: Any, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The pieces, on the CPU, each counted in."""
    for piece in pieces:
        flat = piece.detach().cpu().contiguous()
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
        yield flat
