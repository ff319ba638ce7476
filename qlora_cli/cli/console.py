"""The only file that prints.

Knows streams and events. Invariant: stdout carries results (or with `--json` events) and nothing else; processes other
than the first print nothing; without a terminal there is no carriage return and no colour; no secret is shown, but
where a model says one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TextIO

from qlora_cli.errors import DataError, DeviceMemoryError, DiskError, QloraError
from qlora_cli.secrets import redact, redacted

WIDE_ENOUGH_FOR_A_BAR = 100
"""Columns; the figures alone take about 80."""
NARROWEST_COLUMN = 28
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | dict.fromkeys(
    range(127, 160), 0x2421
)


class StdoutError(DiskError):
    """Nobody reads stdout any more, or the file behind it is full."""


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
        advance = {"step": "step", "progress": "done"}.get(value["event"])
        if self._live and advance:
            self._live.update(redact(event.line()), value[advance], value["total"])
        elif not advance or getattr(event, "logged", True):
            self._above(redact(event.line()))

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
            _to_stdout(f"{text if _is_said(value) else redact(text)}\n")

    def answer(self, pieces: Iterable[str], told: Callable[[], Event | None] = lambda: None) -> None:
        """A streamed answer, on stdout; with `--json` what `told` has of it when it is there."""
        said = False
        try:
            for piece in pieces:
                if not self._json:
                    _to_stdout(_harmless(piece, sys.stdout))
                said = True
        except BaseException:
            if said and not self._json:
                _to_stdout("\n")
            raise
        event = told()
        if not self._json:
            _to_stdout("\n")
        elif event is not None:
            _print_json(event.as_json())

    @property
    def typed(self) -> bool:
        """Whether a person types at stdin, and reads what is not JSON."""
        return _stdin().isatty() and not self._json

    def turns(self) -> Iterator[str]:
        """The user's turns from stdin, one per line, until its end."""
        with _stdin_errors():
            while line := _stdin().readline():
                if line.strip():
                    yield line.rstrip("\n")

    def everything(self) -> str:
        """All of stdin, without its last line break."""
        with _stdin_errors():
            return _stdin().read().removesuffix("\n")

    def ask(self, prompt: str) -> str | None:
        """What is typed next: lines that end in a backslash go on. Empty where Ctrl-C cleared it; None at the end."""
        try:
            lines = [_typed_line(prompt)]
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(_typed_line(". "))
        except EOFError:
            self.hint("")
            return None
        except KeyboardInterrupt:
            self.hint("")
            return ""
        except UnicodeDecodeError:
            self.hint("error: that was not UTF-8")
            return ""
        return "\n".join(lines)

    def hint(self, text: str) -> None:
        """An answer of the program rather than of a model, on stderr."""
        print(_harmless(redact(text), sys.stderr), file=sys.stderr, flush=True)

    def status(self, text: str) -> None:
        """Figures beside an answer, dim where the terminal can, on stderr."""
        if self._lines:
            dim = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
            shown = redact(text)
            print(f"\x1b[2m{shown}\x1b[0m" if dim else shown, file=sys.stderr, flush=True)

    def problem(self, error: Exception) -> None:
        """An error after which the command goes on."""
        if isinstance(error, QloraError):
            show_error(error)
        else:
            show_bug(error)

    def side_by_side(self, texts: Mapping[str, str]) -> None:
        """Texts under their names, on stdout: in columns where those are wide enough, else one after the other."""
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        console = RichConsole(file=sys.stdout, highlight=False)
        shown = {name: _harmless(text, sys.stdout) for name, text in texts.items()}
        if console.width < NARROWEST_COLUMN * len(shown):
            _to_stdout("\n".join(f"--- {name}\n{text}" for name, text in shown.items()) + "\n")
            return
        table = Table(expand=True)
        for name in shown:
            table.add_column(Text(name), ratio=1, overflow="fold")
        table.add_row(*map(Text, shown.values()))
        with console.capture() as shown_table:
            console.print(table)
        _to_stdout(shown_table.get())


def _typed_line(prompt: str) -> str:
    """A line from the terminal, edited with readline where it was imported; the prompt is no result, so it goes to
    stderr where stdout is a file."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _stdin() -> TextIO:
    """Nothing can be read where stdin is closed."""
    return sys.stdin or io.StringIO()


@contextlib.contextmanager
def _stdin_errors() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not UTF-8: {error.reason}", fix="convert it, e.g. with iconv") from error
    except OSError as error:
        raise DataError(
            f"stdin cannot be read: {error.strerror}", fix="pipe turns in, or give --prompt TEXT"
        ) from error


def _harmless(text: str, stream: TextIO) -> str:
    """On a terminal, control characters, which could move the cursor or do worse, as pictures of themselves."""
    return text.translate(PICTURES) if stream.isatty() else text


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
        self._progress.update(self._task, completed=step, total=total, description=line)

    def above(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def stop(self) -> None:
        if self._task is not None:
            self._progress.stop()


def _is_said(value: Mapping[str, Any]) -> bool:
    """Whether it is what a model said, which is given as it said it: streamed or not, whatever it looks like."""
    return bool(value.get("event") == "answer")


def _print_json(value: Mapping[str, Any]) -> None:
    _to_stdout(json.dumps(value if _is_said(value) else redacted(value), ensure_ascii=False) + "\n")


def _to_stdout(text: str) -> None:
    """Raises `StdoutError` when nobody reads there any more, or the file behind it is full."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            sys.stdout.close()  # or Python would fail once more at its exit
        fix = "what was saved stands; read it in its folder"
        raise StdoutError(f"cannot write to stdout: {error.strerror}", fix=fix) from error


def show_error(error: QloraError) -> None:
    """All problems of an error on stderr. A mistake is the same in every process, so the first one tells it; memory
    may run out in any, and a file may lack on one machine only."""
    if is_main_process() or os.environ.get("LOCAL_RANK") == "0" or isinstance(error, DeviceMemoryError):
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)


def show_bug(error: BaseException) -> None:
    """A traceback: something that this program should have foreseen."""
    print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print("error: this is a bug in qlora; please report it with the lines above", file=sys.stderr, flush=True)


def show_interrupt() -> None:
    """What Ctrl-C leaves."""
    if is_main_process():
        print("interrupted", file=sys.stderr, flush=True)
