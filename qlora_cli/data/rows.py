"""A row of a source, the place it came from, and what is said of one that cannot be read.

Knows no format. Invariant: every row and every problem names FILE:NUMBER.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from qlora_cli.errors import Problem

LONGEST = 1 << 26  # characters of a line, field, JSON value or text file; a longer one is a problem, not memory
LONGEST_SHOWN = f"{LONGEST >> 20} MiB"


@dataclass(frozen=True)
class SourceRow:
    """A row as it was read. `file` is a path as it was written or matched, or `ID[SPLIT]` for the Hub. `number` is a
    line from 1 in line formats, an index from 1 in JSON arrays, Parquet and Arrow, the first line of a CSV record, and
    an index from 0 on the Hub."""

    values: dict[str, Any]
    file: str
    number: int

    @property
    def where(self) -> str:
        """`FILE:NUMBER`."""
        return f"{self.file}:{self.number}"


class RestLost(Problem):
    """A problem behind which nothing more of its file could be read: an unknown number of rows, not one, is missing."""


Outcome = SourceRow | Problem


@dataclass
class Position:
    """How far a source has been read: `behind` bytes of files that are done, and what of `file` is."""

    behind: int = 0
    file: BinaryIO | None = None

    @property
    def bytes(self) -> int:
        """Bytes on disk that were read."""
        return self.behind + (self.file.tell() if self.file is not None and not self.file.closed else 0)

    def done(self, size: int) -> None:
        """A file of so many bytes is done."""
        self.behind, self.file = self.behind + size, None


@dataclass
class Place:
    """Where a reader stands in a file: `number` is that of the row it is reading."""

    file: str
    number: int = 1
    position: Position = field(default_factory=Position)

    def row(self, values: dict[str, Any]) -> SourceRow:
        """The row that starts here."""
        return SourceRow(values, self.file, self.number)

    def problem(self, what: str, why: str = "", fix: str = "") -> Problem:
        """What is wrong with the row that starts here."""
        return Problem(what, why, fix, f"{self.file}:{self.number}")

    def rest_lost(self, what: str, why: str = "", fix: str = "") -> RestLost:
        """Why neither this row nor those behind it can be read."""
        return RestLost(what, why, fix, f"{self.file}:{self.number}")

    def too_long(self, what: str) -> Problem:
        """The row here is longer than what is held in memory at once."""
        return self.problem(f"{what} is longer than {LONGEST_SHOWN}", fix="split it into several rows")


def shown(path: Path) -> str:
    """The path as text that can be printed, whatever bytes its name consists of."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def first_line(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
