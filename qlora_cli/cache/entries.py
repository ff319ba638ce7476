"""What is kept on disk for the next start: quantised bases and encoded rows.

Knows folders, hashes, locks and a limit; nothing of what a model or a row is. Invariant: what is read from the cache
is, byte for byte, what was written for the very same content and settings; anything else is named, removed and made
again. No run fails because the cache cannot be read or written.

    hashes.json             see `hashes.py`
    bases/KEY/, rows/KEY/   an entry: its files, their manifest.json, and manifest.sha256, which is locked while in use
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.cache.folders import (
    SEAL,
    bytes_in,
    damage_in,
    evict,
    hold,
    in_words,
    is_abandoned,
    last_used,
    only_writer,
    release,
    remove,
)
from qlora_cli.cache.hashes import Hashes
from qlora_cli.errors import DataError, DiskError, MachineError, ModelError, RunDirectoryError
from qlora_cli.files import (
    MANIFEST,
    give_name,
    is_folder,
    sha256,
    staged_folder,
    write_manifest,
    write_text,
)

FORMAT = 1
"""Part of every key: raised when entries are written in another way."""
PLACE, LIMIT = "QLORA_CACHE", "QLORA_CACHE_LIMIT"
KINDS = {"bases": "4-bit weights", "rows": "encoded rows"}
"""What entries hold, by the folder they are in."""
DEFAULT_LIMIT_GB = 50.0
RESERVE_BYTES = 2 * 10**9
"""Free space that is left to others."""

Tell = Callable[[str], None]


def find_cache(wanted: bool, tell: Tell, warn: Tell, kind: str = "bases") -> Cache | None:
    """The user's cache; None where it is not wanted, its limit is 0, or there is no home to keep it in. What it does is
    told, what goes wrong warned of. `MachineError` for a limit that is no number."""
    limit, place = _limit(), cache_place()
    return Cache(place, limit, tell, warn, kind=kind) if wanted and limit and place else None


def cache_place() -> Path | None:
    """Where the user's caches are, whether it exists yet or not; None where there is no home for them."""
    place = os.environ.get(PLACE) or _default_place()
    return Path(place).expanduser() if place else None


def _limit() -> int:
    """Bytes that all entries may have together."""
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT_GB)
    with suppress(ValueError):
        if math.isfinite(value := float(text)) and value >= 0:
            return int(value * 10**9)
    raise MachineError(
        f"{LIMIT} is {text!r}, not a number of GB",
        fix=f"set it to a number from 0 (keep nothing), e.g. {LIMIT}={DEFAULT_LIMIT_GB:g}, or unset it",
    )


def _default_place() -> str:
    try:
        return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora")
    except RuntimeError:  # no home
        return ""


