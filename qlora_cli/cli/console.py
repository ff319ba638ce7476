"""The only file that prints.

Knows streams and events. Invariant: stdout carries results (or with `--json` events) and nothing else; processes other
than the first print nothing; without a terminal there is no carriage return and no colour.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from qlora_cli.errors import DeviceMemoryError, DiskError, QloraError

WIDE_ENOUGH_FOR_A_BAR = 100
"""Columns; the figures alone take about 80."""


class Event(Protocol):
    """What a workflow tells; see `workflows/events.py`."""

    def line(self) -> str:
        """One line of text."""

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""


def is_main_process() -> bool:
    """Whether this is the first process of a run."""
    return os.environ.get("RANK", "0") == "0"


class Console:
    """Shows events: as JSON lines on stdout, as one live line on a terminal, or as plain lines on stderr."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self._silent = not is_main_process()
        self._json = as_json
        self._lines = not (as_json or quiet or self._silent)
        self._live = _LiveLine() if self._lines and sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else None

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        value = event.as_json()
        if self._json and not self._silent:
            _print_json(value)
        elif self._lines:
            self._show(event, value)

    def _show(self, event: Event, value: Mapping[str, Any]) -> None:
        is_step = value["event"] == "step"
        if self._live and is_step:
            self._live.update(event.line(), value["step"], value["total"])
        elif not is_step or getattr(event, "logged", True):
            self._above(event.line())

    def _above(self, line: str) -> None:
        if self._live:
            self._live.above(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the live line."""
        if self._live:
            self._live.stop()

    def result(self, text: str, value: Mapping[str, Any]) -> None:
        """The command's result, on stdout."""
        if self._silent:
            return
        if self._json:
            _print_json(value)
        else:
            _to_stdout(f"{text}\n")

    def answer(self, pieces: Iterable[str]) -> None:
        """A streamed answer, on stdout."""
        for piece in pieces:
            _to_stdout(piece)
        _to_stdout("\n")

    def turns(self) -> Iterator[str]:
        """The user's turns from stdin, until its end. The prompt goes to stderr, and only to a terminal."""
        typed = sys.stdin.isatty()
        if typed:
            print("Ctrl-D ends the conversation.", file=sys.stderr)
        while True:
            if typed:
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                if typed:
                    print(file=sys.stderr)
                return
            if line.strip():
                yield line.rstrip("\n")


class _LiveLine:
    """A progress bar with one line of figures, kept at the bottom of a terminal."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = RichConsole(stderr=True, highlight=False)
        bar = [BarColumn(bar_width=16)] if self._console.width >= WIDE_ENOUGH_FOR_A_BAR else []
        columns = (*bar, TextColumn("{task.description}", markup=False))
        self._progress = Progress(*columns, console=self._console)
        self._task: Any = None

    def update(self, line: str, step: int, total: int) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=total)
        self._progress.update(self._task, completed=step, description=line)

    def above(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def stop(self) -> None:
        if self._task is not None:
            self._progress.stop()


def _print_json(value: Mapping[str, Any]) -> None:
    _to_stdout(json.dumps(value, ensure_ascii=False) + "\n")


def _to_stdout(text: str) -> None:
    """Raises `DiskError` when nobody reads there any more, or the file behind it is full."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            sys.stdout.close()  # or Python would fail once more at its exit
        fix = "what was saved stands; read it in its folder"
        raise DiskError(f"cannot write to stdout: {error.strerror}", fix=fix) from error


def show_error(error: QloraError) -> None:
    """All problems of an error on stderr. A mistake is the same in every process, so the first one tells it; memory
    may run out in any, and a file may lack on one machine only."""
    if is_main_process() or os.environ.get("LOCAL_RANK") == "0" or isinstance(error, DeviceMemoryError):
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)


def show_bug(error: BaseException) -> None:
    """A traceback: something that this program should have foreseen."""
    traceback.print_exception(error, file=sys.stderr)
    print("error: this is a bug in qlora; please report it with the lines above", file=sys.stderr, flush=True)


def show_interrupt() -> None:
    """What Ctrl-C leaves."""
    if is_main_process():
        print("interrupted", file=sys.stderr, flush=True)
