"""Signals at random instants: while a run loads, trains or writes its result, and a second one after the first.

Knows signals and exit codes. A run has no other processes (there are no data loader workers here), so its process group
is sent to as a terminal does, and holds it alone. Invariant: the exit code says which signal it was, no more than one
step is lost, and the run, resumed, ends as the one that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from battery import common
from battery.common import Before, Failures, Life

TITLE = "signals at random instants"
STEPS = 30
CADENCE = 5
"""Of the runs that a second signal ends, which need an earlier checkpoint to fall back on."""
DEAF = 60.0
"""Seconds after which a run that goes on in spite of a signal is taken not to have heard it."""
AT_ONCE = 1.0
"""Seconds in which a second signal ends a run; that one may leave the exit code to the system, for which a shell says
128 and the signal's number, too."""
RESULT = 40
"""File operations with which a result is written, at least."""
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@dataclass
class Bench:
    """What every case needs. `loading` is how long a run takes to its first step, in seconds."""

    work: Path
    rng: random.Random
    recipe: Path
    often: Path
    large: Path
    reference: Path
    loading: float
    slowest: float = 0.0
    most_lost: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def run(self) -> Path:
        """A new run directory."""
        return self.work / f"run-{sum(self.counts.values())}"


Kind = tuple[str, signal.Signals, bool]
KINDS: list[Kind] = [
    ("training", signal.SIGINT, False),
    ("training", signal.SIGTERM, True),
    ("asking", signal.SIGUSR1, False),
    ("twice", signal.SIGINT, True),
    ("loading", signal.SIGTERM, False),
    ("loading", signal.SIGINT, True),
    ("ending", signal.SIGTERM, False),
    ("training", signal.SIGINT, True),
    ("training", signal.SIGTERM, False),
    ("twice", signal.SIGTERM, False),
    ("training", signal.SIGHUP, False),
    ("ending", signal.SIGINT, False),
]


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """60 signals in full, else 7."""
    bench = prepare(work, seed)
    failures: Failures = []
    kinds = [KINDS[i % len(KINDS)] for i in range(60 if full else 7)]
    for kind in kinds:
        name, number, group = kind
        wrong = CASES[name](bench, number, group)
        where = f"{name}, {number.name} to the {'group' if group else 'process'}"
        failures += [f"{where}: {text}" for text in wrong]
        bench.counts[name] = bench.counts.get(name, 0) + 1
    figure = (
        f"{len(kinds)} signals ({', '.join(f'{count} {name}' for name, count in bench.counts.items())}): "
        f"{len(failures)} wrong, at most {bench.most_lost} steps lost, a second one ended it in {bench.slowest:.2f} s"
    )
    return common.result(len(kinds), figure, failures)


def prepare(work: Path, seed: int) -> Bench:
    """Recipes, and the run that nobody disturbed."""
    tiny, many = common.build(work), common.build(work / "many", count=3000)
    changes: dict[str, Any] = {"train.steps": STEPS, "save.every": None, "lora.dropout": 0.1}
    changes |= {"data.eval_split": 4, "eval.every": 3, "eval.keep_best": True}
    recipe = tiny.recipe(work / "seldom.yaml", changes)
    often = tiny.recipe(work / "often.yaml", {**changes, "save.every": CADENCE})
    large = many.recipe(work / "large.yaml", {**changes, "train.steps": 100 * STEPS})
    reference = common.finished(recipe, work / "reference", "-q")
    started = time.monotonic()
    life = common.train(large, work / "timed", "-q")
    reach(life, work / "timed", 1)
    loading = time.monotonic() - started
    ended(life)
    return Bench(work, common.draws(seed, "signals"), recipe, often, large, reference, loading)


def reach(life: Life, run: Path, step: int) -> None:
    """Waits until a run has logged a step."""
    end = time.monotonic() + common.PATIENCE
    while common.last_measured(run) < step and life.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def at_random(bench: Bench, recipe: Path, run: Path, before: Before | None = None) -> tuple[Life, int]:
    """A life at a random instant of its training, and the last step that it had logged shortly before."""
    life = common.train(recipe, run, "-q", before=before)
    reach(life, run, bench.rng.randint(1, STEPS - 15))
    time.sleep(bench.rng.uniform(0, 0.03))
    return life, common.last_measured(run)


def training(bench: Bench, number: signal.Signals, group: bool) -> Failures:
    """It finishes the step, saves, and exits with the signal's code."""
    run = bench.run()
    life, before = at_random(bench, bench.recipe, run)
    life.signal(number, group)
    code, wrong = life.wait(), list[str]()
    if code != CODES[number]:
        wrong.append(f"exit {code}: {life.said()[-300:]}")
    lost = common.last_measured(run) - common.newest(run)
    bench.most_lost = max(bench.most_lost, lost)
    if lost > 1 or common.newest(run) < before:
        wrong.append(f"step {before} logged at the signal, {common.last_measured(run)} in the end, {lost} not saved")
    wrong += [f"left {name}" for name in common.leftovers(run)]
    return wrong + state_is(run, "interrupted") + common.invalid(run) + resumed(bench, bench.recipe, run)


def state_is(run: Path, wanted: str) -> Failures:
    """Unless status.json says so."""
    state = json.loads((run / "status.json").read_text(encoding="utf-8"))["state"]
    return [] if state == wanted else [f"status.json says {state}"]


