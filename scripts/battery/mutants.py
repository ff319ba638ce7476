"""Negative controls: each safeguard is taken out of a copy of the program, and a test must notice.

Knows the source text and the tests. Invariant: a mutant counts as caught only if the same test passes without it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TITLE = "safeguards taken out, each noticed by a test"
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300
"""Seconds for the test of one mutant."""


@dataclass(frozen=True)
class Mutant:
    """A change of the program's text, and the test (of those in `tests/`) that notices it."""

    name: str
    file: str
    old: str
    new: str
    test: str


RESUME = "workflows/test_resume.py::"
CHECKPOINT = "training/test_checkpoint.py::"
ANY_STEP = RESUME + "test_a_run_resumed_at_any_step_ends_as_the_one_that_never_stopped"
ORDER = CHECKPOINT + "test_every_file_is_on_the_disk_before_the_name_is_given_and_the_name_before_an_old_one_goes"

MUTANTS = (
    Mutant(
        "random generators are not put back",
        "training/state.py",
        '    torch.set_rng_state(tensors["torch"])\n',
        "",
        "training/test_state.py::test_every_generator_goes_on_where_it_was",
    ),
    Mutant(
        "the optimizer is not put back",
        "workflows/resume.py",
        "        restore_optimizer(job.optimizer, trained.named(), self.state.optimizer)\n",
        "",
        f"{ANY_STEP}[packed, dropout]",
    ),
    Mutant(
        "the trained values are not put back",
        "workflows/resume.py",
        "        trained.load(self.checkpoint.path)\n",
        "",
        f"{ANY_STEP}[packed, dropout]",
    ),
    Mutant(
        "the position is forgotten",
        "workflows/resume.py",
        "            done=standing.step,\n",
        "",
        f"{ANY_STEP}[padded, 8-bit]",
    ),
    Mutant(
        "the learning rate jumps when steps are raised",
        "workflows/resume.py",
        "            raised=self.raised,\n",
        "",
        RESUME + "test_more_steps_on_the_way_let_the_rate_fall_on_from_where_it_is",
    ),
    Mutant(
        "the learning rate is that of a run of the new length",
        "workflows/resume.py",
        "            first_total=self.first_total,\n",
        "",
        RESUME + "test_more_steps_on_the_way_let_the_rate_fall_on_from_where_it_is",
    ),
    Mutant(
        "the values of the best evaluation are lost",
        "workflows/standing.py",
        '                kept=_measured(values["kept"]),\n',
        "",
        f"{ANY_STEP}[best kept]",
    ),
    Mutant(
        "patience begins anew",
        "workflows/standing.py",
        'Best(patience, loss, int(said["step"]), int(said["waited"]))',
        'Best(patience, loss, int(said["step"]), 0)',
        f"{ANY_STEP}[patience]",
    ),
    Mutant(
        "metrics.jsonl is not cut back",
        "training/metrics.py",
        "if _step_of(line) <= step))",
        "if line))",
        f"{ANY_STEP}[packed, dropout]",
    ),
    Mutant(
        "an evaluation that a signal broke off is not made up for",
        "workflows/standing.py",
        'pending=bool(values["pending"])',
        "pending=False",
        RESUME + "test_a_signal_in_an_evaluation_leaves_it_to_the_run_that_goes_on",
    ),
    Mutant(
        "what differs is not compared",
        "workflows/changes.py",
        "    if not refused:\n",
        "    if True:\n",
        RESUME + "test_what_differs_is_listed_and_refused_and_nothing_changes",
    ),
    Mutant(
        "files are synced after the name is given",
        "files.py",
        "        _sync_tree(staging)\n",
        "",
        ORDER,
    ),
    Mutant(
        "the parent folder is not synced",
        "files.py",
        "        _sync_folder(final.parent)\n",
        "",
        ORDER,
    ),
    Mutant(
        "a checkpoint is written under its final name",
        "files.py",
        'Path(tempfile.mkdtemp(prefix=f".tmp-{final.name}-", dir=final.parent))',
        "final; staging.mkdir(exist_ok=True)",
        ORDER,
    ),
    Mutant(
        "old checkpoints go before the new one stands",
        "training/checkpoint.py",
        "        self._set_aside(final)\n        trained.save",
        "        shutil.rmtree(self._good[0])\n        self._set_aside(final)\n        trained.save",
        CHECKPOINT + "test_a_checkpoint_that_fails_leaves_the_others_and_nothing_else",
    ),
    Mutant(
        "checkpoints are deleted in place",
        "training/checkpoint.py",
        "                old.rename(trash)\n                shutil.rmtree(trash)\n",
        "                shutil.rmtree(old)\n",
        ORDER,
    ),
    Mutant(
        "a checkpoint is not compared with its manifest",
        "training/checkpoint.py",
        "*manifest_problems(folder)]",
        "*[]]",
        CHECKPOINT + "test_a_flipped_bit_a_cut_and_a_missing_file_are_named",
    ),
    Mutant(
        "a checkpoint without manifest counts",
        "training/checkpoint.py",
        '        return f"{MANIFEST} is missing"\n',
        '        return ""\n',
        CHECKPOINT + "test_without_its_manifest_a_checkpoint_is_none",
    ),
    Mutant(
        "broken checkpoints count among those kept",
        "training/checkpoint.py",
        "        valid = [each for each in found if not each.problem]\n",
        "        valid = found\n",
        CHECKPOINT + "test_a_broken_one_is_passed_over_counts_for_nothing_and_stays",
    ),
    Mutant(
        "optimizer states that do not fit are let through",
        "training/state.py",
        "    return sorted(problems)\n",
        "    return []\n",
        "training/test_state.py::test_a_state_that_does_not_fit_is_named_and_nothing_is_put_back",
    ),
    Mutant(
        "the lock locks nothing",
        "workflows/runlock.py",
        "    except BlockingIOError:\n        return False\n    return True\n",
        "    except BlockingIOError:\n        return True\n    return True\n",
        "workflows/test_rundir.py::test_only_one_at_a_time_has_a_directory_and_the_other_is_told_who",
    ),
    Mutant(
        "a step that is not finite updates the weights",
        "training/loop.py",
        "        finite = math.isfinite(loss) and math.isfinite(norm)\n",
        "        finite = True\n",
        "training/test_loop.py::test_a_gradient_that_is_not_finite_stops_the_run_before_any_update_and_names_the_rows",
    ),
    Mutant(
        "a second signal waits too",
        "training/stop.py",
        "                signal.signal(getattr(signal, name), signal.SIG_DFL)\n",
        "                pass\n",
        "training/test_stop.py::test_the_second_request_ends_a_process_that_hears_nothing",
    ),
    Mutant(
        "a secret is written to the log",
        "secrets.py",
        "def redact(text: str) -> str:\n",
        "def redact(text: str) -> str:\n    return text\n\n\ndef _unused(text: str) -> str:\n",
        "test_secrets.py",
    ),
)


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """Every mutant (two of them unless `full`); see the other checks for what is returned."""
    chosen = MUTANTS if full else tuple(random.Random(seed).sample(MUTANTS, 2))
    sound = {test: passes(work / "sound", [test]) for test in dict.fromkeys(each.test for each in chosen)}
    failures = [f"{test} fails without any mutant" for test, passed in sound.items() if not passed]
    caught = [each for each in chosen if sound[each.test] and not passes(work / "mutant", [each.test], each)]
    failures += [f"not noticed: {each.name}" for each in chosen if each not in caught and sound[each.test]]
    figure = f"{len(caught)} of {len(chosen)} safeguards: a test notices when they are taken out"
    return {"count": len(chosen), "passed": not failures, "figure": figure, "failures": failures}


def passes(place: Path, tests: Sequence[str], mutant: Mutant | None = None) -> bool:
    """Whether the tests pass in a copy of the program, changed by `mutant`. Raises `ValueError` where the text that it
    changes does not stand there exactly once."""
    shutil.rmtree(place, ignore_errors=True)
    for name in ("qlora_cli", "tests", "scripts", "docs", "recipes"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, place / name)
    if mutant is not None:
        file = place / "qlora_cli" / mutant.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.file} holds {text.count(mutant.old)} times what {mutant.name!r} changes")
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in tests]
    process = subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a mutant may leave processes that nobody ends
    if process.returncode not in {0, 1}:
        raise ValueError(f"{tests} could not be run: {said[-1000:]}")
    return process.returncode == 0
