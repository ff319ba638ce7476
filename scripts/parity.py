"""The QLoRA paper's claims, tested on the demo's base: storages, ranks, targets, at two lengths, over several seeds.

    python scripts/parity.py [--seeds N] [--work DIR] [--docs DIR] [--sweep | --report | --smoke]

Writes DOCS/parity.md and DOCS/parity.png. Results are appended to WORK/results.jsonl; a second start runs only what is
missing there. `--smoke` does a little of everything on a random base. Invariant: a learning rate is what the sweep
found best, and the sweep has its own seed and its own rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [path for path in (str(HERE), str(ROOT)) if path not in sys.path]

import tiny_corpus  # noqa: E402
from parity_study import work  # noqa: E402
from parity_study.design import (  # noqa: E402
    ATTENTION,
    DOUBLE,
    FULL,
    LENGTHS,
    LINEAR,
    RATES,
    SIXTEEN,
    Configuration,
    Run,
    Study,
    configurations,
)
from parity_study.document import Findings, document  # noqa: E402
from parity_study.picture import plot  # noqa: E402
from parity_study.results import Rates, Results, best_rates, key, study_runs, sweep_runs, tabulate  # noqa: E402

SEEDS, WORKERS = 8, 2
SWEEP_ROWS_SEED = 1
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def full_study(folder: Path, seeds: int) -> Study:
    """The study as the document tells it."""
    return Study(folder, folder / "base", tuple(configurations()), tuple(range(seeds)), RATES, LENGTHS)


def smoke_study(folder: Path) -> Study:
    """A little of everything."""
    chosen = tuple(Configuration(DOUBLE, LINEAR, rank) for rank in (4, 16))
    rates = {LINEAR: (2e-3, 4e-3), ATTENTION: (2e-3,), FULL: (6e-4,)}
    return Study(folder, folder / "base", chosen, (0, 1), rates, lengths=(2, 4), train=64, heldout=4, chats=8)


def write_rows(study: Study) -> None:
    """train.jsonl, heldout.jsonl, and sweep.jsonl: other held-out rows."""
    train = tiny_corpus.instruction_rows(0, study.train)
    held_out = tiny_corpus.instruction_rows(0, study.heldout, held_out=True)
    tiny_corpus.assert_disjoint(train, held_out)
    others = tiny_corpus.instruction_rows(SWEEP_ROWS_SEED, study.heldout, held_out=True)
    for name, rows in {"train": train, "heldout": held_out, "sweep": others}.items():
        tiny_corpus.write_atomically(study.work / f"{name}.jsonl", [without_town(row) for row in rows])


def without_town(row: tiny_corpus.Row) -> tiny_corpus.Row:
    """The row with a record of name, age and job."""
    asked, answered = row["messages"]
    record = json.loads(answered["content"])
    del record["city"]
    return {"messages": [asked, {**answered, "content": json.dumps(record)}]}


def write_base(study: Study, smoke: bool) -> None:
    """The shipped base; for the smoke run one with two layers of random weights."""
    import make_tiny_base as base

    if not smoke:
        base.install_shipped(study.base)
        return
    chats = list(tiny_corpus.pretraining_chats(0, 200))
    plan = replace(base.Plan(), hidden=128, layers=2, vocab=320)
    tokenizer = base.build_tokenizer(chats, plan.vocab)
    base.save(base.build_model(plan, len(tokenizer)), tokenizer, study.base)


def pool(study: Study, workers: int) -> ProcessPoolExecutor:
    """Processes of one thread each, which share a cache of their own."""
    os.environ.update(dict.fromkeys(THREADS, "1"))
    os.environ.update({"QLORA_CACHE": str(study.work / "cache"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=work.end_with_parent)


def measure(study: Study, runs: Sequence[Run], results: Results, processes: ProcessPoolExecutor) -> None:
    """Does what is missing. Each result is written as soon as it is there."""
    missing, started = results.missing(runs), time.monotonic()
    waiting: dict[Future[dict[str, Any]], Run] = {
        processes.submit(work.train_and_ask, study, run): run for run in missing
    }
    try:
        for number, done in enumerate(as_completed(waiting), 1):
            name, record = key(waiting[done]), done.result()
            results.add(name, record)
            told = f"loss {record['loss']:.4f}, exact match {record['accuracy']:.1%}, {record['seconds']:.0f} s"
            left = (time.monotonic() - started) / number * (len(missing) - number) / 60
            print(f"{number}/{len(missing)}  {name}: {told}; {left:.0f} min left", file=sys.stderr, flush=True)
    finally:  # where one has failed the others need not start
        for each in waiting:
            each.cancel()


def measure_untrained(study: Study, results: Results, processes: ProcessPoolExecutor) -> None:
    """The base as each storage leaves it."""
    wanted = dict.fromkeys([SIXTEEN, *(each.storage for each in study.configurations if each.targets)])
    missing = [name for name in wanted if untrained_key(name) not in results.found]
    waiting = {name: processes.submit(work.untrained, study, name) for name in missing}
    for name, done in waiting.items():
        results.add(untrained_key(name), done.result())


def untrained_key(storage: str) -> str:
    """Beside the keys of the runs."""
    return f"untrained; {storage}"


def write(study: Study, results: Results, rates: Rates, args: argparse.Namespace) -> None:
    """Document and picture, of what there is."""
    prefix = untrained_key("")
    untrained = {name.removeprefix(prefix): each for name, each in results.found.items() if name.startswith(prefix)}
    tables = tabulate(study, rates, results)
    command = (
        f"python scripts/parity.py{' --smoke' if args.smoke else f' --seeds {len(tables[study.lengths[0]].seeds)}'}"
    )
    plot(tables, args.docs / "parity.png")
    found = Findings(study, rates, results, tables, untrained, command, args.workers)
    (args.docs / "parity.md").write_text(document(found, "parity.png"), encoding="utf-8")
    print(args.docs / "parity.md")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test the QLoRA paper's claims on the demo's base.")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"at least 2, default {SEEDS}")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes, default {WORKERS}")
    parser.add_argument("--work", type=Path, help="folder of the results, default out/parity")
    parser.add_argument("--docs", type=Path, help="folder of parity.md and parity.png, default docs")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sweep", action="store_true", help="the learning rates only")
    mode.add_argument("--report", action="store_true", help="run nothing; write what the whole seeds say")
    mode.add_argument("--smoke", action="store_true", help="a little of everything; needs --work and --docs")
    args = parser.parse_args()
    if args.smoke and None in (args.work, args.docs):
        parser.error("--smoke needs --work and --docs, so that it does not take the place of the study")
    if args.seeds < 2 or args.workers < 1:
        parser.error("--seeds is at least 2, --workers at least 1")
    args.work, args.docs = args.work or ROOT / "out" / "parity", args.docs or ROOT / "docs"
    return args


def main() -> int:
    args = parse_arguments()
    folder = args.work.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    study = smoke_study(folder) if args.smoke else full_study(folder, args.seeds)
    results = Results.read(folder / "results.jsonl")
    if not args.report:
        write_rows(study)
        write_base(study, args.smoke)
        with pool(study, args.workers) as processes:
            measure(study, sweep_runs(study), results, processes)
            if not args.sweep:
                measure_untrained(study, results, processes)
                measure(study, study_runs(study, best_rates(study, results)), results, processes)
    rates = best_rates(study, results)
    for steps, kinds in rates.items():
        print("\n".join(f"{steps} steps, {kind}: rate {rate:g}" for kind, rate in kinds.items()), file=sys.stderr)
    if not args.sweep:
        write(study, results, rates, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
