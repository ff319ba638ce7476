"""`qlora show`: what a run directory says of its run.

Knows the files of a run directory, whole, half-written or damaged. Invariant: it only reads, so that
it disturbs no run; what cannot be read is said, and the rest is shown.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.files import MANIFEST, bytes_below, is_folder, manifest_problems
from qlora_cli.workflows.curve import Point
from qlora_cli.workflows.events import finite
from qlora_cli.workflows.run_files import Values, number, plain, read_lines, state_of, status_of, whole
from qlora_cli.workflows.rundir import RESOLVED, STATUS

METRICS, RESUMES, CHECKPOINTS = "metrics.jsonl", "resumes.jsonl", "checkpoints"
RESULTS = ("adapter", "model")


@dataclass(frozen=True)
class Kept:
    """A checkpoint, or the result: its folder, size, and what is wrong with it (empty when nothing is)."""

    path: Path
    step: int | None
    bytes: int
    problem: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {"path": str(self.path), "bytes": self.bytes, "valid": not self.problem, "problem": self.problem}
        return values if self.step is None else {"step": self.step, **values}


@dataclass(frozen=True)
class Series:
    """A loss over the steps, in the order of metrics.jsonl."""

    points: tuple[Point, ...]

    @property
    def last(self) -> Point | None:
        """The newest."""
        return self.points[-1] if self.points else None

    @property
    def best(self) -> Point | None:
        """The lowest that is a number."""
        numbers = [point for point in self.points if math.isfinite(point[1])]
        return min(numbers, key=lambda point: point[1], default=None)

    def as_json(self) -> dict[str, Any]:
        """The two of them; null for what is not there or not finite."""
        ends = (("last", self.last), ("best", self.best))
        return {name: {"step": at[0], "loss": finite(at[1])} if at else None for name, at in ends}


@dataclass(frozen=True)
class ShowResult:
    """What is known of a run at the moment `seen`. `state` is that of status.json, or `died` where that says at work
    and nothing is, or `unknown`; `away` is the other machine on which it was at work, if any. `recorded`: its directory
    says what the run is, so that it can go on by that alone."""

    run: Path
    state: str
    away: str
    status: Values
    training: Series
    held_out: Series
    latest: Values
    checkpoints: tuple[Kept, ...]
    result: Kept | None
    resumes: tuple[Values, ...]
    problems: tuple[str, ...]
    recorded: bool
    seen: float

    @property
    def step(self) -> int:
        """The last step that is known to be done; status.json and metrics.jsonl are not written at once."""
        steps = [point[0] for point in (*self.training.points, *self.held_out.points)]
        return max([self.status.get("step", 0), *steps])

    @property
    def total(self) -> int | None:
        """All steps of the run."""
        total = self.status.get("total_steps", whole(self.latest.get("total")))
        return total or None

    @property
    def resumable(self) -> Kept | None:
        """The newest valid checkpoint."""
        return next((each for each in reversed(self.checkpoints) if not each.problem), None)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        known = ("reason", "pid", "host", "started", "updated")
        return {
            "event": "result",
            "run": str(self.run),
            "state": self.state,
            "step": self.step,
            "total_steps": self.total,
            **{name: self.status.get(name) for name in known},
            "training": self.training.as_json(),
            "held_out": self.held_out.as_json(),
            "checkpoints": [each.as_json() for each in self.checkpoints],
            "result": self.result.as_json() if self.result else None,
            "resumes": list(self.resumes),
            "resumable_from": self.resumable.step if self.resumable else None,
            "problems": list(self.problems),
        }


def run_show(run: Path) -> ShowResult:
    """What `run` holds. Raises `ModelError` for what is no run directory."""
    _check_is_run(run)
    problems: list[str] = []
    status = status_of(run / STATUS, problems)
    state, away = state_of(run, status)
    lines = list(read_lines(run / METRICS, problems))
    steps = [line for line in lines if line.get("kind") == "step"]
    return ShowResult(
        run=run,
        state=state,
        away=away,
        status=status,
        training=_series(steps),
        held_out=_series([line for line in lines if line.get("kind") == "eval"]),
        latest=steps[-1] if steps else {},
        checkpoints=_checkpoints(run / CHECKPOINTS, problems),
        result=_result(run),
        resumes=tuple(plain(line) for line in read_lines(run / RESUMES, problems)),
        problems=tuple(problems),
        recorded=all((run / name).is_file() for name in (STATUS, RESOLVED)),
        seen=time.time(),
    )


def _check_is_run(run: Path) -> None:
    if not is_folder(run):
        raise ModelError(f"{str(run)[:80]}: no such folder", fix="name a run directory, such as out/NAME")
    if not _is_run(run):
        above = next((folder for folder in run.absolute().parents if _is_run(folder)), None)
        raise ModelError(
            f"{run} is no run directory",
            why=f"it has neither {STATUS} nor {METRICS} nor {RESOLVED}",
            fix=f"name the run that it is a part of: qlora show {above}" if above else "name what `qlora train` wrote",
        )


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (STATUS, METRICS, RESOLVED))


def _series(lines: list[dict[str, Any]]) -> Series:
    """The lines with a step and a loss; one that is not finite is a loss, too."""
    found = [(whole(line.get("step")), line.get("loss")) for line in lines]
    losses = [(step, loss if isinstance(loss, float) else number(loss)) for step, loss in found]
    return Series(tuple((step, float(loss)) for step, loss in losses if step is not None and loss is not None))


def _checkpoints(folder: Path, problems: list[str]) -> tuple[Kept, ...]:
    """Those that stand when all were looked at: a run at work may remove one meanwhile."""
    from qlora_cli.training.checkpoint import BROKEN, checkpoints

    try:
        found = [Kept(each.path, each.step, bytes_below(each.path), each.problem) for each in checkpoints(folder)]
        aside = [path.name for path in folder.glob(f"step-*{BROKEN}*")] if folder.is_dir() else []
    except OSError as error:
        problems.append(f"{CHECKPOINTS} cannot be read: {error}")
        return ()
    if aside:
        problems.append(f"{CHECKPOINTS}: set aside as broken: {', '.join(sorted(aside))}")
    return tuple(each for each in found if each.path.exists())


def _result(run: Path) -> Kept | None:
    folder = next((run / name for name in RESULTS if is_folder(run / name)), None)
    if folder is None:
        return None
    missing = [] if (folder / MANIFEST).is_file() else [f"{MANIFEST} is missing"]
    return Kept(folder, None, bytes_below(folder), "; ".join([*missing, *manifest_problems(folder)]))
