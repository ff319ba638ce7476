"""Training on the CPU beside its peer: `qlora train` against TRL, or transformers' trainer, with PEFT and bitsandbytes.

    python scripts/bench/train_vs_peer.py --peer-python PATH/OF/ITS/python --out results.json

The peer needs `pip install trl peft bitsandbytes`, here or in an environment of its own. Base, rows and the adapter
that both start from are made by `workload.py`; both train on the same ids and the same targets, with the same rank,
optimizer and learning rate. Each run is a process of its own, in turn; before and after each the machine's matrix
products are timed. Cases:

- padded: chat rows of at most 512 tokens, 16 a step; TRL pads micro-batches of 4, ours packs to 2,048 tokens. Rows come
  in the same order, so the losses must agree step by step.
- packed: at most 1,024 tokens; TRL packs to 1,024, one pack at a time (its mask is dense: more would be slower), and
  so groups other rows into its steps: only levels compare.
- fixed: 4 full rows of 512 tokens a step, every token a target, 8-bit optimizer, rank 64; transformers' trainer.

Rates count real tokens over the steps' own times without the first `--skip` steps; the rest of the process is told
apart as `excluded_seconds`. Memory is the peak of the whole process. Ratios compare medians: above 1 we are better.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import child
from compare import Ran, figures, show, summary
from limit import gemm
from ours import train
from workload import Spec, make

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    """One comparison. `micro_batch_size` rows of `max_length` are what both take at once; `bars` are least ratios."""

    max_length: int
    batch_size: int
    micro_batch_size: int
    rank: int
    optimizer: str
    bars: dict[str, float]
    full: bool = False
    packed: bool = False
    ours: tuple[str, ...] = ()
    """KEY=VALUE of our recipe."""

    @property
    def same_rows(self) -> bool:
        """Whether a step of the peer has the rows of ours."""
        return not self.packed


MEMORY_BAR = 2.0
HALF = ("train.micro_batch_size=2",)
"""Ours in micro-batches of 2 x 512 in place of 4 x 512, in less memory and up to a tenth slower; the same steps."""
CASES = {
    "padded": Case(512, 16, 4, 16, "adamw", {"tokens_per_second": 4.0, "peak_rss": MEMORY_BAR}),
    "packed": Case(1024, 16, 1, 16, "adamw", {"tokens_per_second": 3.0, "peak_rss": MEMORY_BAR}, packed=True),
    "fixed": Case(
        512, 4, 4, 64, "paged_adamw_8bit", {"tokens_per_second": 2.5, "peak_rss": MEMORY_BAR}, full=True, ours=HALF
    ),
}


@dataclass(frozen=True)
class Place:
    """A prepared case: its folder, what was asked for, and what is in it."""

    folder: Path
    case: Case
    spec: Spec
    facts: dict[str, Any]

    @property
    def accumulation(self) -> int:
        """The peer's micro-batches per step. Packed ones are full: as many as hold a step of ours."""
        if not self.case.packed:
            return self.spec.batch_size // self.spec.micro_batch_size
        per_step = self.facts["tokens"] / self.spec.steps
        return max(1, round(per_step / (self.spec.micro_batch_size * self.spec.max_length)))


def ours(place: Place) -> tuple[list[dict[str, float]], Ran]:
    """Steps and process of `qlora train`."""
    steps, finished, again = train(place.folder, place.spec.overrides)
    return steps, Ran(finished, again)


def peer(place: Place, python: str) -> tuple[list[dict[str, float]], Ran]:
    """Steps and process of the peer."""
    job, log = place.folder / "job.json", place.folder / "peer.log"
    job.write_text(json.dumps(peer_job(place)), encoding="utf-8")
    finished = child.run([python, HERE / "peer_trl.py", job], log)
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1]
    steps: list[dict[str, float]] = json.loads(last)["steps"]
    return steps, Ran(finished, place.spec.checkpointing != "off")


def peer_job(place: Place) -> dict[str, Any]:
    """What `peer_trl.Job` holds."""
    spec, folder = place.spec, place.folder
    return {
        "base": str(folder / "base"),
        "rows": str(folder / "tokens.jsonl"),
        "adapter": str(folder / "adapter.safetensors"),
        "plain": place.case.full,
        "packed": place.case.packed,
        "micro_batch_size": spec.micro_batch_size,
        "accumulation": place.accumulation,
        "max_length": spec.max_length,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "optimizer": spec.optimizer,
        "checkpointing": spec.checkpointing != "off",
        "lr": spec.lr,
        "max_grad_norm": spec.max_grad_norm,
        "seed": spec.seed,
        "output": str(folder / "peer"),
    }


