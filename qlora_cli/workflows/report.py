"""`qlora report`: what runs left, as one page, a Markdown file or a picture.

Knows run directories and where the report goes. Invariant: it changes no run, and replaces no file but an earlier
report of its own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.errors import DiskError, ModelError
from qlora_cli.files import disk_errors, write_text
from qlora_cli.workflows import report_html, report_md, report_png
from qlora_cli.workflows.report_blocks import Document
from qlora_cli.workflows.report_content import document
from qlora_cli.workflows.report_read import Record, read_record

FORMATS: Mapping[str, Callable[[Document], str | bytes]] = {
    "html": report_html.html_page,
    "md": report_md.markdown,
    "png": report_png.png,
}
MARKS = (report_html.MARK, report_md.MARK, f"Software\0{report_png.MARK}")
HEAD = 4096
"""Bytes of a file in which its mark stands."""


@dataclass(frozen=True)
class ReportResult:
    """A report: where it was written, or its text where it was not (Markdown without a place)."""

    kind: str
    runs: tuple[Path, ...]
    path: Path | None
    text: str
    problems: tuple[str, ...]

    def line(self) -> str:
        """What is asked for: the path, or the text itself."""
        return self.text.removesuffix("\n") if self.path is None else str(self.path)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        runs, path = [str(run) for run in self.runs], str(self.path) if self.path else None
        text = {} if self.path else {"text": self.text}
        return {
            "event": "result",
            "format": self.kind,
            "path": path,
            "runs": runs,
            "problems": list(self.problems),
            **text,
        }


def run_report(runs: Sequence[Path], output: Path | None, kind: str = "html") -> ReportResult:
    """Writes the report of `runs` as `kind` (see `FORMATS`) to `output`, by default report.html or report.png here;
    Markdown without an output is returned. Raises `ModelError` for all that are no run directories, `DiskError` for an
    output that is something else's, `MachineError` for a picture without matplotlib."""
    path = output if output is not None else None if kind == "md" else Path(f"report.{kind}")
    _check_place(path, kind)
    given = _distinct(runs)
    records = _records(given)
    made = FORMATS[kind](document(records))
    if path is not None:
        _write(path, made)
    text = made if path is None and isinstance(made, str) else ""
    problems = tuple(f"{record.name}: {problem}" for record in records for problem in record.problems)
    return ReportResult(kind, tuple(given), path, text, problems)


def _distinct(runs: Sequence[Path]) -> list[Path]:
    """Each once, whatever it was called."""
    return list({os.path.realpath(run): run for run in reversed(runs)}.values())[::-1]


def _records(runs: Sequence[Path]) -> list[Record]:
    read = [_read(run, name, colour) for colour, (run, name) in enumerate(zip(runs, _names(runs), strict=True))]
    if problems := [problem for each in read if isinstance(each, ModelError) for problem in each.problems]:
        raise ModelError.of(problems)
    return [each for each in read if isinstance(each, Record)]


def _read(run: Path, name: str, colour: int) -> Record | ModelError:
    try:
        return read_record(run, name, colour)
    except ModelError as error:
        return error


def _names(runs: Sequence[Path]) -> list[str]:
    """The folder's name, or the path as given where several have that."""
    short = [Path(os.path.realpath(run)).name for run in runs]
    often = Counter(short)
    return [name if often[name] == 1 else str(run) for name, run in zip(short, runs, strict=True)]


def _check_place(path: Path | None, kind: str) -> None:
    """Before anything is read."""
    if kind == "png":
        report_png.check_matplotlib()
    if path is None:
        return
    fix = "name another file with -o"
    if path.exists() and not path.is_file():
        raise DiskError(f"cannot write {path}: it is no file", fix=fix)
    if path.is_file() and not _is_report(path):
        raise DiskError(f"{path} exists and is no report of this command", why="it would be lost", fix=fix)


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD).decode("utf-8", errors="replace")
    except OSError:
        return False
    return not head or any(mark in head for mark in MARKS)


def _write(path: Path, content: str | bytes) -> None:
    if isinstance(content, str):
        write_text(path, content)
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
