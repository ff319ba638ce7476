"""Quantised bases kept on disk, so that the next start need not quantise.

Knows folders, hashes, locks and a limit; nothing of what a model is. Invariant: what is read from the cache is, byte
for byte, what was written for the very same content and settings; anything else is named, removed and made again. No
run fails because the cache cannot be read or written.

    hashes.json    see `hashes.py`
    bases/KEY/     an entry: its files, their manifest.json, and manifest.sha256, which is locked while in use
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora_cli.errors import DiskError, MachineError, ModelError, RunDirectoryError
from qlora_cli.files import MANIFEST, manifest_problems, sha256, staged_folder, unlisted, write_manifest, write_text
from qlora_cli.model.folder import is_folder
from qlora_cli.model.hashes import THREADS, Hashes

FORMAT = 1
"""Part of every key: raised when entries are written in another way."""
PLACE, LIMIT = "QLORA_CACHE", "QLORA_CACHE_LIMIT"
DEFAULT_LIMIT_GB = 50.0
RESERVE_BYTES = 2 * 10**9
"""Free space that is left to others."""
SEAL = "manifest.sha256"

Tell = Callable[[str], None]


def find_cache(wanted: bool, tell: Tell, warn: Tell) -> Cache | None:
    """The user's cache; None where it is not wanted, its limit is 0, or there is no home to keep it in. What it does is
    told, what goes wrong warned of. `MachineError` for a limit that is no number."""
    limit, place = _limit(), cache_place()
    return Cache(place, limit, tell, warn) if wanted and limit and place else None


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


@dataclass(frozen=True)
class Cache:
    """The cache in `folder`, of up to `limit` bytes."""

    folder: Path
    limit: int
    tell: Tell
    warn: Tell
    keeps: bool = True
    """Whether this process writes entries: the first of those that start together does."""

    @property
    def bases(self) -> Path:
        """The folder of the entries."""
        return self.folder / "bases"

    @property
    def hashes(self) -> Hashes:
        """Of files outside of the cache."""
        return Hashes(self.folder / "hashes.json")

    def key(self, files: Sequence[Path], settings: Mapping[str, object]) -> str:
        """Names the content of `files` under `settings`, both of which must hold all that decides an entry's bytes."""
        digests = {file.name: digest for file, digest in self.hashes.of(files).items()}
        facts = json.dumps({"format": FORMAT, "files": digests, "settings": dict(settings)}, sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:32]

    def load(self, key: str, read: Callable[[Path], Any]) -> Any:
        """What `read` makes of the entry; None where there is none, or none that is as it was written."""
        entry = self.bases / key
        if not is_folder(entry):
            return None
        held = _hold(entry)
        problems = _problems(entry)
        try:
            found = None if problems else read(entry)
        except ModelError as error:
            found, problems = None, [str(error.problems[0].what)]
        if found is None:
            _release(held)
            self._discard(entry, problems[0])
            return None
        if held is not None:  # in use until the model is gone
            weakref.finalize(found, held.close)
        with suppress(OSError):
            os.utime(entry / SEAL)
        self.tell(f"4-bit weights read from {entry} ({_size(_bytes(entry))})")
        return found

    def _discard(self, entry: Path, problem: str) -> None:
        if not is_folder(entry):  # removed by another process a moment ago
            return
        self.warn(f"the cache entry {entry} is damaged: {problem}; the base is quantised again")
        with suppress(OSError):
            _remove(entry)

    def store(self, key: str, size: int, write: Callable[[Path], None]) -> None:
        """Keeps what `write` puts into a folder, about `size` bytes, under `key`; says why where it does not."""
        if not self.keeps:
            return
        try:
            self.bases.mkdir(parents=True, exist_ok=True)
            with _only_writer(self.bases) as alone:
                reason = self._obstacle(size) if alone else "another process is writing there"
                if reason:
                    self.warn(f"the 4-bit weights are not kept in {self.folder}: {reason}")
                elif not is_folder(self.bases / key):
                    self._write(key, write)
        except (OSError, DiskError, RunDirectoryError) as error:
            first = str(error).splitlines()[0]
            self.warn(f"the 4-bit weights are not kept in {self.folder}: {first}")

    def _write(self, key: str, write: Callable[[Path], None]) -> None:
        with staged_folder(self.bases / key) as staging:
            write(staging)
            write_manifest(staging)
            write_text(staging / SEAL, sha256(staging / MANIFEST))
        entry = self.bases / key
        self.tell(f"4-bit weights kept in {entry} ({_size(_bytes(entry))}); the next start reads them")

    def _obstacle(self, size: int) -> str:
        """Why an entry of so many bytes cannot be kept; empty once there is room for it."""
        for left in (*self.bases.glob(".tmp-*"), *self.bases.glob(".trash-*")):  # of writers that were killed
            shutil.rmtree(left, ignore_errors=True)
        if size > self.limit:
            return f"{_size(size)} are more than its limit of {_size(self.limit)} ({LIMIT})"
        if size > (free := shutil.disk_usage(self.bases).free - RESERVE_BYTES):
            return f"{_size(size)} are more than the {_size(max(0, free))} that may be used of the disk"
        return "" if self._make_room(size) else f"what it holds is in use and leaves no {_size(size)} ({LIMIT})"

    def _make_room(self, size: int) -> bool:
        """Removes entries, least recently used first, until `size` more bytes are within the limit."""
        sizes = {entry: _bytes(entry) for entry in self.entries()}
        excess = sum(sizes.values()) + size - self.limit
        for entry, held in sizes.items():
            if excess > 0 and _evict(entry):
                self.tell(f"{entry} removed ({_size(held)}), to stay within {_size(self.limit)} ({LIMIT})")
                excess -= held
        return excess <= 0

    def entries(self) -> list[Path]:
        """All entries, the least recently used first."""
        found = [path for path in self.bases.glob("*") if not path.name.startswith(".") and is_folder(path)]
        return sorted(found, key=_last_used)


