"""Numbers that are not finite, in the middle of a run.

Every row of the data holds a letter that no other has, and a base is poisoned by NaN or infinity in the embedding of
one letter, so that the loss breaks at one row and at the step that draws it. Knows bases and rows. Invariant: the run
ends with 9 before that step's update, names the row as FILE:LINE, and its newest checkpoint is that of the step before
with the values that a run on the sound base had there. `on_nonfinite: skip` passes over as many steps as its budget,
and a resumed run counts those that were passed over before.
"""

from __future__ import annotations

import random
import re
import shutil
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from battery import common
from battery.common import Failures, Tiny

TITLE = "non-finite loss"
NON_FINITE = 9
"""The exit code."""
LETTERS = string.ascii_uppercase[:24]
BATCH = 4
STEPS = len(LETTERS) // BATCH
POISONS = (float("nan"), float("inf"), float("-inf"))
VOCABULARY = 4096
"""Tokens, of which the trial of the fast engine takes few: it would decline where it meets the poison."""
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Bench:
    """The sound base, its runs by the engine they took, and at which step each row is drawn (from 1)."""

    work: Path
    tiny: Tiny
    sound: Mapping[str, Path]
    drawn: Sequence[int]

    def poisoned(self, rows: Sequence[int], poison: float) -> Tiny:
        """The base with the embeddings of these rows' letters poisoned."""
        base = self.work / "poisoned"
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(self.tiny.base, base)
        tensors = load_file(base / "model.safetensors")
        for row in rows:
            tensors[EMBEDDING][token(self.tiny.base, LETTERS[row])] = poison
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        return Tiny(base, self.tiny.rows)

    def recipe(self, tiny: Tiny, **changes: Any) -> Path:
        """A recipe of one epoch, which keeps every checkpoint."""
        return recipe(self.work, tiny, {f"train.{key}": value for key, value in changes.items()})

    def as_sound(self, run: Path, step: int) -> bool:
        """Whether a run had at `step` the values that one on the sound base had, computed in the same way."""
        return step == 0 or weights(run, step) == weights(self.sound[engine(run)], step)


def recipe(work: Path, tiny: Tiny, changes: Mapping[str, Any]) -> Path:
    """Of one epoch, with every checkpoint kept."""
    values = {"train.steps": STEPS, "train.batch_size": BATCH, "save.keep_last": STEPS + 1}
    return tiny.recipe(work / "nonfinite.yaml", {**values, **changes})


def engine(run: Path) -> str:
    """What train.log says of it: the model's own forward, where the poison fell into the trial of the fast one."""
    lines = (run / "train.log").read_text(encoding="utf-8").splitlines()
    return next(line.split(" engine ")[1] for line in lines if " engine " in line)


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """30 rows that stop a run, 6 runs that skip some and 3 that have no budget left, in full; else 3, 1 and 1."""
    rng, bench = common.draws(seed, "nonfinite"), prepare(work)
    stops, skips, spent = (30, 6, 3) if full else (3, 1, 1)
    failures: Failures = []
    for i in range(stops):
        row, poison = rng.randrange(len(LETTERS)), POISONS[i % len(POISONS)]
        failures += [f"{poison} in row {row + 1}: {text}" for text in stopped(bench, row, poison)]
    for i in range(skips):
        rows = rows_of_steps(rng, bench, 2)
        failures += [f"skipping rows {rows}: {text}" for text in skipped(bench, rows, POISONS[i % len(POISONS)])]
    for _ in range(spent):
        rows = rows_of_steps(rng, bench, 2)
        failures += [f"a budget of 1 for rows {rows}: {text}" for text in overspent(bench, rows)]
    figure = (
        f"{stops} stops before the update, {skips} runs that skip, {spent} whose budget ends: {len(failures)} wrong"
    )
    return common.result(stops + skips + spent, figure, failures)


def prepare(work: Path) -> Bench:
    """Head and embedding are not tied: else one poisoned row would break every prediction."""
    from qlora_cli.data.batches import Order

    tiny = common.build(work, tie_word_embeddings=False, vocab_size=VOCABULARY)
    rows = [
        {"messages": [{"role": "user", "content": f"q{letter}"}, {"role": "assistant", "content": "ab"[i % 2]}]}
        for i, letter in enumerate(LETTERS)
    ]
    common.write_jsonl(tiny.rows, rows)
    order = Order(lengths=(1,) * len(LETTERS), batch_size=BATCH, seed=0)
    steps = {row: step + 1 for step in range(STEPS) for row in order.step_rows(step, len(LETTERS))}
    sound = [
        common.finished(recipe(work, tiny, {"model.engine": name}), work / f"sound-{name}", "-q")
        for name in ("auto", "plain")
    ]
    return Bench(work, tiny, {engine(run): run for run in sound}, [steps[row] for row in range(len(LETTERS))])


