"""What a workflow tells while it runs: facts, notices, progress.

Knows plain values. Invariant: every event has one line of plain text and one JSON object, so that the terminal, the
log file and `--json` say the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # commands that only tell what they do need no torch, and none of what makes a model speak
    from qlora_cli.training.loop import StepReport
    from qlora_cli.workflows.measuring import Measurement


class Event(Protocol):
    """Something worth telling."""

    def line(self) -> str:
        """One line of plain text."""

    def as_json(self) -> dict[str, Any]:
        """A JSON object with `event`."""


Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Stage:
    """A part of the work that begins and may take a while."""

    text: str

    def line(self) -> str:
        """See `Event`."""
        return f"{self.text} ..."

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        return {"event": "stage", "text": self.text}


@dataclass(frozen=True)
class Fact:
    """A line of the header: what the run works with."""

    label: str
    text: str

    def line(self) -> str:
        """See `Event`."""
        return f"{self.label:<8}{self.text}"

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        return {"event": "fact", "label": self.label, "text": self.text}


@dataclass(frozen=True)
class Notice:
    """Something the user would want to know and did not ask."""

    text: str

    def line(self) -> str:
        """See `Event`."""
        return f"note: {self.text}"

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        return {"event": "notice", "text": self.text}


@dataclass(frozen=True)
class Progress:
    """One step of `total`, with the peak memory so far and the seconds that remain; `logged` every `log.every`."""

    report: StepReport
    total: int
    memory_bytes: int
    eta_seconds: float
    logged: bool

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, without padding."""
        return self.report.tokens / self.report.seconds

    def line(self) -> str:
        """See `Event`."""
        r = self.report
        return (
            f"step {r.step}/{self.total}  loss {r.loss:.4f}  lr {r.lr:.2e}  grad {r.grad_norm:.3f}  "
            f"{self.tokens_per_second:,.0f} tok/s  {size(self.memory_bytes)}  eta {duration(self.eta_seconds)}"
        )

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        numbers = {key: finite(value) for key, value in asdict(self.report).items()}
        return {"event": "step", "total": self.total, "memory_bytes": self.memory_bytes, **numbers}


def finite(value: Any) -> Any:
    """The value; None for a number that is not finite, for which JSON has no word."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Working:
    """`done` of `total` bytes of some work after `seconds`; `logged` about every tenth."""

    what: str
    done: int
    total: int
    seconds: float
    logged: bool

    def line(self) -> str:
        """See `Event`."""
        pace = self.done / self.seconds if self.seconds > 0 else 0.0
        eta = duration((self.total - self.done) / pace) if pace else "?"
        return f"{self.what}  {self.done / self.total:.0%} of {size(self.total)}  {size(pace)}/s  eta {eta}"

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        return {"event": "progress", **asdict(self)}


class Meter:
    """Tells how far a work of `total` bytes has come."""

    def __init__(self, what: str, total: int, emit: Emit) -> None:
        self._what, self._total, self._emit = what, max(1, total), emit
        self._done, self._started = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        """`count` more bytes are done."""
        before, self._done = self._done, self._done + count
        logged = before * 10 // self._total != self._done * 10 // self._total
        self._emit(Working(self._what, self._done, self._total, time.monotonic() - self._started, logged))


@dataclass(frozen=True)
class Evaluated:
    """What was measured on held-out rows after `step` steps."""

    step: int
    found: Measurement
    best: bool

    def line(self) -> str:
        """See `Event`."""
        mark = " (best so far)" if self.best else ""
        return "; ".join([f"eval at step {self.step}: {self.found.result.line()}{mark}", *self.found.lines()])

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        return {"event": "eval", "step": self.step, "best": self.best, **self.found.as_json()}


@dataclass(frozen=True)
class Sampled:
    """What was answered to a prompt of the recipe after `step` steps."""

    step: int
    prompt: str
    answer: str
    ended: str

    def line(self) -> str:
        """See `Event`."""
        return f"sample at step {self.step}: {_short(self.prompt, 40)} > {_short(self.answer, 80)}"

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        return {"event": "sample", **asdict(self)}


def _short(text: str, most: int) -> str:
    """One line of it, in quotes."""
    line = " ".join(text.split())
    return repr(line if len(line) <= most else line[: most - 3] + "...")


@dataclass(frozen=True)
class Saved:
    """Something written, read back and found equal."""

    what: str
    path: Path

    def line(self) -> str:
        """See `Event`."""
        return f"saved and verified: {self.what} in {self.path}"

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        return {"event": "saved", "what": self.what, "path": str(self.path)}


def duration(seconds: float) -> str:
    """`1:05` or `2:03:04`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes as `3.2 GB`, `45.0 MB` or `12 kB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.{2 if unit == 1e9 else 1}f} {name}"
    return f"{count / 1e3:.0f} kB"
