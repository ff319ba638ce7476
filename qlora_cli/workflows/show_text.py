"""What `qlora show` says in words: state, figures, curve, checkpoints, and what can be done next.

Knows what was found; nothing of files or terminals. Invariant: a command that is named is one that fits the state.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator

from qlora_cli.workflows.curve import curve
from qlora_cli.workflows.events import duration, size
from qlora_cli.workflows.run_files import AT_WORK, DIED, UNKNOWN, Values, number
from qlora_cli.workflows.show import Kept, Series, ShowResult
from qlora_cli.workflows.tables import table

SHOWN_RESUMES = 5


def show_text(found: ShowResult, width: int) -> str:
    """Paragraphs; the curve is at most `width` columns wide."""
    parts = [
        _head(found),
        _figures(found),
        curve(found.training.points, found.held_out.points, width),
        _kept(found),
        _resumes(found.resumes, found.seen),
        [f"note: {problem}" for problem in found.problems],
        _next(found),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _head(found: ShowResult) -> list[str]:
    status, seen = found.status, found.seen
    lines = [f"{found.run}: {_state(found)}", f"step      {_progress(found)}"]
    lines += [f"{name:<8}  {_moment(status[name], seen)}" for name in ("started", "updated") if name in status]
    if status.get("reason"):
        lines.append("reason    " + status["reason"].replace("\n", "\n          "))
    return lines


def _state(found: ShowResult) -> str:
    host, pid = found.status.get("host", "?"), found.status.get("pid", "?")
    if found.state == DIED:
        why = f"status.json says {found.status['state']}, but process {pid} does not work there"
        return f"died without saying so, last step {found.step} ({why})"
    if found.away:
        return f"{found.state} on {found.away}, process {pid}; whether it still works there cannot be seen from here"
    if found.state in AT_WORK:
        return f"{found.state} on {host}, process {pid}"
    return "in which state cannot be told" if found.state == UNKNOWN else found.state


def _progress(found: ShowResult) -> str:
    if found.total is None:
        return str(found.step)
    share = f"{found.step} of {found.total} ({found.step / found.total:.0%})"
    seconds = number(found.latest.get("seconds"))
    if found.state != "running" or found.away or seconds is None or found.total <= found.step:
        return share
    return f"{share}, about {duration(seconds * (found.total - found.step))} to go"


def _moment(when: float, seen: float) -> str:
    """Local time, and how long ago."""
    try:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
    except (OverflowError, ValueError, OSError):  # no such time
        return f"{when:g}"
    return f"{at}, {duration(seen - when)} ago" if seen >= when else at


def _figures(found: ShowResult) -> list[str]:
    series = (("training loss", found.training), ("held-out loss", found.held_out))
    lines = [line for name, each in series for line in _losses(name, each)]
    latest, rate = found.latest, number(found.latest.get("lr"))
    tokens, seconds = number(latest.get("tokens")), number(latest.get("seconds"))
    last = [] if rate is None else [f"learning rate {rate:.2e}"]
    last += [f"{tokens / seconds:,.0f} tok/s"] if tokens and seconds else []
    return [*lines, f"last step      {', '.join(last)}"] if last else lines


def _losses(name: str, series: Series) -> Iterator[str]:
    last, best = series.last, series.best
    if last is not None:
        lowest = f", lowest {best[1]:.4f} at step {best[0]}" if best else ""
        yield f"{name}  {last[1]:.4f} at step {last[0]}{lowest}"


def _kept(found: ShowResult) -> list[str]:
    each = [*found.checkpoints, *([found.result] if found.result else [])]
    rows = [[_name(found, kept), size(kept.bytes)] for kept in each]
    if not rows:
        return ["no checkpoint yet" if found.state in AT_WORK else "no checkpoint"]
    lines = zip(table(rows).splitlines(), each, strict=True)
    return [f"{line}  {f'broken: {kept.problem}' if kept.problem else 'valid'}" for line, kept in lines]


def _name(found: ShowResult, kept: Kept) -> str:
    return f"{kept.path.relative_to(found.run).as_posix()}/"


def _resumes(resumes: tuple[Values, ...], seen: float) -> list[str]:
    """The last of them: from which step, when, and which keys were otherwise than before."""
    if not resumes:
        return []
    times = "once" if len(resumes) == 1 else f"{len(resumes)} times"
    return [f"resumed {times}", *(f"  {_resume(each, seen)}" for each in resumes[-SHOWN_RESUMES:])]


def _resume(resume: Values, seen: float) -> str:
    when, changes = number(resume.get("time")), resume.get("changes")
    keys = [str(each.get("key")) for each in changes if isinstance(each, dict)] if isinstance(changes, list) else []
    moment = [_moment(when, seen)] if when is not None else []
    return ", ".join(
        [f"after step {resume.get('step')}", *moment, *([f"with another {', '.join(keys)}"] if keys else [])]
    )


def _next(found: ShowResult) -> list[str]:
    """What can be done now."""
    run, pid = shlex.quote(str(found.run)), found.status.get("pid")
    if found.state in AT_WORK and not found.away:
        return [f"to save a checkpoint now: kill -USR1 {pid}", f"to stop after saving one: kill -TERM {pid}"]
    if found.state == "finished" and found.result is not None and not found.result.problem:
        return [f"to talk to it: qlora chat {run}"]
    lines = ["the result is missing or broken"] if found.state == "finished" else []
    lines += [f"once it has stopped on {found.away}:"] if found.away else []
    return [*lines, _again(found, run) if found.recorded else _without_record(found, run)]


def _again(found: ShowResult, run: str) -> str:
    """How a run goes on that ended early."""
    resume, at = f"qlora train {run} --resume", found.resumable
    if at is not None:
        aim = "write it again from" if found.state == "finished" else "go on after"
        return f"to {aim} step {at.step}: {resume}"
    if found.checkpoints:
        return f"no checkpoint is whole: train again, with another -o than {run}"
    return f"no checkpoint: to begin again: {resume}"


def _without_record(found: ShowResult, run: str) -> str:
    """What is left of a run whose directory does not say what it is."""
    at = found.resumable
    if at is not None:
        return f"to talk to checkpoint {at.step}: qlora chat --adapter {shlex.quote(str(at.path))}"
    if found.state == UNKNOWN:
        return f"nothing to go on with: train again, with another -o than {run}"
    return f"to begin again: qlora train RECIPE -o {run} --resume"
