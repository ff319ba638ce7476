"""Disks that are full, that may not be written to, or on which no file may grow.

A full disk is a tmpfs in a user namespace of its own: either small from the start, or filled at the very moment at
which a save (or the final result) begins, with so many bytes left. Knows mounts and limits of a process. Invariant:
whatever could not be written, the run exits with 8, what stood before stands unchanged, nothing half-written is left,
and with space again the run ends as the one that had it all along.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from battery import common
from battery.common import Before, Failures

TITLE = "full and read-only disks, limits"
FULL = 8
"""The exit code."""
STEPS = 10
ROOMY = 64 << 20
PAGE = 4096
_NEW_USER, _NEW_NAMESPACE, _READ_ONLY, _REMOUNT, _PRIVATE = 0x10000000, 0x00020000, 1, 32, (1 << 18) | (1 << 14)


@dataclass(frozen=True)
class Bench:
    """What every case needs; `place` is where a tmpfs goes."""

    work: Path
    recipe: Path
    whole: Path
    reference: Path

    @property
    def place(self) -> Path:
        """Of a tmpfs."""
        return self.work / "place"

    def start(self, run: Path, *more: str, before: Before | None = None) -> tuple[int, str]:
        """(exit code, what it said), which is kept outside of the full disk."""
        life = common.start(["train", self.recipe, "-o", run, "-q", *more], self.work / "said.out", before)
        return life.wait(), life.said()


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """20 sizes, 3 ways to be read-only and 6 limits in full, else 4, 1 and 2."""
    bench = prepare(work)
    failures: Failures = []
    told, count = [], 0
    if mounts(work):
        cases = full_disks(bench, full)
        for name, case in cases + read_only_disks(bench, full):
            failures += [f"{name}: {text}" for text in apart(case, work / "report.json")]
            count += 1
        told.append(f"{len(cases)} sizes of a full disk, {count - len(cases)} read-only ones")
    else:
        told.append("full and read-only disks not measured: this system allows no mount in a user namespace")
    for limit in limits(bench.whole, full):
        failures += [f"files of at most {limit} bytes: {text}" for text in limited(bench, limit)]
        count += 1
    told.append(f"{len(limits(bench.whole, full))} file-size limits: {len(failures)} wrong")
    return common.result(count, ", ".join(told), failures)


def prepare(work: Path) -> Bench:
    """The run that had space; `whole` keeps all of its checkpoints."""
    tiny = common.build(work)
    recipe = tiny.recipe(work / "disk.yaml", {"train.steps": STEPS})
    every = tiny.recipe(work / "every.yaml", {"train.steps": STEPS, "save.keep_last": STEPS + 1})
    reference, whole = common.finished(recipe, work / "reference", "-q"), common.finished(every, work / "whole", "-q")
    (work / "place").mkdir()
    return Bench(work, recipe, whole, reference)


def blocks(folder: Path) -> int:
    """Bytes that a folder's files take on a disk with blocks of one page."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


def full_disks(bench: Bench, full: bool) -> list[tuple[str, Callable[[], Failures]]]:
    """Half of them small from the start, half filled while the run writes."""
    count = 10 if full else 2
    most = blocks(bench.reference)
    checkpoint, result = blocks(common.steps(bench.reference)[-1]), blocks(bench.reference / "adapter")
    cases: list[tuple[str, Callable[[], Failures]]] = []
    for i in range(count):
        size = int(most * (0.2 + 1.0 * i / count))
        cases.append((f"a disk of {size} bytes", partial(small, bench, size)))
    for i in range(count):
        last = i % 5 == 4
        sign = "/.tmp-adapter-" if last else f"/.tmp-step-{2 + i % 5:06d}-"
        left = int((result if last else checkpoint) * 0.9 * i / count)
        name = f"{left} bytes left at {sign}"
        cases.append((name, partial(filled, bench, sign, left)))
    return cases


def read_only_disks(bench: Bench, full: bool) -> list[tuple[str, Callable[[], Failures]]]:
    """Before the first start, before a resume, and before one of a run that only lacks its result."""
    cases: list[tuple[str, Callable[[], Failures]]] = [("read-only", partial(read_only, bench, "/.tmp-step-000004-"))]
    if full:
        cases.append(("read-only before the result", partial(read_only, bench, "/.tmp-adapter-")))
        cases.append(("read-only from the start", partial(read_only, bench, "")))
    return cases


def limits(whole: Path, full: bool) -> list[int]:
    """Sizes that no file may pass; the last ones stop only the largest files of a checkpoint."""
    last = common.steps(whole)[-1]
    sizes = sorted(path.stat().st_size for path in last.iterdir())
    return [1, 512, PAGE, *(size - 1 for size in sizes[-3:])] if full else [512, sizes[-1] - 1]


def small(bench: Bench, size: int) -> Failures:
    """A run on a disk that may be too small for it."""
    mount(bench.place, size)
    run = bench.place / "run"
    code, said = bench.start(run)
    if code == 0:
        return common.differences(run, bench.reference)
    return refused(code, said, run) + ([f"{run.name}/adapter exists"] if (run / "adapter").exists() else [])


def refused(code: int, said: str, run: Path) -> Failures:
    """Unless it ended with the exit code, the place and one error, and left nothing behind that is not whole."""
    wrong = [] if code == FULL else [f"exit {code}: {said[-400:]}"]
    errors = said.count("\nerror: ") + said.startswith("error: ")
    if code == FULL and (errors != 1 or str(run) not in said or "Traceback" in said):
        wrong.append(f"it said {said[-400:]}")
    return wrong + [f"left {name}" for name in common.leftovers(run)] + common.invalid(run)


