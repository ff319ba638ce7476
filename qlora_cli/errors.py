"""What can go wrong through no fault of this program, and the exit code of each kind.

Every part raises a `QloraError` for a user's mistake or a machine's limit; only `cli/app.py` catches it. None tells a
secret, whatever a library said. A `ValueError` or `TypeError` that reaches the top is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_cli.secrets import redact


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands, what it is, why it matters, and how to mend it."""

    what: str
    why: str = ""
    fix: str = ""
    where: str = ""

    def __post_init__(self) -> None:
        for name in ("what", "why", "fix", "where"):  # text of files and libraries may hold what moves a cursor
            object.__setattr__(self, name, "".join(map(_shown, redact(getattr(self, name)))))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        tail = [f"  {label}: {text}" for label, text in (("why", self.why), ("fix", self.fix)) if text]
        return "\n".join([head, *tail])


def _shown(char: str) -> str:
    return char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode("ascii")


class QloraError(Exception):
    """A problem (or several of one kind) that ends the command with `exit_code`."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "", where: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, why, fix, where),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> QloraError:
        """One error that carries all `problems` (at least one)."""
        first = problems[0]
        error = cls(first.what, first.why, first.fix, first.where)
        error.problems = tuple(problems)
        error.args = ("\n".join(str(problem) for problem in problems),)
        return error


class RecipeError(QloraError):
    """The recipe, or an override of it, is wrong."""

    exit_code = 3


class DataError(QloraError):
    """Rows that cannot be read, or that leave nothing to train on."""

    exit_code = 4


class ModelError(QloraError):
    """A model, adapter or checkpoint that is missing, corrupt, unsafe or does not fit."""

    exit_code = 5


class MachineError(QloraError):
    """The machine or its surroundings lack something: a device, a library, a login, the network."""

    exit_code = 6


class DeviceMemoryError(QloraError):
    """The device's memory did not suffice."""

    exit_code = 7


class DiskError(QloraError):
    """A file could not be written."""

    exit_code = 8


class NonFiniteError(QloraError):
    """A loss, gradient or logit that is not a finite number; no weight was updated with it."""

    exit_code = 9


class RunDirectoryError(QloraError):
    """The run directory is in use or already holds something."""

    exit_code = 10
