"""The run directory: what belongs in it, and that nothing in one is overwritten.

Knows paths and JSON. Invariant: a directory that holds anything is refused, but for one whose run ended before its
first step; and `status.json` always says in which state the run is.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_cli.errors import DiskError, RunDirectoryError
from qlora_cli.files import disk_errors, unlisted, write_json, write_text

STATUS = "status.json"


def _check_place(path: Path) -> None:
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:  # a name too long, say
        raise DiskError(f"{str(path)[:80]}: {error.strerror}", fix="name another directory with -o DIR") from error
    if not existing.is_dir():
        raise RunDirectoryError(f"{existing} is a file", fix="name another directory with -o DIR")
    if not os.access(existing, os.W_OK):
        raise DiskError(f"{existing} cannot be written to", fix="name another directory with -o DIR")


def check_replaceable(path: Path, overwrite: bool, mark: str, read: Sequence[Path] = ()) -> None:
    """Raises `RunDirectoryError` unless `path` is new or empty, or may be replaced: the user said so, and it holds the
    file `mark`, which only this command writes, and nothing that this command did not write. It may be or hold neither
    the current folder nor one of those `read`."""
    _check_place(path)
    fix = "name another directory with -o DIR"
    if path.is_symlink():
        raise RunDirectoryError(f"{path} is a symbolic link", fix="name the folder itself with -o DIR")
    for folder in (Path(), *read):
        if path.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise RunDirectoryError(f"{path} is or holds {folder if folder.name else 'the current folder'}", fix=fix)
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise RunDirectoryError(f"{path} exists", fix=f"{fix}, or add --overwrite")
    if not (path / mark).is_file():
        why = f"--overwrite replaces a folder that holds {mark}, and nothing else"
        raise RunDirectoryError(f"{path} was not written by this command", why=why, fix=f"{fix}, or move it away")
    if others := unlisted(path):
        why = f"it holds what this command did not write: {', '.join(others[:3])}"
        raise RunDirectoryError(f"{path} is not replaced", why=why, fix=f"move that away, or {fix}")


def check_unused(path: Path) -> None:
    """Raises `RunDirectoryError` unless `path` is new, empty, or left by a run that ended before its first step."""
    _check_place(path)
    if path.is_dir() and any(path.iterdir()) and not _never_began(path):
        raise RunDirectoryError(
            f"{path} is not empty",
            why="a run never overwrites what another left",
            fix=f"name another run directory with -o DIR, or move {path} away",
        )


def _never_began(path: Path) -> bool:
    try:
        status = json.loads((path / STATUS).read_text(encoding="utf-8"))
        return bool(status["state"] in ("failed", "interrupted") and status["step"] == 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_space(path: Path, needed: int) -> None:
    """Raises `DiskError` when fewer than `needed` bytes are free where `path` will be."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskError(
            f"{path}: the run will write {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there",
            fix="free space, or choose another place with -o DIR",
        )


class RunDirectory:
    """An open run directory; with `writes` False (processes other than the first) every method does nothing."""

    def __init__(self, path: Path, total_steps: int, writes: bool) -> None:
        self.path = path
        self._writes = writes
        self._status: dict[str, Any] = {"state": "starting", "step": 0, "total_steps": total_steps, "reason": ""}
        self._status |= {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        if writes:
            check_unused(path)
            with disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            self.status("starting", 0)

    def status(self, state: str, step: int | None = None, reason: str = "") -> None:
        """Records the run's state: starting, running, finished, interrupted or failed."""
        self._status |= {"state": state, "reason": reason, "updated": time.time()}
        if step is not None:
            self._status["step"] = step
        if self._writes:
            write_json(self.path / STATUS, self._status)

    def text(self, name: str, text: str) -> None:
        """Writes a text file."""
        if self._writes:
            write_text(self.path / name, text)

    def json(self, name: str, value: Any) -> None:
        """Writes a JSON file."""
        if self._writes:
            write_json(self.path / name, value)

    def log(self, line: str) -> None:
        """Appends a line to train.log."""
        if self._writes:
            with disk_errors(self.path), (self.path / "train.log").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    @property
    def metrics_path(self) -> Path | None:
        """metrics.jsonl, or None where this process does not write."""
        return self.path / "metrics.jsonl" if self._writes else None
