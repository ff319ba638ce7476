"""Lives of one run are killed at random instants, and the run is resumed until it has finished.

A kill comes from outside after a random time, or a random time after a save began; or the life ends itself by SIGKILL
ahead of a random one of the file operations of a save, of a rotation, or of the result. What a kill hit is read from
what it left on the disk, so that the shares cannot flatter. Invariant: after each kill every folder under a final name
is whole, no checkpoint was lost, and each run ends with the adapter and the losses of the one that nobody killed.
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
AIMS = (*["any"] * 4, *["save"] * 4, *["saving"] * 5, *["rotation"] * 5, *["result"] * 2)
"""Of 20 kills: after a random time, some time after a save began, ahead of a file operation of a save, a rotation, or
the result."""
MISSES = 6
"""Runs that end before what was aimed at comes: by then it never does."""
LEAST = {"save": 0.15, "rotation": 0.10}
"""Share of kills that must have hit a save, and a rotation."""
OPERATIONS = {
    "saving": ("os.mkdir", "/.tmp-step-", 45),
    "rotation": ("os.rename", "/.trash-step-", 12),
    "result": ("os.mkdir", "/.tmp-adapter-", 50),
}
"""With which file operation each begins, and how many follow, at least; with the result up to the end of the run."""


@dataclass
class Tally:
    """What the kills hit so far, and what was wrong after them."""

    rng: random.Random
    wanted: int
    hit: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    runs: int = 0
    lost: int = 0
    missed: int = 0
    deck: list[str] = field(default_factory=list)
    broken: int = 0
    failures: Failures = field(default_factory=list)

    @property
    def kills(self) -> int:
        """So far."""
        return sum(self.hit.values())

    def aim(self) -> str:
        """Of the next kill; the same until it has hit."""
        while len(self.deck) <= self.kills:
            self.deck += self.rng.sample(AIMS, len(AIMS))
        return self.deck[self.kills]


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """100 kills in full, else 20."""
    tally = Tally(common.draws(seed, "kills"), 100 if full else 20)
    tiny = common.build(work)
    changes = {"train.steps": 24 if full else 12, "lora.dropout": 0.1, "data.eval_split": 4, "eval.every": 6}
    recipe = tiny.recipe(work / "kills.yaml", changes)
    reference = common.finished(recipe, work / "reference", "-q")  # which compiles and keeps what later ones find
    started = time.monotonic()
    tally.failures += common.differences(common.finished(recipe, work / "again", "-q"), reference)
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
        tally.missed = 0
        tally.hit[what_was_hit(common.leftovers(run) - before[2])] += 1
        judge(tally, run, before[0], before[1], life)
        if tally.failures:
            return
        resume = ("--resume",)
    if code:
        tally.lost += 1
        tally.failures.append(f"{run.name}: exit {code} after {tally.kills} kills: {life.said()[-500:]}")
    else:
        tally.missed += 1
        tally.failures += common.differences(run, reference)
        tally.failures += [f"{tally.aim()}: nothing of that to hit in {MISSES} runs"] if tally.missed == MISSES else []
        shutil.rmtree(run)


def begin(
    tally: Tally, recipe: Path, run: Path, resume: tuple[str, ...], duration: float
) -> tuple[Life, Callable[[], None]]:
    """The next life of a run, and what kills it."""
    options = ("-q", *resume)
    if tally.kills >= tally.wanted:
        return common.train(recipe, run, *options), lambda: None
    aim = tally.aim()
    if aim == "any":
        seconds = tally.rng.uniform(0, duration)
        life = common.train(recipe, run, *options)
        return life, lambda: kill_after(life, seconds)
    if aim in OPERATIONS:
        return common.train(recipe, run, *options, before=dies_in(aim, tally.rng)), lambda: None
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
    seen = set[str]()

    def tell(event: str, path: str) -> None:
        if event == "os.mkdir" and "/.tmp-step-" in path and path not in seen:
            seen.add(path)
            if len(seen) == wanted:
                os.write(writer, b"s")

    return tell


def dies_in(aim: str, rng: random.Random) -> common.Before:
    """Dies ahead of a random file operation of one of the first saves or rotations, or of the result."""
    begin, sign, most = OPERATIONS[aim]
    return common.on_files(dies_after(begin, sign, 1 if aim == "result" else rng.randint(1, 3), rng.randint(1, most)))


def dies_after(begin: str, sign: str, wanted: int, operations: int) -> Callable[[str, str], None]:
    """Dies ahead of the operation number `operations` after the `begin` of the path number `wanted` that has `sign`."""
    seen = set[str]()
    done = 0

    def tell(event: str, path: str) -> None:
        nonlocal done
        if len(seen) == wanted:
            done += 1
            if done == operations:
                os.kill(os.getpid(), signal.SIGKILL)
        elif event == begin and sign in path:
            seen.add(path)

    return tell


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