def key_of(digests: Mapping[str, str], settings: Mapping[str, object]) -> str:
    """Names contents of these SHA-256 under `settings`."""
    facts = json.dumps({"format": FORMAT, "files": dict(digests), "settings": dict(settings)}, sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Cache:
    """The cache in `folder`, of up to `limit` bytes."""

    folder: Path
    limit: int
    tell: Tell
    warn: Tell
    keeps: bool = True
    """Whether this process writes entries: the first of those that start together does."""
    kind: str = "bases"

    @property
    def place(self) -> Path:
        """The folder of the entries."""
        return self.folder / self.kind

    @property
    def what(self) -> str:
        """What an entry holds."""
        return KINDS[self.kind]

    @property
    def hashes(self) -> Hashes:
        """Of files outside of the cache."""
        return Hashes(self.folder / "hashes.json")

    def key(self, files: Sequence[Path], settings: Mapping[str, object]) -> str:
        """Names the content of `files` under `settings`, both of which must hold all that decides an entry's bytes."""
        return key_of({file.name: digest for file, digest in self.hashes.of(files).items()}, settings)

    def load(self, key: str, read: Callable[[Path], Any]) -> Any:
        """What `read` makes of the entry; None where there is none, or none that is as it was written."""
        entry = self.place / key
        if not is_folder(entry):
            return None
        held = hold(entry)
        problems = damage_in(entry)
        try:
            found = None if problems else read(entry)
        except (ModelError, DataError) as error:
            found, problems = None, [str(error.problems[0].what)]
        if found is None:
            release(held)
            self._discard(entry, problems[0])
            return None
        if held is not None:  # in use until the model is gone
            weakref.finalize(found, held.close)
        with suppress(OSError):
            os.utime(entry / SEAL)
        self.tell(f"{self.what} read from {entry} ({in_words(bytes_in(entry))})")
        return found

    def _discard(self, entry: Path, problem: str) -> None:
        if not is_folder(entry):  # removed by another process a moment ago
            return
        self.warn(f"the cache entry {entry} is damaged: {problem}; it is made again")
        with suppress(OSError):
            remove(entry)

    def store(self, key: str, size: int, write: Callable[[Path], None]) -> None:
        """Keeps what `write` puts into a folder, about `size` bytes, under `key`; says why where it does not."""
        if not self.keeps:
            return
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            with only_writer(self.place) as alone:
                reason = self._obstacle(size) if alone else "another process is writing there"
                if reason:
                    self.warn(f"the {self.what} are not kept in {self.folder}: {reason}")
                elif not is_folder(self.place / key):
                    self._write(key, write)
        except (OSError, DiskError, RunDirectoryError) as error:
            first = str(error).splitlines()[0]
            self.warn(f"the {self.what} are not kept in {self.folder}: {first}")

    def _write(self, key: str, write: Callable[[Path], None]) -> None:
        with staged_folder(self.place / key) as staging:
            write(staging)
            write_manifest(staging)
            write_text(staging / SEAL, sha256(staging / MANIFEST))
        entry = self.place / key
        self.tell(f"{self.what} kept in {entry} ({in_words(bytes_in(entry))}); the next start reads them")

    def room(self) -> Path | None:
        """A place to write an entry that is to be adopted; None where nothing can be written."""
        with suppress(OSError):
            self.place.mkdir(parents=True, exist_ok=True)
            return self.place if os.access(self.place, os.W_OK) else None
        return None

    def adopt(self, key: str, folder: Path) -> Path | None:
        """Keeps a folder of this filesystem under `key`; returns where it is then, or None, saying why, where it stays
        what it was. Of several processes that adopt at once, one does, and all use its entry."""
        entry = self.place / key
        try:
            reason = self._obstacle(bytes_in(folder), mine=folder) if self.keeps else "another process keeps them"
            if reason:
                raise DiskError(reason)
            write_manifest(folder)
            write_text(folder / SEAL, sha256(folder / MANIFEST))
            give_name(folder, entry)
        except RunDirectoryError:  # another process was faster
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, DiskError) as error:
            self.warn(f"the {self.what} are not kept in {self.folder}: {str(error).splitlines()[0]}")
            return None
        self.tell(f"{self.what} kept in {entry} ({in_words(bytes_in(entry))}); the next start reads them")
        return entry

    def clear(self) -> tuple[int, int]:
        """Removes all entries of this kind that are not in use; returns how many, and their bytes."""
        sizes = {entry: bytes_in(entry) for entry in self.entries() if entry.parent == self.place}
        gone = [size for entry, size in sizes.items() if evict(entry)]
        return len(gone), sum(gone)

    def _obstacle(self, size: int, mine: Path | None = None) -> str:
        """Why an entry of so many bytes, written already if it is in `mine`, cannot be kept; empty once there is room
        for it."""
        for left in (*self.place.glob(".tmp-*"), *self.place.glob(".trash-*")):  # of writers that were killed
            if mine is None or is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        if size > self.limit:
            return f"{in_words(size)} are more than its limit of {in_words(self.limit)} ({LIMIT})"
        if mine is None and size > (free := shutil.disk_usage(self.place).free - RESERVE_BYTES):
            return f"{in_words(size)} are more than the {in_words(max(0, free))} that may be used of the disk"
        return "" if self._make_room(size) else f"what it holds is in use and leaves no {in_words(size)} ({LIMIT})"

    def _make_room(self, size: int) -> bool:
        """Removes entries, least recently used first, until `size` more bytes are within the limit."""
        sizes = {entry: bytes_in(entry) for entry in self.entries()}
        excess = sum(sizes.values()) + size - self.limit
        for entry, held in sizes.items():
            if excess > 0 and evict(entry):
                self.tell(f"{entry} removed ({in_words(held)}), to stay within {in_words(self.limit)} ({LIMIT})")
                excess -= held
        return excess <= 0

    def entries(self) -> list[Path]:
        """All entries of every kind, the least recently used first."""
        every = (path for kind in KINDS for path in (self.folder / kind).glob("*"))
        found = [path for path in every if not path.name.startswith(".") and is_folder(path)]
        return sorted(found, key=last_used)
