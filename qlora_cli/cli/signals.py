"""Signals that end the program, and that one came.

Knows the operating system's signals. Invariant: a signal that came is known until it is settled, whatever a library's
native code makes of the exception that it raised.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_came: list[int] = []


def end_on_signals() -> None:
    """A request to end, or a terminal that closes, ends the program as Ctrl-C does: with its state written. A signal
    that was already ignored, as under nohup, stays so."""
    _came.clear()
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _end)
        if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, _heard)  # it asks a run for a checkpoint; where there is none, for nothing


def _heard(number: int, _: FrameType | None) -> None:
    """Nothing ends."""


def _end(number: int, _: FrameType | None) -> None:
    _came.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def interruption() -> int | None:
    """The exit code that a signal asked for; None where none came. Ctrl-C counts for less than a request to end."""
    others = [number for number in _came if number != signal.SIGINT]
    return 128 + (others or _came)[0] if _came else None


def settle() -> None:
    """Forgets Ctrl-C, which was dealt with; a request to end that was not heard ends the program now."""
    code = interruption()
    if code not in {None, 128 + signal.SIGINT}:
        raise SystemExit(code)
    _came.clear()
