"""metrics.jsonl: one line per logged step and per evaluation.

Knows one file. Invariant: every line is a whole JSON object with `kind` and `step`, flushed when written.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora_cli.files import disk_errors, write_text


def cut_metrics(path: Path, step: int) -> None:
    """Leaves the lines up to `step`: those behind it, and what a killed process wrote of a line, are done anew."""
    if path.is_file():
        with disk_errors(path):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class MetricsFile:
    """Appends lines to `path`; a path of None writes nothing (processes other than the first)."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        with disk_errors(path or Path()):
            self._file = path.open("a", encoding="utf-8") if path else None

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """One line: `{"kind": kind, **values}`."""
        if self._file and self._path:
            with disk_errors(self._path):
                values = {key: value for key, value in values.items() if key != "event"}
                self._file.write(json.dumps({"kind": kind, **values}) + "\n")
                self._file.flush()
