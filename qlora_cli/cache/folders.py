"""Folders of the cache: whole or not, in use or not, large or small.

Knows files and locks; nothing of keys and limits. Invariant: a folder that is in use is not removed, and one that is
removed loses its name first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qlora_cli.cache.hashes import THREADS
from qlora_cli.files import MANIFEST, manifest_problems, unlisted

SEAL = "manifest.sha256"
ABANDONED_SECONDS = 3600.0
"""Age of the newest file from which something half-written is taken to be a killed writer's."""


def damage_in(entry: Path) -> list[str]:
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


def hold(entry: Path) -> BinaryIO | None:
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


def release(held: BinaryIO | None) -> None:
    """Undoes `hold`."""
    if held is not None:
        held.close()


def evict(entry: Path) -> bool:
    """Removes an entry that nobody uses."""
    try:
        with (entry / SEAL).open("rb") as seal:
            fcntl.flock(seal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(entry)
    except FileNotFoundError:
        shutil.rmtree(entry, ignore_errors=True)
    except OSError:
        return False
    return True


def remove(entry: Path) -> None:
    """Takes the name away first, so that nobody sees half an entry."""
    trash = entry.with_name(f".trash-{entry.name}-{time.time_ns()}")
    entry.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[bool]:
    """Whether no other process writes into the cache, nor will until this ends."""
    with (folder / ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_abandoned(folder: Path) -> bool:
    """Whether nobody has written into it for long."""
    with suppress(OSError):
        latest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        return time.time() - latest > ABANDONED_SECONDS
    return False


def last_used(entry: Path) -> float:
    """When it was read last, in seconds; 0 where that cannot be told."""
    with suppress(OSError):
        return (entry / SEAL).stat().st_mtime
    return 0.0


def bytes_in(entry: Path) -> int:
    """Size of its files."""
    with suppress(OSError):
        return sum(file.stat().st_size for file in entry.iterdir())
    return 0


def in_words(count: int) -> str:
    """A number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
