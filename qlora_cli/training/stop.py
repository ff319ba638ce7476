"""Signals while a run trains: end it after the step it is in, or save it and go on.

Knows the operating system's signals. Invariant: the first request to end loses no step, and the second ends the
process at once, whatever it is computing: by then the system's own handler is back.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
SAVING = "SIGUSR1"


class StopNowError(Exception):
    """Raised in a part of the work that need not be finished."""


class Stop:
    """What was asked for by a signal while the block ran. A signal that was ignored before, as under nohup, stays so.

    `tell` is called from the handler, so that a user knows at once that the request was heard.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.asked: int | None = None
        """The signal that asked for the end."""
        self.save = False
        """Whether a checkpoint was asked for; whoever writes it sets this back."""
        self._tell = tell
        self._impatient = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in (*ENDING, SAVING):
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._save if name == SAVING else self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Within this block a request to end raises `StopNowError` at once; one that came before does too."""
        self._impatient = True
        try:
            if self.asked is not None:
                raise StopNowError
            yield
        finally:
            self._impatient = False

    def _end(self, number: int, _: FrameType | None) -> None:
        self.asked = number
        for name in ENDING:
            if getattr(signal, name, None) in self._before:
                signal.signal(getattr(signal, name), signal.SIG_DFL)
        self._say(f"{signal.Signals(number).name}: ending after this step; once more to end without saving")
        if self._impatient:
            raise StopNowError

    def _save(self, number: int, _: FrameType | None) -> None:
        self.save = True
        self._say(f"{signal.Signals(number).name}: saving a checkpoint after this step")

    def _say(self, text: str) -> None:
        with suppress(RuntimeError, OSError):  # the signal came in the middle of another line
            self._tell(text)
