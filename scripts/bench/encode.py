"""Encoding rows beside the tokenizer alone, and the memory that it takes.

    python scripts/bench/encode.py [--rows 100000] [--file ROWS.jsonl --format FORMAT --columns FIELD=COLUMN ...]
    python scripts/bench/encode.py --gigabytes 2

The first compares, in turn, what `qlora` does with a file of chat rows (read, parse, render, encode, mask, hash, write
down) with the tokenizer's own batch call on the very texts that are encoded, rendered beforehand: tokens per second of
both, and the median of the ratios of neighbouring runs, which a machine whose speed drifts blurs least. The second
writes a file of that size and says how much memory encoding it took at its peak.

Rows are generated: one to three questions and answers of invented text. The tokenizer is trained on such text, or on
the file, with ChatML's tokens as special ones.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import child
from random_base import TOKENIZER
from workload import Writer, row_lengths

VOCABULARY = 16_000
TRAINED_ON = 40_000
AT_ONCE = 1000
"""Texts of a call of the tokenizer: as many as its own documentation's examples take."""


def conversations(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of the `messages` format."""
    rng = random.Random(seed)
    writer = Writer(rng)
    sentences = [writer.sentence() for _ in range(5000)]
    for length in row_lengths(count, rng):
        turns = []
        for _ in range(pairs := rng.randint(1, 3)):
            for role, share in (("user", 0.3), ("assistant", 0.7)):
                turns.append({"role": role, "content": text_of(sentences, rng, round(length * share / pairs))})
        yield {"messages": turns}


def text_of(sentences: Sequence[str], rng: random.Random, characters: int) -> str:
    """Sentences of about so many characters."""
    return " ".join(rng.choices(sentences, k=max(1, characters // 80)))


def make_tokenizer(texts: Iterator[str]) -> Any:
    """Byte-level BPE with ChatML's tokens, trained on the first of `texts`."""
    from itertools import islice

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    special = ["<|im_start|>", "<|im_end|>"]
    return tokenizer.train_new_from_iterator(
        islice(texts, TRAINED_ON), VOCABULARY, new_special_tokens=special, show_progress=False
    )


def section_of(args: argparse.Namespace, file: Path) -> Any:
    """The data section."""
    from qlora_cli.recipe.data_schema import DataSection

    columns = dict(pair.split("=", 1) for pair in args.columns)
    return DataSection(
        train=str(file), format=args.format, columns=columns, template="chatml", max_length=1 << 20, cache=False
    )


def rendered(section: Any, tokenizer: Any) -> list[str]:
    """Every row's text."""
    from qlora_cli.data.formats import FORMATS, renamed
    from qlora_cli.data.sources import read_rows

    build = FORMATS[section.format].build
    said = (build(renamed(row.values, section.columns)) for row in read_rows(section.train, "train"))
    return [tokenizer.apply_chat_template([m.as_dict() for m in each.messages], tokenize=False) for each in said]


def tokenizer_alone(tokenizer: Any, texts: Sequence[str]) -> tuple[int, float]:
    """(tokens, seconds) of the tokenizer's batch call."""
    started, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), AT_ONCE):
        batch = tokenizer(texts[start : start + AT_ONCE], add_special_tokens=False, return_attention_mask=False)
        tokens += sum(map(len, batch["input_ids"]))
    return tokens, time.perf_counter() - started


def ours(section: Any, tokenizer: Any) -> tuple[int, float]:
    """(tokens, seconds) from file to encoded rows."""
    from qlora_cli.data.dataset import Setting, load_data

    started = time.perf_counter()
    data = load_data(section, Setting(tokenizer))
    return data.receipt.train.tokens, time.perf_counter() - started


def speed(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Both, in turn."""
    file = Path(args.file) if args.file else place / "rows.jsonl"
    if not args.file:
        write(file, args.rows)
    section = section_of(args, file)
    texts = file.read_text(encoding="utf-8").splitlines()
    tokenizer = make_tokenizer(iter(texts))
    from qlora_cli.data.dataset import Setting, load_data

    load_data(section, Setting(tokenizer))  # sets the template; warms up
    texts = rendered(section, tokenizer)
    rates: dict[str, list[float]] = {"ours": [], "tokenizer": []}
    for turn in range(args.repeat):
        for who in list(rates)[:: -1 if turn % 2 else 1]:
            tokens, seconds = ours(section, tokenizer) if who == "ours" else tokenizer_alone(tokenizer, texts)
            rates[who].append(tokens / seconds)
    medians = {who: statistics.median(found) for who, found in rates.items()}
    ratios = [mine / other for mine, other in zip(rates["ours"], rates["tokenizer"], strict=True)]
    return {
        "rows": len(texts),
        "tokens": tokens,
        "tokens_per_second": medians,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios) if len(ratios) > 1 else ratios,
        "runs": rates,
    }


def write(file: Path, rows: int) -> None:
    """A file of generated rows."""
    with file.open("w", encoding="utf-8") as out:
        for row in conversations(rows):
            out.write(json.dumps(row) + "\n")


def memory(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Peak memory of encoding a file of so many bytes, in this process, which has done nothing else."""
    file, some = place / "rows.jsonl", place / "some.jsonl"
    write(some, 2000)
    block = some.read_bytes()
    with file.open("wb") as out:
        for _ in range(max(1, round(args.gigabytes * 1e9 / len(block)))):
            out.write(block)
    section = section_of(args, file)
    tokenizer = make_tokenizer(iter(some.read_text(encoding="utf-8").splitlines()))
    before = peak()
    tokens, seconds = ours(section, tokenizer)
    return {
        "file_bytes": file.stat().st_size,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_rss_before": before,
        "peak_rss": peak(),
    }


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure encoding beside the tokenizer alone.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--file", help="rows to encode instead of generated ones")
    parser.add_argument("--format", default="messages")
    parser.add_argument("--columns", nargs="*", default=[], metavar="FIELD=COLUMN")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, help="measure the memory that a file of this size takes instead")
    parser.add_argument("--out", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = (memory if args.gigabytes else speed)(args, Path(place))
    versions, _ = child.versions(sys.executable, child.OURS)
    result = {"machine": child.machine(), "versions": versions, **found}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
