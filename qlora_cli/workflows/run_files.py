"""The records of a run directory, read whatever became of them, and whether something works there.

Knows status.json, .jsonl files and processes. Invariant: nothing is written, and no content raises: what cannot be
used goes to `problems`, in words.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_cli.workflows.events import finite
from qlora_cli.workflows.rundir import STATUS
from qlora_cli.workflows.runlock import NAME as LOCK
from qlora_cli.workflows.runlock import is_held

AT_WORK, ENDED = ("starting", "running"), ("finished", "interrupted", "failed")
DIED, UNKNOWN = "died", "unknown"
Values = Mapping[str, Any]


def status_of(path: Path, problems: list[str]) -> dict[str, Any]:
    """What status.json holds of the right types; the rest is among the problems."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{STATUS} is missing")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{STATUS} cannot be read: {error}")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{STATUS} holds no object")
        return {}
    kinds = {"state": text, "reason": text, "host": text, "started": number, "updated": number}
    kinds |= {"step": whole, "total_steps": whole, "pid": whole}
    read = {name: kind(values.get(name)) for name, kind in kinds.items()}
    wrong = [
        name for name, value in read.items() if value is None or (name == "state" and value not in AT_WORK + ENDED)
    ]
    if wrong:
        problems.append(f"{STATUS} lacks, or has no sound value for, {', '.join(wrong)}")
    return {name: value for name, value in read.items() if name not in wrong}


def text(value: object) -> str | None:
    """Text that can be printed: half of a character pair becomes an escape."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else None


def whole(value: object) -> int | None:
    """A count."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def number(value: object) -> float | None:
    """A number that is finite."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None


def plain(value: object) -> Any:
    """What JSON can hold and a stream can print: values that are not finite become null."""
    if isinstance(value, dict):
        return {text(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return text(value) if isinstance(value, str) else finite(value)


def state_of(run: Path, status: Values) -> tuple[str, str]:
    """(state, the other machine on which it is said to be at work). A run that says so has died where no such process
    lives here, or none holds the directory."""
    state = status.get("state", UNKNOWN)
    if state not in AT_WORK or _is_locked(run):
        return state, ""
    host, pid = status.get("host", ""), status.get("pid", 0)
    if host != socket.gethostname():
        return state, host or "an unknown machine"
    lives = _lives(pid) and _is_locked(run) is not False
    return (state if lives else DIED), ""


def _is_locked(run: Path) -> bool | None:
    """Whether a process holds the directory; None where that cannot be seen."""
    try:
        return is_held(run) if (run / LOCK).is_file() else None
    except OSError:  # it may not be read, or the file system has no locks
        return None


def _lives(pid: int) -> bool:
    """Whether there is such a process here."""
    if os.name == "nt" or not 0 < pid < 2**31:  # there, signal 0 would end it
        return pid > 0
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; the lines that are none are among the problems."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return
    wrong = []
    for count, line in ((count, line) for count, line in enumerate(lines, start=1) if line.strip()):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            yield value
        else:
            wrong.append(str(count))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        problems.append(f"{path.name}: no JSON object on line {', '.join(wrong[:3])}{more}; the others are shown")
