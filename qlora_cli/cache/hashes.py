"""Hashes of large files, remembered, so that gigabytes are not read on each start.

Knows files. Invariant: a hash is used only for a file whose place, inode, size and times are as they were when it was
taken, and samples of whose content are too; everything else is read again. A damaged record counts as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.errors import DiskError
from qlora_cli.files import sample_hash, sha256, write_json

THREADS = min(8, os.cpu_count() or 1)
SETTLED_NS = 2 * 10**9
"""Age from which a file's times tell whether it changed: filesystems count them in steps of up to two seconds."""


@dataclass(frozen=True)
class Hashes:
    """Hashes that are remembered in the file `memory`; without one that can be read or written, all are taken anew."""

    memory: Path

    def sha256(self, file: Path) -> str:
        """The file's SHA-256 in hexadecimal."""
        return self.of([file])[file]

    def of(self, files: Sequence[Path]) -> dict[Path, str]:
        """SHA-256 of each file; those that are not known are read in threads."""
        remembered, facts = self._remembered(), {file: _facts(file) for file in files}
        found = {file: _digest_in(remembered.get(_place(file)), _place(file), facts[file]) for file in files}
        fresh = taken([file for file, digest in found.items() if not digest])
        self._remember({file: {**facts[file], "sha256": digest} for file, digest in fresh.items()})
        return found | fresh

    def _remembered(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self.memory.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    def _remember(self, fresh: Mapping[Path, dict[str, Any]]) -> None:
        """Two processes that write at once may lose a hash of theirs, which is then taken again."""
        settled = {_place(f): sealed(_place(f), known) for f, known in fresh.items() if _settled(f, known)}
        if not settled:
            return
        others = {place: known for place, known in self._remembered().items() if Path(place).is_file()}
        with suppress(OSError, DiskError):
            write_json(self.memory, {**others, **settled})


def taken(files: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 of each file, read in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(files, pool.map(sha256, files), strict=True))


def _place(file: Path) -> str:
    return str(file.resolve())


def _facts(file: Path) -> dict[str, Any]:
    stat = file.stat()
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    return {"bytes": stat.st_size, "inode": stat.st_ino, **times, "samples": sample_hash(file)}


def sealed(place: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a hash of its own, so that one which was damaged is not believed."""
    seal = hashlib.sha256(json.dumps([place, sorted(known.items())]).encode()).hexdigest()
    return {**known, "seal": seal}


def _digest_in(known: object, place: str, facts: Mapping[str, Any]) -> str:
    """The hash that was remembered of a file with these facts; empty where there is none."""
    if not isinstance(known, dict) or known != sealed(place, {**facts, "sha256": known.get("sha256")}):
        return ""
    return str(known["sha256"])


def _settled(file: Path, known: Mapping[str, Any]) -> bool:
    """Whether a later change would show in the file's times, and none has happened while it was read."""
    age = time.time_ns() - max(known["mtime_ns"], known["ctime_ns"])
    return age > SETTLED_NS and _facts(file).items() <= known.items()