def token(base: Path, letter: str) -> int:
    """A letter's id."""
    from transformers import PreTrainedTokenizerFast

    return int(PreTrainedTokenizerFast.from_pretrained(base).convert_tokens_to_ids(letter))


def rows_of_steps(rng: random.Random, bench: Bench, count: int) -> list[int]:
    """One row of each of `count` different steps, none of them the last."""
    chosen = sorted(rng.sample(range(1, STEPS), count))
    return [rng.choice([row for row, step in enumerate(bench.drawn) if step == wanted]) for wanted in chosen]


def weights(run: Path, step: int) -> str:
    """SHA-256 of the adapter in a checkpoint."""
    path = run / "checkpoints" / f"step-{step:06d}" / "adapter_model.safetensors"
    return common.sha256(path) if path.exists() else "missing"


def stopped(bench: Bench, row: int, poison: float) -> Failures:
    """One poisoned row, and `on_nonfinite: stop`."""
    run, step = bench.work / "stopped", bench.drawn[row]
    life = common.train(bench.recipe(bench.poisoned([row], poison)), run, "-q")
    wrong = ended(life.wait(), life.said(), bench, row)
    if common.newest(run) != step - 1 or common.last_measured(run) > step:
        wrong.append(f"step {step} was bad; saved is {common.newest(run)}, logged {common.last_measured(run)}")
    if not bench.as_sound(run, step - 1):
        wrong.append(f"the checkpoint of step {step - 1} is not as on the sound base")
    wrong += common.invalid(run) + (["there is a result"] if (run / "adapter").exists() else [])
    shutil.rmtree(run)
    return wrong


def ended(code: int, said: str, bench: Bench, row: int) -> Failures:
    """Unless a run ended with 9, and named step and row."""
    wrong = [] if code == NON_FINITE else [f"exit {code}: {said[-300:]}"]
    named = re.search(rf"{re.escape(bench.tiny.rows.name)}:{row + 1}\b", said)
    step = re.search(rf"\bstep {bench.drawn[row]}\b", said)
    return wrong + ([] if named and step else [f"row {row + 1} or step {bench.drawn[row]} not named: {said[-400:]}"])


def skipped(bench: Bench, rows: Sequence[int], poison: float) -> Failures:
    """Poisoned rows in two steps, which are passed over; and the same, resumed between the two."""
    run, steps = bench.work / "skipped", [bench.drawn[row] for row in rows]
    recipe = bench.recipe(bench.poisoned(rows, poison), on_nonfinite="skip", nonfinite_budget=2)
    life = common.train(recipe, run, "-q")
    if code := life.wait():
        return [f"exit {code}: {life.said()[-300:]}"]
    wrong = common.invalid(run)
    for step in steps:
        if step > 1 and weights(run, step) != weights(run, step - 1):
            wrong.append(f"step {step} was bad, and changed the adapter")
    if not bench.as_sound(run, steps[0] - 1):
        wrong.append(f"step {steps[0] - 1} is not as on the sound base")
    again = common.cut_back(run, steps[0], bench.work / "skipped-again")
    life = common.train(recipe, again, "-q", "--resume")
    wrong += [f"resumed: exit {life.poll()}: {life.said()[-300:]}"] if life.wait() else []
    wrong += [] if common.adapter(again) == common.adapter(run) else ["resumed between the two, it ends otherwise"]
    for folder in (run, again):
        shutil.rmtree(folder)
    return wrong


def overspent(bench: Bench, rows: Sequence[int]) -> Failures:
    """Poisoned rows in two steps and a budget of one: it ends at the second, and again when it is resumed."""
    run = bench.work / "overspent"
    recipe = bench.recipe(bench.poisoned(rows, POISONS[0]), on_nonfinite="skip", nonfinite_budget=1)
    wrong: Failures = []
    for options in ((), ("--resume",)):
        life = common.train(recipe, run, "-q", *options)
        wrong += [f"{' '.join(options)} {text}" for text in ended(life.wait(), life.said(), bench, rows[1])]
        if common.newest(run) != bench.drawn[rows[1]] - 1:
            wrong.append(f"step {bench.drawn[rows[1]]} was bad; saved is {common.newest(run)}")
    shutil.rmtree(run)
    return wrong + common.invalid(run)
