"""Whether a model trained on the demo's task stops by itself, with each template that ships.

    python scripts/stops.py [--templates chatml zephyr] [--steps 150] [--prompts 200] [--json] [--work DIR]

For each template: the demo's recipe with `data.template` set to it is trained by `qlora train`, and `qlora chat
--prompts` answers prompts that it has never seen. Counted is how many answers a stop token ended, and how many are
exactly what was wanted. Two templates add tokens to the vocabulary, of which the base knows nothing: their embeddings
are trained with the adapter, and without the one that ends a turn no answer would end.

Invariant: it succeeds only when every answer of every template was ended by a stop token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import make_tiny_base
import tiny_corpus

from qlora_cli.data.templates import TEMPLATES

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "tiny-demo.yaml"
ROWS = 1600
MAX_LENGTH = 192
"""Tokens of a training row: the markers of `llama3` and `alpaca` take more than the demo's own limit leaves."""
MAX_TOKENS = 512
"""Tokens of an answer; those wanted take 40 to 60, so that whatever reaches this would never have ended."""


@dataclass(frozen=True)
class Found:
    """What came of one template: answers that a stop token ended, that say what was wanted, and that say it without a
    space more (as `guanaco` and `vicuna` begin an answer). `added` tokens were new; `longest` is in tokens."""

    template: str
    prompts: int
    stopped: int
    right: int
    exact: int
    added: int
    longest: int
    loss: float
    seconds: float


def qlora(*arguments: str) -> str:
    """What a command prints on stdout; its failure ends this script with its exit code."""
    command = [sys.executable, "-m", "qlora_cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"$ qlora {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}", file=sys.stderr)
        sys.exit(done.returncode)
    return done.stdout


def prepare(work: Path, prompts: int) -> list[str]:
    """Writes the demo's base, its rows and the prompts; returns what should be answered."""
    make_tiny_base.copy_base(make_tiny_base.SHIPPED, work / "base")
    train = tiny_corpus.instruction_rows(0, ROWS)
    held_out = tiny_corpus.instruction_rows(0, prompts, held_out=True)
    tiny_corpus.assert_disjoint(train, held_out)
    tiny_corpus.write_atomically(work / "train.jsonl", train)
    asked = [json.dumps({"prompt": row["messages"][0]["content"]}) + "\n" for row in held_out]
    (work / "prompts.jsonl").write_text("".join(asked), encoding="utf-8")
    return [row["messages"][1]["content"] for row in held_out]


def train(work: Path, template: str, steps: int) -> Path:
    """The run directory of the demo's recipe with this template."""
    run = work / template
    values = {
        "model.base": work / "base",
        "data.train": work / "train.jsonl",
        "data.template": template,
        "data.max_length": MAX_LENGTH,
        "data.limits.dropped": 0,
        "train.steps": steps,
    }
    settings = [part for key, value in values.items() for part in ("-s", f"{key}={value}")]
    qlora("train", str(RECIPE), *settings, "-o", str(run), "-q")
    return run


def last_loss(run: Path) -> float:
    """Of the last step that was logged."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return float([row["loss"] for row in logged if "loss" in row][-1])


def new_tokens(base: Path, run: Path) -> int:
    """How many tokens the run's tokenizer has beyond the base's."""
    from transformers import AutoTokenizer

    sizes = [len(AutoTokenizer.from_pretrained(folder)) for folder in (base, run / "adapter")]
    return sizes[1] - sizes[0]


def measure(work: Path, template: str, steps: int, wanted: Sequence[str]) -> Found:
    """Trains, asks and counts."""
    started = time.perf_counter()
    run, limit = train(work, template, steps), str(MAX_TOKENS)
    asked = ("--prompts", str(work / "prompts.jsonl"), "--max-new-tokens", limit, "--temperature", "0")
    events = [json.loads(line) for line in qlora("chat", "--adapter", str(run), *asked, "--json").splitlines()]
    answers = [event for event in events if event["event"] == "answer"]
    given = [answer["answer"] for answer in answers]
    assert len(answers) == len(wanted), f"{len(answers)} answers to {len(wanted)} prompts"
    return Found(
        template=template,
        prompts=len(answers),
        stopped=sum(answer["ended"] == "stop token" for answer in answers),
        right=sum(text.strip() == other for text, other in zip(given, wanted, strict=True)),
        exact=sum(text == other for text, other in zip(given, wanted, strict=True)),
        added=new_tokens(work / "base", run),
        longest=max(answer["tokens"] for answer in answers),
        loss=last_loss(run),
        seconds=time.perf_counter() - started,
    )


def line(found: Found) -> str:
    """A row of the table."""
    return (
        f"{found.template:<10}{found.stopped:>5} of {found.prompts:<5}{found.right:>6}{found.exact:>7}{found.added:>12}"
        f"{found.longest:>9}{found.loss:>9.4f}{found.seconds:>7.0f} s"
    )


def run_all(work: Path, args: argparse.Namespace) -> list[Found]:
    """Every template in turn, each told as soon as it is known."""
    wanted = prepare(work, args.prompts)
    if not args.json:
        print("template      stopped   right  exact  new tokens  longest     loss     time")
    results = []
    for template in args.templates:
        results.append(measure(work, template, args.steps, wanted))
        print(json.dumps(asdict(results[-1])) if args.json else line(results[-1]), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Count how many answers end by themselves, with each template.")
    parser.add_argument("--templates", nargs="+", default=list(TEMPLATES), choices=list(TEMPLATES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=150, help="training steps; the demo takes twice as many")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--json", action="store_true", help="print one JSON line per template")
    parser.add_argument("--work", type=Path, help="an empty folder for base, rows and runs, which stay in it")
    args = parser.parse_args()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        results = run_all(args.work, args)
    else:
        with tempfile.TemporaryDirectory() as place:
            results = run_all(Path(place), args)
    short = [found.template for found in results if found.stopped < found.prompts]
    if short:
        print(f"answers that did not stop: {', '.join(short)}", file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    raise SystemExit(main())
