"""Files as they are, or compressed with gzip or zstd, as one stream of bytes.

Knows bytes, nothing of rows. Invariant: a stream that is damaged or cut short raises `DamagedError`; it never just
ends.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.data.rows import Position

PACKINGS = {".gz": "gzip", ".zst": "zstd"}
BLOCK = 1 << 18  # bytes read at once


class DamagedError(Exception):
    """Compressed bytes that cannot be unpacked to their end."""


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of `inner`; what its library raises becomes `DamagedError`."""

    def __init__(self, inner: Any, packing: str) -> None:
        self._inner, self._packing = inner, packing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._inner.read(len(buffer))
        except (EOFError, OSError, ValueError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the system, not of the packing
                raise
            raise DamagedError(f"not {self._packing}, damaged or cut short: {error}") from error
        buffer[: len(block)] = block
        return len(block)


@contextmanager
def unpacked(path: Path, position: Position) -> Iterator[io.BufferedReader[Any]]:
    """The file's content, unpacked where its suffix says that it is packed; `position` follows what is read of it.
    Raises `OSError` and `DamagedError`."""
    with io.BufferedReader(io.FileIO(path), BLOCK) as file:
        position.file = file
        packing = PACKINGS.get(path.suffix.lower())
        if packing is None:
            yield file
            return
        if not file.peek(1):
            raise DamagedError(f"empty, not even the start of a {packing} file")
        with _unpacker(file, packing) as inner, io.BufferedReader(_Unpacked(inner, packing), BLOCK) as stream:
            yield stream


def _unpacker(file: io.BufferedReader[Any], packing: str) -> Any:
    if packing == "gzip":
        return gzip.GzipFile(fileobj=file)
    import pyarrow  # type: ignore[import-untyped]

    return pyarrow.input_stream(file, compression="zstd")


@contextmanager
def unpacked_file(path: Path) -> Iterator[Path]:
    """A file that holds the content, for readers that jump about: `path` itself, or a temporary one."""
    if path.suffix.lower() not in PACKINGS:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="qlora-rows-") as folder:
        plain = Path(folder) / "rows"
        with unpacked(path, Position()) as stream, plain.open("wb") as file:
            shutil.copyfileobj(stream, file, BLOCK)
        yield plain