def resumed(bench: Bench, recipe: Path, run: Path, *options: str) -> Failures:
    """How the run ends when it is gone on with."""
    life = common.train(recipe, run, "-q", *(options or ("--resume",)))
    if code := life.wait():
        return [f"exit {code} of the resumed run: {life.said()[-300:]}"]
    wrong = common.differences(run, bench.reference)
    if not wrong:
        shutil.rmtree(run)
    return wrong


def asking(bench: Bench, number: signal.Signals, group: bool) -> Failures:
    """A checkpoint appears, and the run goes on to its end."""
    run = bench.run()
    life, before = at_random(bench, bench.recipe, run)
    life.signal(number, group)
    if code := life.wait():
        return [f"exit {code}: {life.said()[-300:]}"]
    saved = [common.step_of(folder) for folder in common.steps(run)]
    wrong = [] if any(before <= step <= before + 3 for step in saved) else [f"asked at {before}, saved at {saved}"]
    return wrong + common.differences(run, bench.reference)


def drags_on(sent: Path) -> Callable[[str, str], None]:
    """Makes a save slow, as a bad disk would, once the file `sent` is there."""

    def tell(event: str, path: str) -> None:
        if event == "os.mkdir" and "/.tmp-step-" in path and sent.exists():
            time.sleep(3 * AT_ONCE)

    return tell


def twice(bench: Bench, number: signal.Signals, group: bool) -> Failures:
    """While the first one's save drags on, the second ends it within a second, and what stands is whole."""
    run = bench.run()
    sent = run.with_suffix(".sent")
    life, before = at_random(bench, bench.often, run, common.on_files(drags_on(sent)))
    sent.touch()
    life.signal(number, group)
    time.sleep(bench.rng.uniform(0, 0.5))
    started = time.monotonic()
    if life.poll() is None:
        life.signal(number, group)
    code = life.wait()
    seconds = time.monotonic() - started
    bench.slowest = max(bench.slowest, seconds)
    wrong = [] if code in (CODES[number], -number) else [f"exit {code}: {life.said()[-300:]}"]
    if seconds > AT_ONCE:
        wrong.append(f"it took {seconds:.2f} s")
    if common.newest(run) < (before - 1) // CADENCE * CADENCE:
        wrong.append(f"step {before} was logged, the newest checkpoint is {common.newest(run)}")
    wrong += common.invalid(run)
    return wrong + resumed(bench, bench.often, run, *(("--resume",) if common.last_measured(run) else ()))


def ending(bench: Bench, number: signal.Signals, group: bool) -> Failures:
    """It ends at one of the file operations with which the result is written; unless it was there, it is made again."""
    run, operations = bench.run(), bench.rng.randint(1, RESULT)
    life = common.train(bench.often, run, "-q", before=common.on_files(sends_at_result(number, operations)))
    code = life.wait()
    wrong = [] if code == CODES[number] else [f"exit {code}: {life.said()[-300:]}"]
    wrong += [f"left {name}" for name in common.leftovers(run)] + state_is(run, "interrupted") + common.invalid(run)
    return wrong + resumed(bench, bench.often, run)


def sends_at_result(number: signal.Signals, operations: int) -> Callable[[str, str], None]:
    """Sends its process a signal ahead of a file operation, counted from the first of the result."""
    done = 0

    def tell(event: str, path: str) -> None:
        nonlocal done
        if done or (event == "os.mkdir" and "/.tmp-adapter-" in path):
            done += 1
            if done == operations:
                os.kill(os.getpid(), number)

    return tell


def loading(bench: Bench, number: signal.Signals, group: bool) -> Failures:
    """It ends while it reads its recipe, its rows or its base, with nothing under a final name that is not whole."""
    run = bench.run()
    reader, writer = os.pipe()
    life = common.train(bench.large, run, "-q", before=common.on_files(tells_of_open(writer, bench.large)))
    os.close(writer)
    select.select([reader], [], [], common.PATIENCE)
    os.close(reader)
    time.sleep(bench.rng.uniform(0, bench.loading))
    life.signal(number, group)
    code = life.wait(DEAF)
    wrong = [] if code == CODES[number] else [f"exit {code}: {life.said()[-300:]}"]
    if common.last_measured(run):
        return wrong + common.invalid(run)  # it had begun to train
    wrong += [f"{path.name} was written" for path in (run / "adapter", *common.steps(run)) if path.exists()]
    wrong += [f"left {name}" for name in common.leftovers(run)] + unreadable(run)
    again = common.train(bench.large, run, "-q")
    reach(again, run, 1)
    return wrong + ([f"a new start ended: {again.said()[-300:]}"] if ended(again) else [])


def ended(life: Life) -> bool:
    """Whether a life that is no longer needed had ended by itself; else it is killed."""
    if life.poll() is None:
        life.signal(signal.SIGKILL)
        return life.wait() != -signal.SIGKILL
    return True


def tells_of_open(writer: int, wanted: Path) -> Callable[[str, str], None]:
    """Writes a byte when the program opens a file, after which it has its handlers in place."""

    def tell(event: str, path: str) -> None:
        if event == "open" and path == str(wanted):
            os.write(writer, b"s")

    return tell


def unreadable(run: Path) -> Failures:
    """JSON files of a run that are none."""
    return [f"{path.name} is not whole" for path in run.glob("*.json") if not is_json(path)]


def is_json(path: Path) -> bool:
    """Whether a file holds a JSON value."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


CASES: dict[str, Callable[[Bench, signal.Signals, bool], Failures]] = {
    "training": training,
    "asking": asking,
    "twice": twice,
    "loading": loading,
    "ending": ending,
}