def _problems(entry: Path) -> list[str]:
    """What is not as it was written."""
    try:
        manifest, seal = ((entry / name).read_bytes() for name in (MANIFEST, SEAL))
    except OSError as error:
        return [f"{Path(error.filename or MANIFEST).name} cannot be read ({error.strerror})"]
    if hashlib.sha256(manifest).hexdigest().encode() != seal:
        return [f"{MANIFEST} or {SEAL} is not as it was written (they do not belong together)"]
    if strangers := [name for name in unlisted(entry) if name.endswith(".safetensors")]:
        return [f"{strangers[0]} is not one of its files"]
    names = json.loads(manifest)
    with ThreadPoolExecutor(THREADS) as pool:
        return [
            problem for found in pool.map(lambda name: manifest_problems(entry, {name}), names) for problem in found
        ]


def _hold(entry: Path) -> BinaryIO | None:
    """Marks an entry as in use, as long as what is returned is open; None where it cannot be marked."""
    try:
        seal = (entry / SEAL).open("rb")
    except OSError:
        return None
    with suppress(OSError):
        fcntl.flock(seal, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return seal
    seal.close()
    return None


def _release(held: BinaryIO | None) -> None:
    if held is not None:
        held.close()


def _evict(entry: Path) -> bool:
    """Removes an entry that nobody uses."""
    try:
        with (entry / SEAL).open("rb") as seal:
            fcntl.flock(seal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(entry)
    except FileNotFoundError:
        shutil.rmtree(entry, ignore_errors=True)
    except OSError:
        return False
    return True


def _remove(entry: Path) -> None:
    """Takes the name away first, so that nobody sees half an entry."""
    trash = entry.with_name(f".trash-{entry.name}-{time.time_ns()}")
    entry.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def _only_writer(folder: Path) -> Iterator[bool]:
    """Whether no other process writes into the cache, nor will until this ends."""
    with (folder / ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _last_used(entry: Path) -> float:
    with suppress(OSError):
        return (entry / SEAL).stat().st_mtime
    return 0.0


def _bytes(entry: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_size for file in entry.iterdir())
    return 0


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
