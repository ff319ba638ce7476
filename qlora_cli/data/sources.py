"""What a recipe names as a source: a file, a folder, a pattern or a dataset on the Hub; and the rows of it.

Knows paths and the Hub's names; nothing of formats. Invariant: rows stream, and each that cannot be read is a problem
with file and line, never a row less.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qlora_cli.data.compressed import PACKINGS
from qlora_cli.data.found_files import find_files, has_magic
from qlora_cli.data.hub_rows import HubName, open_hub
from qlora_cli.data.readers import READERS, REFUSED, format_of, read_file, unreadable
from qlora_cli.data.rows import Outcome, Position, RestLost, SourceRow, shown
from qlora_cli.errors import DataError, Problem
from qlora_cli.files import sha256

__all__ = ["MOST_NAMED", "RestLost", "Source", "SourceRow", "is_local", "open_source", "raise_all", "read_rows"]

MOST_NAMED = 10
FILE_SUFFIXES = frozenset({*READERS, *REFUSED, *PACKINGS})


class Source(Protocol):
    """Rows, and what they are known by."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files as they are named to the user; `ID[SPLIT]` for the Hub."""

    @property
    def bytes(self) -> int | None:
        """The size of all files on disk; None for the Hub."""

    def fingerprint(self) -> str:
        """A hash of the content of all files in their order, read anew; for the Hub one of names and versions."""

    def rows(self, position: Position | None = None) -> Iterator[Outcome]:
        """Each row, or what is wrong with it. Raises `DataError` where there is neither. `position` follows how far
        files are read."""


@dataclass(frozen=True)
class LocalSource:
    """Files here, at least one, of known formats."""

    name: str
    paths: tuple[Path, ...]
    bytes: int

    @property
    def files(self) -> tuple[str, ...]:
        """The paths as written or matched."""
        return tuple(map(shown, self.paths))

    def fingerprint(self) -> str:
        """A hash of format and bytes of each file, whatever their names."""
        known = [f"{format_of(path)} {_content(path)}\n" for path in self.paths]
        return hashlib.sha256("".join(known).encode()).hexdigest()

    def rows(self, position: Position | None = None) -> Iterator[Outcome]:
        """Each row of each file, or what is wrong with it."""
        empty, position = True, position or Position()
        for path, file in zip(self.paths, self.files, strict=True):
            for outcome in read_file(path, file, position):
                empty = False
                yield outcome
            position.done(_size(path))
        if empty:
            raise DataError(f"{self.name} has no rows", fix="check that this is the right file and that it is complete")


def is_local(source: str) -> bool:
    """Whether `source` names files here rather than a dataset on the Hub."""
    has_suffix = Path(source).suffix.lower() in FILE_SUFFIXES  # a Hub id may hold a dot: `owner/rows-2.5`
    looks_like_path = source.startswith((".", "/", "~")) or has_suffix or source.count("/") != 1 or has_magic(source)
    return looks_like_path or os.path.exists(source)  # noqa: PTH110 - Path.exists raises for a name that is too long


def open_source(path: str, split: str = "train", config: str | None = None, revision: str | None = None) -> Source:
    """The rows at `path`: a file, a folder (its files of known formats, all the way down, but hidden ones), a pattern
    with `*`, `?`, `[...]` or `**` (files in the order of their names), or a dataset on the Hub, to which the other
    parameters apply.

    Raises `DataError` for files that are missing or of no known format, `MachineError` for a Hub out of reach.
    """
    if not is_local(path):
        return open_hub(HubName(path, split, config, revision))
    if config is not None or revision is not None:
        name = "config" if config is not None else "revision"
        raise DataError(f"{path}: a file here has no {name}", fix=f"remove {name}; it applies to the Hub only")
    paths = find_files(path)
    return LocalSource(path, paths, sum(map(_size, paths)))


def _size(path: Path) -> int:
    """Bytes on disk of a file that can be opened and whose format is known."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{shown(path)} is no regular file", fix="write its content to one")
        if format_of(path) is None:
            raise unreadable(path, shown(path))
        with path.open("rb"):
            return status.st_size
    except OSError as error:
        raise _system_error(path, error) from error


def _content(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise _system_error(path, error) from error


def _system_error(path: Path, error: OSError) -> DataError:
    return DataError(f"{shown(path)}: cannot be read: {error.strerror}", fix="check its name and permissions")


def read_rows(source: str, split: str) -> list[SourceRow]:
    """All rows of `source` at once; `split` applies to the Hub only.

    Raises what `open_source` raises, and `DataError` for rows that cannot be read.
    """
    outcomes = list(open_source(source, split).rows())
    raise_all([outcome for outcome in outcomes if isinstance(outcome, Problem)])
    return [outcome for outcome in outcomes if isinstance(outcome, SourceRow)]


def raise_all(problems: Sequence[Problem]) -> None:
    """Raises one `DataError` for all `problems`: the first ten in full, the others as a count."""
    if not problems:
        return
    named = list(problems[:MOST_NAMED])
    if len(problems) > MOST_NAMED:
        named.append(Problem(f"{len(problems) - MOST_NAMED} more rows like these"))
    raise DataError.of(named)
