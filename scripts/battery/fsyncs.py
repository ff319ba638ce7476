"""In which order a save reaches the disk, as the kernel saw it.

`strace` follows a short run; where there is none, or it may not trace, the calls are recorded by wrapping `os.fsync`
in the run's own process, beside Python's audit events. Knows system calls. Invariant: each file of a checkpoint is
synced and not written to afterwards, then its folder, then comes the rename, then the parent is synced, and only then
is an older checkpoint renamed for its deletion.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from battery import common
from battery.common import Before, Failures

TITLE = "order of fsync and rename"
CALLS = "write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,renameat,renameat2"
STEPS, KEPT = 4, 2
_ON_FILE = re.compile(r"(?:write|pwrite64|writev|ftruncate|fsync|fdatasync)\(\d+<([^>]*)>")
_RENAME = re.compile(r'rename(?:at2?)?\((?:[^"]*)"([^"]*)",[^"]*"([^"]*)"')


@dataclass(frozen=True)
class Call:
    """What reached the kernel: `write`, `fsync` or `rename`, of which path, and where to."""

    kind: str
    path: str
    target: str = ""


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """A run of 4 steps, each saved."""
    recipe = common.build(work).recipe(work / "fsyncs.yaml", {"train.steps": STEPS})
    target = work / "run"
    calls, how = traced(recipe, target, work), "strace"
    if calls is None:
        calls, how = recorded(recipe, target, work), "os.fsync and os.rename as recorded in the process, without strace"
    targets = [f"checkpoints/step-{step:06d}" for step in range(1, STEPS + 1)] + ["adapter"]
    failures = [text for name in targets for text in out_of_order(calls, target / name)]
    failures += hasty_rotations(calls)
    syncs = sum(call.kind == "fsync" for call in calls)
    figure = f"{len(targets)} folders in order, {syncs} fsyncs ({how}): {len(failures)} wrong"
    return common.result(len(targets), figure, failures, how=how)


def traced(recipe: Path, run: Path, work: Path) -> list[Call] | None:
    """The calls as strace saw them; None where there is no strace that may trace."""
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-f", "true"], capture_output=True, check=False).returncode:
        return None
    log = work / "trace.txt"
    command = [sys.executable, "-m", "qlora_cli", "train", str(recipe), "-o", str(run), "-q"]
    tracing = [strace, "-f", "--seccomp-bpf", "-y", "-s", "0", "-e", f"trace={CALLS}", "-e", "signal=none"]
    done = subprocess.run(
        [*tracing, "-o", str(log), *command], cwd=common.ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr[-2000:]}")
    return [call for line in log.read_text(encoding="utf-8", errors="replace").splitlines() for call in parsed(line)]


def parsed(line: str) -> list[Call]:
    """The call of a line of the trace, unless it failed."""
    if " = -1 " in line:
        return []
    if match := _RENAME.search(line):
        return [Call("rename", *match.groups())]
    match = _ON_FILE.search(line)
    return [Call("fsync" if "sync(" in line else "write", match.group(1))] if match else []


def recorded(recipe: Path, run: Path, work: Path) -> list[Call]:
    """The calls as the process itself made them: no writes, for those are not Python's own."""
    log = work / "trace.txt"
    life = common.train(recipe, run, "-q", before=recording(log))
    if code := life.wait():
        raise RuntimeError(f"exit {code}: {life.said()[-2000:]}")
    return [Call(*line.split("\t")) for line in log.read_text(encoding="utf-8").splitlines()]


def recording(log: Path) -> Before:
    """Writes down each fsync and rename of this process."""

    def install() -> None:
        file = log.open("w", encoding="utf-8")
        sync = os.fsync

        def fsync(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            sync(number)
            print("fsync", Path(f"/proc/self/fd/{number}").readlink(), sep="\t", file=file, flush=True)

        def hook(event: str, values: tuple[Any, ...]) -> None:
            if event == "os.rename":
                print("rename", os.fsdecode(values[0]), os.fsdecode(values[1]), sep="\t", file=file, flush=True)

        vars(os)["fsync"] = fsync  # in the life's own process
        sys.addaudithook(hook)

    return install


def out_of_order(calls: Sequence[Call], final: Path) -> Failures:
    """What is wrong with the way in which a folder came to its final name."""
    at = next((i for i, call in enumerate(calls) if call.kind == "rename" and call.target == str(final)), None)
    if at is None:
        return [f"{final.name} was never renamed to its name"]
    staging = calls[at].path
    synced, written = last_touched(calls[:at])
    files = {path for path in (*synced, *written) if path.startswith(f"{staging}/")}
    wrong = [] if len(files) > 3 else [f"only {sorted(files)} in {final.name}"]
    late = [path for path in sorted(files) if synced.get(path, -1) < written.get(path, 0)]
    wrong += [f"{final.name}/{Path(path).name} was not synced after it was written" for path in late]
    if synced.get(staging, -1) < max((synced.get(path, -1) for path in files), default=at):
        wrong.append(f"the folder of {final.name} was not synced after its files")
    after = [call for call in calls[at + 1 :] if call.kind == "rename" or call == Call("fsync", str(final.parent))]
    if not after or after[0].kind == "rename":
        wrong.append(f"the parent of {final.name} was not synced right after the rename")
    here = {path.name for path in final.iterdir()} if final.is_dir() else set[str]()
    return wrong + [f"{final.name}/{name} was never synced" for name in sorted(here - {Path(p).name for p in synced})]


def last_touched(calls: Sequence[Call]) -> tuple[dict[str, int], dict[str, int]]:
    """(where each path was synced last, where it was written last), by the name that it has in the end."""
    synced, written = dict[str, int](), dict[str, int]()
    for place, call in enumerate(calls):
        if call.kind == "rename":
            for found in (synced, written):
                found.pop(call.target, None)
                found.update({call.target: found.pop(call.path)} if call.path in found else {})
        else:
            (synced if call.kind == "fsync" else written)[call.path] = place
    return synced, written


def hasty_rotations(calls: Sequence[Call]) -> Failures:
    """Checkpoints that were renamed for deletion before enough newer ones stood, their parent synced."""
    wrong, trashed, named, safe = list[str](), 0, 0, 0
    for call in calls:
        if call.kind == "rename" and "/.trash-" in call.target:
            trashed += 1
            wrong += (
                [] if safe - trashed >= KEPT else [f"{Path(call.path).name} was given up before a newer one was safe"]
            )
        elif call.kind == "rename" and Path(call.target).name.startswith("step-"):
            named += 1
        elif call.kind == "fsync" and call.path.endswith("/checkpoints"):
            safe = named
    return wrong + ([] if trashed == STEPS - KEPT else [f"{trashed} checkpoints were given up, not {STEPS - KEPT}"])
