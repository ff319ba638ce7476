"""Several processes want one run directory at the same time.

Knows processes. All of them are let go at once, each a few random milliseconds late. Invariant: exactly one of them
trains, every other exits with 10, and the run is the one that a process alone would have made.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from battery import common
from battery.common import Before, Failures, Life

TITLE = "races for one directory"
BUSY = 10
"""The exit code."""
LATEST = 0.02
"""Seconds that a process starts late, at most."""


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """50 races of 4 for a new directory and 10 of 2 to resume a run in full, else 2 and 1."""
    rng = common.draws(seed, "races")
    tiny = common.build(work)
    short = tiny.recipe(work / "short.yaml", {"train.steps": 2})
    long = tiny.recipe(work / "long.yaml", {"save.keep_last": 25})
    alone, whole = common.finished(short, work / "alone", "-q"), common.finished(long, work / "whole", "-q")
    new, again = (50, 10) if full else (2, 1)
    failures: Failures = []
    for i in range(new):
        failures += [f"race {i}: {text}" for text in race(rng, short, work / f"new-{i}", alone, ("-q",), 4)]
    for i in range(again):
        run = common.cut_back(whole, 3, work / f"again-{i}")
        failures += [f"resume {i}: {text}" for text in race(rng, long, run, whole, ("-q", "--resume"), 2)]
    figure = f"{new} races of 4 for a new directory, {again} of 2 to resume: {len(failures)} without exactly one winner"
    return common.result(new + again, figure, failures)


def race(
    rng: random.Random, recipe: Path, run: Path, reference: Path, options: tuple[str, ...], runners: int
) -> Failures:
    """What went wrong in one race."""
    reader, writer = os.pipe()
    arguments = ["train", recipe, "-o", run, *options]
    lives = []
    for i in range(runners):
        before = waits(reader, writer, rng.uniform(0, LATEST))
        lives.append(common.start(arguments, run.parent / f"{run.name}-{i}.out", before))
    for end in (reader, writer):
        os.close(end)
    codes = [life.wait() for life in lives]
    wrong = judged(codes, lives, run)
    if codes.count(0) == 1:
        wrong += common.differences(run, reference)
    if not wrong:
        shutil.rmtree(run)
    return wrong


def waits(reader: int, writer: int, late: float) -> Before:
    """Waits until no process holds the writing end any more: all have come as far as this one."""

    def before() -> None:
        os.close(writer)
        os.read(reader, 1)
        time.sleep(late)

    return before


def judged(codes: list[int], lives: list[Life], run: Path) -> Failures:
    """Unless one won, the others were told that the directory is taken, and status.json is the winner's."""
    if Counter(codes) != {0: 1, BUSY: len(codes) - 1}:
        said = " | ".join(life.said()[-200:] for life in lives)
        return [f"exit codes {codes}: {said}"]
    wrong = [
        f"a loser did not name {run}: {life.said()}" for life in lives if life.poll() and str(run) not in life.said()
    ]
    winner = next(life.pid for life in lives if life.poll() == 0)
    owner = json.loads((run / "status.json").read_text(encoding="utf-8"))["pid"]
    return wrong + ([] if owner == winner else [f"process {winner} won, status.json is of {owner}"])
