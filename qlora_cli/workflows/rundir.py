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
from qlora_cli.secrets import held, redact, redacted
from qlora_cli.workflows.runlock import NAME as LOCK
from qlora_cli.workflows.runlock import RunLock, is_held

STATUS, RESOLVED = "status.json", "resolved.yaml"
OTHER_PLACE = "name another run directory with -o DIR"


def _check_place(path: Path) -> None:
    if held(str(path)):
        fix = f"{OTHER_PLACE}: its name is written into the run's files"
        raise RunDirectoryError(f"the name of the run directory holds a secret ({path})", fix=fix)
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
    if is_held(path):
        RunLock(path).release()  # says by whom
    _check_free(path)


def _check_free(path: Path) -> None:
    if _is_empty(path) or _never_began(path):
        return
    going_on = f"go on with that run: add --resume; or {OTHER_PLACE}" if (path / STATUS).is_file() else OTHER_PLACE
    raise RunDirectoryError(f"{path} is not empty", why="a run never overwrites what another left", fix=going_on)


def check_run(path: Path) -> bool:
    """Whether there is a run in `path` to go on with; False where it is new or empty. Raises `RunDirectoryError` where
    something else is there."""
    _check_place(path)
    if _is_empty(path):
        return False
    if not (path / STATUS).is_file():
        raise RunDirectoryError(f"{path} is no run directory", why=f"it has no {STATUS}", fix=OTHER_PLACE)
    return True


def _is_empty(path: Path) -> bool:
    """Whether it holds nothing but what a run leaves that is killed while it writes its first file."""
    first = f".tmp-{STATUS}-"
    return not path.is_dir() or all(child.name == LOCK or child.name.startswith(first) for child in path.iterdir())


def read_status(path: Path) -> dict[str, Any]:
    """What a run's status.json says; nothing where it cannot be read."""
    try:
        found = json.loads((path / STATUS).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _never_began(path: Path) -> bool:
    status = read_status(path)
    return status.get("state") in {"failed", "interrupted"} and status.get("step") == 0


SAMPLES = "samples.jsonl"
"""Answers to the recipe's `eval.samples`, a line for each at every evaluation."""


class RunDirectory:
    """An open and locked run directory; with `writes` False (processes other than the first) every method does nothing.
    `resumes`: there may be a run in it already. `left` says whose lock was taken over, empty if nobody's."""

    def __init__(self, path: Path, writes: bool, resumes: bool = False) -> None:
        self.path, self._writes, self.left = path, writes, ""
        self._status: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        self._lock: RunLock | None = None
        if writes:
            if not resumes:
                check_unused(path)
            with disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(path)
            self.left = self._lock.left
            if not resumes:
                _check_free(path)  # once more, now that nobody else writes there
            self._clean()

    def _clean(self) -> None:
        """Removes what a killed process left half-written."""
        for path in self.path.glob(".tmp-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Gives the directory free for others."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def status(self, state: str, reason: str = "", **facts: Any) -> None:
        """Records the run's state (starting, running, finished, interrupted or failed), and facts that stay."""
        self._status |= {"state": state, "reason": reason, "updated": time.time(), **facts}
        self.json(STATUS, self._status)

    def text(self, name: str, text: str) -> None:
        """Writes a text file, without secrets."""
        if self._writes:
            write_text(self.path / name, redact(text))

    def json(self, name: str, value: Any) -> None:
        """Writes a JSON file, without secrets."""
        if self._writes:
            write_json(self.path / name, redacted(value))

    def append(self, name: str, value: Any) -> None:
        """Appends a JSON value as a line."""
        if self._writes:
            with disk_errors(self.path), (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(redacted(value)) + "\n")

    def log(self, line: str) -> None:
        """Appends a line to train.log."""
        if self._writes:
            with disk_errors(self.path), (self.path / "train.log").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {redact(line)}\n")

    @property
    def metrics_path(self) -> Path | None:
        """metrics.jsonl, or None where this process does not write."""
        return self.path / "metrics.jsonl" if self._writes else None