def filled(bench: Bench, sign: str, left: int) -> Failures:
    """A disk that is filled when a folder whose name holds `sign` is about to be made."""
    mount(bench.place, ROOMY)
    run, ballast = bench.place / "run", bench.place / "ballast"
    before: list[dict[str, str]] = []

    def tell(event: str, path: str) -> None:
        if event == "os.mkdir" and sign in path and not ballast.exists():
            fill(ballast, left)
            (bench.work / "stood.json").write_text(json.dumps(hashes(run)), encoding="utf-8")

    code, said = bench.start(run, before=common.on_files(tell))
    before.append(json.loads((bench.work / "stood.json").read_text(encoding="utf-8")))
    wrong = refused(code, said, run)
    if hashes(run) != before[0]:
        wrong.append(f"other checkpoints than before: {sorted(hashes(run))} instead of {sorted(before[0])}")
    ballast.unlink()
    return wrong + goes_on(bench, run)


def fill(ballast: Path, left: int) -> None:
    """Takes all of a disk but `left` bytes."""
    state = os.statvfs(ballast.parent)
    size = state.f_bavail * state.f_frsize - left // PAGE * PAGE
    with ballast.open("wb") as file:
        if size > 0:
            os.posix_fallocate(file.fileno(), 0, size)


def hashes(run: Path) -> dict[str, str]:
    """SHA-256 of every file of every checkpoint."""
    return {
        f"{folder.name}/{path.name}": common.sha256(path) for folder in common.steps(run) for path in folder.iterdir()
    }


def goes_on(bench: Bench, run: Path) -> Failures:
    """How the run, resumed with space, differs from the one that had it all along."""
    code, said = bench.start(run, "--resume")
    return common.differences(run, bench.reference) if code == 0 else [f"exit {code} of the resume: {said[-400:]}"]


def read_only(bench: Bench, sign: str) -> Failures:
    """A run that is killed when a folder whose name holds `sign` is about to be made, and its disk made read-only."""
    mount(bench.place, ROOMY)
    run = bench.place / "run"
    options: tuple[str, ...] = ()
    if sign:
        code, said = bench.start(run, before=common.on_files(dies_at(sign)))
        if code != -signal.SIGKILL:
            return [f"exit {code} instead of its death: {said[-300:]}"]
        options = ("--resume",)
    before = everything(run)
    mount(bench.place, ROOMY, _REMOUNT | _READ_ONLY)
    code, said = bench.start(run, *options)
    wrong = [] if code == FULL else [f"exit {code}: {said[-400:]}"]
    if everything(run) != before:
        wrong.append("something changed")
    mount(bench.place, ROOMY, _REMOUNT)
    return wrong + (goes_on(bench, run) if sign else [])


def dies_at(sign: str) -> Callable[[str, str], None]:
    """Dies when a folder whose name holds `sign` is about to be made."""

    def tell(event: str, path: str) -> None:
        if event == "os.mkdir" and sign in path:
            os.kill(os.getpid(), signal.SIGKILL)

    return tell


def everything(run: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {str(path.relative_to(run)): common.sha256(path) for path in sorted(run.rglob("*")) if path.is_file()}


def limited(bench: Bench, limit: int) -> Failures:
    """A resumed run whose files may not pass a size (RLIMIT_FSIZE). What it says goes to a device, which has none."""
    run = common.cut_back(bench.whole, 4, bench.work / "limited")
    before = hashes(run)
    arguments = ["train", bench.recipe, "-o", run, "-q", "--resume"]
    life = common.start(arguments, Path(os.devnull), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    code = life.wait()
    wrong = [] if code == FULL else [f"exit {code}"]
    wrong += [f"left {name}" for name in common.leftovers(run)] + common.invalid(run)
    if before != hashes(run):
        wrong.append("other checkpoints than before")
    wrong += goes_on(bench, run)
    shutil.rmtree(run)
    return wrong


def mounts(work: Path) -> bool:
    """Whether a process may mount a tmpfs in a user namespace of its own."""
    place = work / "trial"
    place.mkdir()

    def trial() -> Failures:
        mount(place, ROOMY)
        return []

    return apart(trial, work / "trial.json") == []


def apart(case: Callable[[], Failures], report: Path) -> Failures:
    """What `case` returns, in a process with a user and mount namespace of its own."""

    def live() -> int:
        own_namespace()
        report.write_text(json.dumps(case()), encoding="utf-8")
        return 0

    report.unlink(missing_ok=True)
    code = common.Life(common.fork(live), report).wait(5 * common.PATIENCE)
    return json.loads(report.read_text(encoding="utf-8")) if report.exists() else [f"the case failed with {code}"]


def own_namespace() -> None:
    """In which this process is root, and whose mounts nobody else sees."""
    user, group = os.geteuid(), os.getegid()
    check(ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER | _NEW_NAMESPACE))
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")
    check(ctypes.CDLL(None, use_errno=True).mount(None, b"/", None, _PRIVATE, None))


def mount(place: Path, size: int, flags: int = 0) -> None:
    """Mounts a tmpfs, or mounts it again with other flags."""
    options = f"size={size}".encode()
    check(ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", bytes(place), b"tmpfs", flags, options))


def check(returned: int) -> None:
    """Raises what the system said."""
    if returned:
        number = ctypes.get_errno()
        print(f"not allowed here: {os.strerror(number)}", file=sys.stderr)
        raise OSError(number, os.strerror(number))
