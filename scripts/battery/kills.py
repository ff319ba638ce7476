"""Lives of one run are killed at random instants, and the run is resumed until it has finished.

A kill comes from outside after a random time, from outside a random time after a save began, or in the middle of a
rotation or of the end: there the life ends itself by SIGKILL ahead of one of the file operations that follow the rename
to `.trash-*`, or the first step towards the result. What a kill hit is read from what it left on the disk, so that the
shares cannot flatter. Invariant: after each kill every folder under a final name is whole, no checkpoint was lost, and
each run ends with the adapter and the losses of the one that nobody killed.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from battery import common
from battery.common import Failures, Life

TITLE = "random SIGKILL"
AIMS = {"any": 0.25, "save": 0.4, "rotation": 0.25, "result": 0.1}
LEAST = {"save": 0.15, "rotation": 0.10}
"""Share of kills that must have hit a save, and a rotation."""
ROTATION, RESULT = 12, 50
"""File operations: of a rotation, and from the first of the result to the end of a run, about."""


@dataclass
class Tally:
    """What the kills hit so far, and what was wrong after them."""

    rng: random.Random
    wanted: int
    hit: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    runs: int = 0
    lost: int = 0
    broken: int = 0
    failures: Failures = field(default_factory=list)

    @property
    def kills(self) -> int:
        """So far."""
        return sum(self.hit.values())


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """100 kills in full, else 20."""
    tally = Tally(common.draws(seed, "kills"), 100 if full else 20)
    tiny = common.build(work)
    recipe = tiny.recipe(work / "kills.yaml", {"lora.dropout": 0.1, "data.eval_split": 4, "eval.every": 6})
    started = time.monotonic()
    reference = common.finished(recipe, work / "reference", "-q")
    duration = time.monotonic() - started
    while tally.kills < tally.wanted and not tally.failures:
        one_run(tally, recipe, work / f"run-{tally.runs}", reference, duration)
    shares = {name: tally.hit[name] / max(tally.kills, 1) for name in LEAST}
    few = [f"{shares[name]:.0%} of the kills hit a {name}, fewer than {LEAST[name]:.0%}" for name in LEAST]
    tally.failures += [text for name, text in zip(LEAST, few, strict=True) if shares[name] < LEAST[name]]
    figure = (
        f"{tally.kills} kills in {tally.runs} runs: {tally.lost} lost, {tally.broken} invalid, "
        f"{shares['save']:.0%} in a save, {shares['rotation']:.0%} in a rotation"
    )
    return common.result(tally.kills, figure, tally.failures, hit=dict(tally.hit), lives=tally.lives)


def one_run(tally: Tally, recipe: Path, run: Path, reference: Path, duration: float) -> None:
    """Kills a run, and resumes it by its recipe or by its own record, until it ends by itself."""
    tally.runs += 1
    resume: tuple[str, ...] = ()
    while True:
        before = (common.newest(run), len(common.steps(run)), common.leftovers(run))
        by_itself = bool(resume) and (run / "resolved.yaml").exists() and tally.rng.random() < 0.5
        life, strike = begin(tally, run if by_itself else recipe, run, resume, duration)
        strike()
        code = life.wait()
        tally.lives += 1
        if code != -signal.SIGKILL:
            break
        tally.hit[what_was_hit(common.leftovers(run) - before[2])] += 1
        judge(tally, run, before[0], before[1], life)
        if tally.failures:
            return
        resume = ("--resume",)
    if code:
        tally.lost += 1
        tally.failures.append(f"{run.name}: exit {code} after {tally.kills} kills: {life.said()[-500:]}")
    else:
        tally.failures += common.differences(run, reference)
        shutil.rmtree(run)


def begin(
    tally: Tally, recipe: Path, run: Path, resume: tuple[str, ...], duration: float
) -> tuple[Life, Callable[[], None]]:
    """The next life of a run, and what kills it."""
    options = ("-q", *resume)
    if tally.kills >= tally.wanted:
        return common.train(recipe, run, *options), lambda: None
    aim = tally.rng.choices(list(AIMS), list(AIMS.values()))[0]
    if aim == "any":
        seconds = tally.rng.uniform(0, duration)
        life = common.train(recipe, run, *options)
        return life, lambda: kill_after(life, seconds)
    if aim == "rotation":
        before = dies_after("os.rename", "/.trash-step-", tally.rng.randint(1, 3), tally.rng.randint(1, ROTATION))
        return common.train(recipe, run, *options, before=before), lambda: None
    if aim == "result":
        before = dies_after("os.mkdir", "/.tmp-adapter-", 1, tally.rng.randint(1, RESULT))
        return common.train(recipe, run, *options, before=before), lambda: None
    return begin_save(tally.rng, recipe, run, options)


def begin_save(
    rng: random.Random, recipe: Path, run: Path, options: tuple[str, ...]
) -> tuple[Life, Callable[[], None]]:
    """A life that tells when one of its first saves begins, and is killed a random time later."""
    reader, writer = os.pipe()
    saves, seconds = rng.randint(1, 4), rng.uniform(0, 0.015)
    life = common.train(recipe, run, *options, before=common.on_files(tells_of_save(writer, saves)))
    os.close(writer)

    def strike() -> None:
        select.select([reader], [], [], common.PATIENCE)  # readable, too, when the life has ended
        os.close(reader)
        kill_after(life, seconds)

    return life, strike


def kill_after(life: Life, seconds: float) -> None:
    """Kills it, unless it ends before."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and life.poll() is None:
        time.sleep(min(left, 0.005))
    if life.poll() is None:
        life.signal(signal.SIGKILL)


def tells_of_save(writer: int, wanted: int) -> Callable[[str, str], None]:
    """Writes a byte when the save number `wanted` begins."""
    seen = 0

    def tell(event: str, path: str) -> None:
        nonlocal seen
        if event == "os.mkdir" and "/.tmp-step-" in path:
            seen += 1
            if seen == wanted:
                os.write(writer, b"s")

    return tell


def dies_after(event: str, sign: str, wanted: int, operations: int) -> common.Before:
    """Dies ahead of the file operation number `operations` after the `event` number `wanted` on a path with `sign`."""
    seen = done = 0

    def tell(happening: str, path: str) -> None:
        nonlocal seen, done
        if seen == wanted:
            done += 1
            if done == operations:
                os.kill(os.getpid(), signal.SIGKILL)
        elif happening == event and sign in path:
            seen += 1

    return common.on_files(tell)


def what_was_hit(new: set[str]) -> str:
    """From the names that a kill left."""
    if any(name.startswith(".trash-step-") for name in new):
        return "rotation"
    if any(name.startswith(".tmp-step-") for name in new):
        return "save"
    return "result" if any(name.startswith(".tmp-adapter-") for name in new) else "elsewhere"


def judge(tally: Tally, run: Path, newest: int, count: int, life: Life) -> None:
    """After a kill: everything under a final name is whole, and nothing that stood there is lost."""
    wrong = common.invalid(run)
    tally.broken += len(wrong)
    if common.newest(run) < newest or len(common.steps(run)) < min(count, 2):
        tally.lost += 1
        wrong.append(f"{run.name}: step {newest} and {count} checkpoints before, {common.newest(run)} after")
    tally.failures += [f"kill {tally.kills}: {text}; {life.said()[-300:]}" for text in wrong]
