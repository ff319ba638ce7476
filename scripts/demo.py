"""Shows a 4-bit model learn, on any machine: a tiny base, a training run, answers before and after.

Everything goes into out/. Invariant: it succeeds only when the base answers at most 10% of the held-out prompts and
the tuned model at least 90%; an earlier run is moved aside, never overwritten.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE, DATA, RUN = Path("out/tiny-base"), Path("out/tiny-data"), Path("out/tiny-demo")
RECIPE = "recipes/tiny-demo.yaml"
MOST_BEFORE, LEAST_AFTER = 0.10, 0.90
SHOWN, MAX_TOKENS = 3, 64


@dataclass(frozen=True)
class Answers:
    """Held-out prompts, what should be answered, and what was, before and after."""

    prompts: list[str]
    wanted: list[str]
    before: list[str]
    after: list[str]

    def matches(self, given: list[str]) -> float:
        """Share of answers that are exactly the wanted text."""
        return sum(a == b for a, b in zip(given, self.wanted, strict=True)) / len(self.wanted)


def step(title: str, *command: str) -> None:
    """Runs one command as a user would, under a heading; its failure ends the demo with its exit code."""
    print(f"\n== {title}\n$ {' '.join(command)}", flush=True)
    programs = {"python": [sys.executable], "qlora": [sys.executable, "-m", "qlora_cli"]}
    done = subprocess.run([*programs[command[0]], *command[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def move_aside(run: Path) -> None:
    """Renames an earlier run to the first free `NAME.N`."""
    if not run.exists():
        return
    number = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.{n}").exists())
    aside = run.with_name(f"{run.name}.{number}")
    run.rename(aside)
    print(f"the earlier run is now {aside}")


def compare() -> Answers:
    """Greedy answers of base and tuned model to every held-out prompt."""
    from qlora_cli.workflows.chat import open_talk
    from qlora_cli.workflows.quiet import quiet_libraries

    quiet_libraries()
    rows = [json.loads(line)["messages"] for line in (DATA / "heldout.jsonl").read_text("utf-8").splitlines()]
    prompts, wanted = [row[0]["content"] for row in rows], [row[1]["content"] for row in rows]
    before = open_talk(str(BASE), None, lambda event: None).answer_all(prompts, MAX_TOKENS)
    after = open_talk(str(RUN), None, lambda event: None).answer_all(prompts, MAX_TOKENS)
    return Answers(prompts, wanted, before, after)


def show(answers: Answers) -> None:
    """Some answers side by side, and the exact matches of all."""
    for i in range(SHOWN):
        print(f"\nprompt  {answers.prompts[i]}\nbase    {answers.before[i]}\ntuned   {answers.after[i]}")
    count = len(answers.wanted)
    before, after = answers.matches(answers.before), answers.matches(answers.after)
    print(f"\nexact match on {count} held-out prompts: base {before:.1%}, tuned {after:.1%}")


def main() -> int:
    """The whole demo; 0 when the tuned model can do what the base could not."""
    started = time.monotonic()
    step("a tiny base model", "python", "scripts/make_tiny_base.py", "--out", str(BASE))
    step("rows that teach it something new", "python", "scripts/tiny_corpus.py", "--out", str(DATA))
    move_aside(RUN)
    step("training", "qlora", "train", RECIPE)
    print("\n== base and tuned model on prompts that neither has seen", flush=True)
    answers = compare()
    show(answers)
    if answers.matches(answers.before) > MOST_BEFORE or answers.matches(answers.after) < LEAST_AFTER:
        print(f"the demo failed: wanted at most {MOST_BEFORE:.0%} before and at least {LEAST_AFTER:.0%} after")
        return 1
    print(f"done in {time.monotonic() - started:.0f} s. Talk to it: .venv/bin/qlora chat --adapter {RUN}")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
