"""One run, one directory, or one file: locks that end with the process that holds them.

Knows one file. Invariant: at most one process at a time holds a lock; one that died, however it died, holds none. The
file of a directory's lock stays, since removing it would let two hold locks of the same name; it says whose it is.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_cli.errors import RunDirectoryError
from qlora_cli.files import disk_errors

try:
    import fcntl
except ImportError:  # Windows, where a run directory has no lock
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
TRIES = 5


class RunLock:
    """Holds the lock of `folder`, which exists, until `release` or the end of the process. Raises `RunDirectoryError`
    where another process holds it. `left` describes a process that held it and did not release it, empty if none."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        with disk_errors(self._path):
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _taken(self._handle):
            holder = self._holder()
            os.close(self._handle)
            raise RunDirectoryError(
                f"{folder} is in use by {holder or 'another process'}",
                why="two runs in one directory would overwrite each other",
                fix="wait until it ends, or name another run directory with -o DIR",
            )
        self.left = self._holder()
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))

    def release(self) -> None:
        """Gives the lock up."""
        self._write("")
        os.close(self._handle)

    def _write(self, text: str) -> None:
        with disk_errors(self._path):
            os.truncate(self._handle, 0)
            os.pwrite(self._handle, text.encode(), 0)

    def _holder(self) -> str:
        """What the file says of its process."""
        try:
            said: dict[str, Any] = json.loads(os.pread(self._handle, 1000, 0))
            return f"process {said['pid']} on {said['host']}"
        except (ValueError, KeyError, TypeError):
            return ""


def _taken(handle: int) -> bool:
    """Takes the lock. More than one try, since `is_held` takes it for a moment too."""
    for _ in range(TRIES):
        if _flock(handle, exclusive=True):
            return True
        time.sleep(0.02)
    return False


def _flock(handle: int, exclusive: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """A file to append to, made where it is not there, for this process alone. `RunDirectoryError` where another one
    has it."""
    with disk_errors(path):
        file = path.open("a+b", buffering=0)  # what could not be written is not tried again at the end
    with file:
        with disk_errors(path):
            free = _flock(file.fileno(), exclusive=True)
        if not free:
            raise RunDirectoryError(
                f"{path} is in use by another process",
                why="two runs that append to one file would mix their rows",
                fix="wait until it ends, or name another file with -o",
            )
        yield file


def is_held(folder: Path) -> bool:
    """Whether a process works in `folder` now. Looking changes nothing."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _flock(handle, exclusive=False)
    finally:
        os.close(handle)