def check_same(who: str, steps: list[dict[str, float]], place: Place) -> None:
    """Ends the program where a run did not train on the prepared rows: it would compare nothing."""
    same_rows = who == "ours" or place.case.same_rows
    for key in ("tokens", "targets"):
        wanted, found = place.facts[f"step_{key}"], [step[key] for step in steps]
        if (found != wanted) if same_rows else (sum(found) != sum(wanted)):
            raise SystemExit(f"{who}: {key} per step {found}, but the rows prepared have {wanted}")


def alternate(place: Place, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All runs of a case: ours and the peer's in turn, each first in every other round."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": []} if args.ours_only else {"ours": [], "peer": []}
    before = gemm(place.folder)
    for turn in range(args.repeat):
        for who in list(runs)[:: -1 if turn % 2 else 1]:
            steps, ran = ours(place) if who == "ours" else peer(place, args.peer_python)
            check_same(who, steps, place)
            after = gemm(place.folder)
            found = figures(steps[args.skip :], ran, place.spec, place.facts["counts"], (before + after) / 2)
            found["losses"] = [step["loss"] for step in steps]
            runs[who].append(found)
            before = after
            tell({"event": "run", "case": place.folder.name, "who": who, "turn": turn, **found}, args.json)
    return runs


def tell(event: dict[str, Any], as_json: bool) -> None:
    """A run's line of JSON, or of progress."""
    if as_json:
        print(json.dumps(event), flush=True)
        return
    rate, memory = event["tokens_per_second"], event["peak_rss"] / 1e9
    text = f"{event['case']} {event['who']}: {rate:.0f} tokens/s, {event['fraction']:.1%} of the limit"
    print(f"{text}, {memory:.2f} GB", file=sys.stderr, flush=True)


def measure(name: str, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One case, prepared and run."""
    case = CASES[name]
    case = replace(case, rank=args.rank or case.rank, optimizer=args.optimizer or case.optimizer)
    spec = Spec(
        shape=args.shape,
        full=case.full,
        steps=args.steps,
        batch_size=case.batch_size,
        micro_batch_size=case.micro_batch_size,
        max_length=case.max_length,
        rank=case.rank,
        optimizer=case.optimizer,
        checkpointing=args.checkpointing,
        lr=args.lr,
        overrides=(*case.ours, *args.set),
    )
    place = Place(root / name, case, spec, make(root / name, spec))
    runs = alternate(place, args)
    settings = {"spec": asdict(spec), "accumulation": place.accumulation, "workload": place.facts}
    return settings | summary(runs, case.bars, case.same_rows) | {"runs": runs}


def peer_versions(args: argparse.Namespace) -> dict[str, str]:
    """Versions of the peer's libraries; ends the program where one is missing."""
    if args.ours_only:
        return {}
    found, missing = child.versions(args.peer_python, child.PEER)
    if missing:
        raise SystemExit(
            f"error: {args.peer_python} lacks {', '.join(missing)}, which the peer needs\n"
            f"  fix: {args.peer_python} -m pip install trl peft bitsandbytes, or name the python of an environment "
            "that has them with --peer-python, or measure our side alone with --ours-only"
        )
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure `qlora train` beside TRL + PEFT + bitsandbytes on the CPU.")
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with trl and peft")
    parser.add_argument("--ours-only", action="store_true", help="leave the peer out")
    parser.add_argument("--shape", default="110m", help="one that random_base.py knows")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each run")
    parser.add_argument("--skip", type=int, default=1, help="first steps that count as warm-up")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side")
    parser.add_argument("--rank", type=int, help="instead of the case's")
    parser.add_argument(
        "--optimizer", choices=["adamw", "adamw_8bit", "paged_adamw_8bit"], help="instead of the case's"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate: enough for the losses to fall")
    text = "recompute activations, on both sides; auto: ours as it decides by itself, the peer as it does: always"
    parser.add_argument("--checkpointing", choices=["auto", "on", "off"], default="auto", help=text)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override in our recipe")
    parser.add_argument("--json", action="store_true", help="newline-delimited JSON: each run, then the result")
    parser.add_argument("--out", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args()
    if not 0 <= args.skip < args.steps or args.repeat < 1:
        parser.error("--steps must exceed --skip, and --repeat must be at least 1")
    return args


def main() -> int:
    args = arguments()
    result: dict[str, Any] = {
        "event": "result",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": child.machine(),
        "versions": {"ours": child.versions(sys.executable, child.OURS)[0], "peer": peer_versions(args)},
        "repeat": args.repeat,
        "skip": args.skip,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as place:
        for name in CASES if args.case == "all" else [args.case]:
            result["cases"][name] = measure(name, Path(place).resolve(), args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if args.json else show(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
