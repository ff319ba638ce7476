"""Feeds mutated rows and files to the whole way of the data, and checks that each is encoded or refused by name.

    python scripts/fuzz_data.py [--count 10000] [--seed 0] [--only NUMBER] [--longest 1000000]

A case is a file and a data section: rows of some format, mutated as values, as text, as bytes or as a packed file,
written in any kind of file, and read with any template and policy. Good rows and the mutator of bytes are those of the
tests. The same seed and number make the same case, whatever others ran before it.

Invariant: `load_data` returns counts that add up, with the place of every row that was lost, or raises a `QloraError`
that names the file, and the row where one row is to blame. Whatever else comes back is counted as broken, whatever
else is raised as a traceback, and either ends this with 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `tests`

import pyarrow  # type: ignore[import-untyped]

from qlora_cli.data.dataset import Setting, TokenData, load_data
from qlora_cli.data.formats import FORMATS
from qlora_cli.data.reading import BAD
from qlora_cli.data.sources import MOST_NAMED
from qlora_cli.data.templates import TEMPLATES
from qlora_cli.errors import Problem, QloraError
from qlora_cli.recipe.data_schema import DataSection
from tests.conftest import make_tokenizer
from tests.data.format_cases import GOOD
from tests.data.test_readers import PACK, feather_of, mutated, parquet_of, stream_of, table

Row = dict[str, Any]
LONGEST = 1_000_000
"""Characters of a long text; one that a tokenizer without merges makes a token of each takes up to a kilobyte each."""
REFUSED_LENGTH = 70_000_000
"""Characters of a line that no reader takes."""
HANGS = 300
"""Seconds after which a case hangs."""
LONGEST_PROBLEM = 5000
"""Characters in which a problem must be told."""
ALTERNATING = (
    "{% for m in messages %}{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('no') }}{% endif %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHOICES: dict[str, list[Any]] = {
    "template": ["tokenizer", "none", "chatml", *TEMPLATES, ALTERNATING],
    "on_bad_row": ["error", "skip", "skip"],
    "too_long": ["drop", "drop", "truncate", "truncate", "error"],
    "max_length": [8, 64, 64, 1024, 1024, 1 << 20, 1 << 20],
    "loss_on": ["assistant", "completion", "last", "all"],
    "duplicates": ["keep", "drop"],
    "eval_split": [*[None] * 7, 1],
}
WORDS = [
    *("", " ", "\0", "\ud800", "\udfff\ud800", "\ufeff", "\ufffe", "\u202e", "\U0001f468\u200d\U0001f469"),
    *("</s>", "<s>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<think>", "</think>", "{{ x }}", "{% raw %}"),
    *("### Human:", "### Assistant:", "\n\nHuman:", "\n\nAssistant:", "<human>:", "<bot>:", "\r\n", "\x85\u2028"),
    *('{"name": "\\ud800", "arguments": {}}', '{"a": NaN}', "[" * 500, "9" * 5000, "a" * 20_000, "\\ud800", "null"),
    *("\x1b[2J", "\x9b2J", "e\u0301" * 50, '"'),
]  # fmt: skip
NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, float("nan"), float("inf"), -0.0, True, False]
STRANGE = [b"\xff\0", datetime(1, 1, 1), datetime.max, timedelta.max, Decimal("1e-30"), Decimal(10) ** 30]
"""Values that a columnar file can hold, and JSON cannot."""
KEYS = ["role", "content", "from", "value", "train", "weight", "tool_calls", "function", "tools", "system", "text", ""]
ENCODINGS = ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp1252", "cp500", "utf-7"]
SUFFIXES = [".jsonl"] * 6 + [".ndjson", ".json", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt"]

PACKERS = PACK | {".gz": partial(gzip.compress, mtime=0)}
"""Without the time in them, so that a case comes again."""


def nested(levels: int, noise: random.Random) -> Any:
    """Lists, or objects, so deep."""
    value: Any = "a"
    for _ in range(levels):
        value = [value] if noise.random() < 0.5 else {"role": value}
    return value


def odd(noise: random.Random) -> Any:
    """A value that nobody expects."""
    kind = noise.randrange(8)
    if kind == 0:
        return nested(noise.choice((1, 2, 99, 101, 190, 250, 350)), noise)
    if kind == 1:
        return noise.choice(STRANGE)
    return noise.choice((None, noise.choice(NUMBERS), noise.choice(WORDS), [], {}, [None], [[]], [{}]))


def places(value: Any, levels: int = 12) -> list[tuple[Any, Any]]:
    """(holder, key) of every value within so many levels: what is nested deeper stays as it is."""
    found: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys if levels else ():
        found += [(value, key), *places(value[key], levels - 1)]
    return found


def changed(row: Row, noise: random.Random) -> Row:
    """The row with one to three of its values replaced, removed, renamed, repeated or written into."""
    row = deepcopy(row)
    for _ in range(noise.choice((1, 1, 1, 2, 3))):
        found = places(row)
        if not found:
            return {noise.choice(KEYS): odd(noise)}
        change(*noise.choice(found), noise)
    return row


def change(holder: Any, key: Any, noise: random.Random) -> None:
    """One change to what stands there."""
    value, kind = holder[key], noise.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[noise.choice(KEYS)] = holder.pop(key)
    elif kind == 1:
        holder.insert(key, noise.choice((deepcopy(value), odd(noise))))
    elif kind == 2 and isinstance(holder, dict):
        holder[noise.choice(KEYS)] = odd(noise)
    elif isinstance(value, str) and kind < 5:
        at = noise.randrange(len(value) + 1)
        holder[key] = value[:at] + noise.choice(WORDS) + value[at:]
    else:
        holder[key] = odd(noise)


def as_json(value: Any, ascii_only: bool) -> str:
    return json.dumps(value, ensure_ascii=ascii_only, default=str)


def as_bytes(text: str) -> bytes:
    """UTF-8 in which half a character has the bytes that it would have."""
    return text.encode("utf-8", "surrogatepass")


def written(rows: list[Row], suffix: str, noise: random.Random) -> bytes:
    """The rows as a file of that kind."""
    ascii_only = noise.random() < 0.5
    if suffix in {".jsonl", ".ndjson"}:
        return as_bytes("".join(as_json(row, ascii_only) + "\n" for row in rows))
    if suffix == ".json":
        return as_bytes("[" + ",\n".join(as_json(row, ascii_only) for row in rows) + "]")
    if suffix == ".txt":
        return as_bytes("\n".join(str(value) for row in rows for value in row.values()))
    if suffix in {".csv", ".tsv"}:
        return as_bytes(separated(rows, "," if suffix == ".csv" else "\t"))
    write: dict[str, Callable[[Any], bytes]] = {".parquet": parquet_of, ".arrow": stream_of, ".feather": feather_of}
    return columnar(rows, write[suffix])


def separated(rows: list[Row], separator: str) -> str:
    """All fields in quotes. (Before Python 3.11 the csv module writes no NUL.)"""
    header = list(dict.fromkeys(key for row in rows for key in row)) or ["text"]
    values = [[row.get(key, "") for key in header] for row in rows]
    texts = [[value if isinstance(value, str) else as_json(value, True) for value in line] for line in values]
    quoted = [['"' + text.replace('"', '""') + '"' for text in line] for line in [header, *texts]]
    return "".join(separator.join(line) + "\r\n" for line in quoted)


def columnar(rows: list[Row], write: Callable[[Any], bytes]) -> bytes:
    """The rows in columns; those of which no column can be made, as text in one."""
    try:
        return write(table(rows))
    except (pyarrow.ArrowException, ValueError, TypeError, ArithmeticError, RecursionError, NotImplementedError):
        return write(table([{"text": as_json(row, True)} for row in rows] or [{"text": "a"}]))


@dataclass(frozen=True)
class Case:
    """A file with what was done to it, and what it is read with. `rows` is how many it has, where that is known."""

    number: int
    kind: str
    path: Path
    keys: dict[str, Any]
    rows: int | None = None

    def __str__(self) -> str:
        return f"case {self.number} ({self.kind}, {self.path.name}): {self.keys}"


def make_case(seed: int, number: int, folder: Path, longest: int = LONGEST) -> Case:
    """Writes the file of a case. Long texts have up to `longest` characters."""
    noise = random.Random(f"{seed} {number}")
    row_format = noise.choice(list(FORMATS))
    good = [row for name, row, _ in GOOD if name == row_format]
    rows = [deepcopy(noise.choice(good)) for _ in range(noise.choice((1, 3, 10, 30)))]
    suffix, packing = noise.choice(SUFFIXES), noise.choice([*[""] * 4, *PACKERS])
    kind = noise.choices(["row", "text", "packed", "encoding", "long"], [70, 12, 12, 5.5, 0.5])[0]
    content, known = spoilt(kind, rows, suffix, noise, longest)
    content = PACKERS[packing](content)
    path = folder / f"{number}{suffix}{packing}"
    path.write_bytes(mutated(content, noise) if kind == "packed" else content)
    keys = {name: noise.choice(values) for name, values in CHOICES.items()}
    keys["format"] = noise.choice([row_format] * 5 + ["auto", "text", "messages"])
    if keys["format"] == "text" and noise.random() < 0.3:
        keys["too_long"] = "split"
    return Case(number, kind, path, keys, None if suffix == ".txt" else known)


def spoilt(kind: str, rows: list[Row], suffix: str, noise: random.Random, longest: int) -> tuple[bytes, int | None]:
    """(the file with what `kind` does to rows or text, how many rows it still has, where that is known)."""
    if kind == "row":
        rows = [changed(row, noise) if noise.random() < 0.6 else row for row in rows]
        return written(rows, suffix, noise), len(rows)
    if kind == "long":
        holder, key = noise.choice([place for row in rows for place in places(row)])
        length = noise.choice((longest // 10, longest // 3, longest))
        if suffix in {".jsonl", ".ndjson"} and longest >= LONGEST and noise.random() < 0.2:
            length = REFUSED_LENGTH
        unit = noise.choice(("a", "\u00e4 ", "x\n"))
        holder[key] = unit * (length // len(unit))
        return written(rows, suffix, noise), None
    content = written(rows, suffix, noise)
    if kind == "text":
        return mutated(content, noise), None
    if kind == "encoding":
        code, text = noise.choice(ENCODINGS), content.decode("utf-8", "replace")
        cut = noise.choice((0, 0, len(text) // 2))
        return text[:cut].encode() + text[cut:].encode(code, "replace"), None
    return content, None


@cache
def tokenizer_for(template: str) -> Any:
    """One for each template, since a template adds its tokens."""
    return make_tokenizer()


class BrokenError(Exception):
    """What came back is not what it must be."""


@dataclass
class Tally:
    """What became of cases and of the rows in them."""

    cases: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    broken: int = 0
    tracebacks: int = 0

    def add(self, case: Case) -> None:
        """Runs a case. Raises what it raises but for a `QloraError`, and `BrokenError`."""
        section = DataSection.model_validate({"train": str(case.path), **case.keys})
        try:
            data = load_data(section, Setting(tokenizer_for(section.template)))
        except QloraError as error:
            self.refused[check_refusal(case, error)] += 1
            self.rows["named in a refusal"] += named(error)
            self.cases[f"{case.kind}: refused"] += 1
            return
        self.rows.update(check_counts(case, data))
        self.cases[f"{case.kind}: encoded"] += 1

    def as_json(self) -> dict[str, Any]:
        """Counts, the larger first."""
        named = {"cases": self.cases, "rows": self.rows, "refused": self.refused}
        found: dict[str, Any] = {name: dict(counts.most_common()) for name, counts in named.items()}
        return found | {"broken": self.broken, "tracebacks": self.tracebacks}


def must(holds: bool, what: str) -> None:
    """Raises `BrokenError` unless it holds."""
    if not holds:
        raise BrokenError(what)


def check_refusal(case: Case, error: QloraError) -> str:
    """What kind of refusal it is; checks that it can be read and names the file."""
    problems = list(error.problems)
    if len(problems) > MOST_NAMED:
        must(problems.pop().what.endswith(" more rows like these"), "the last problem does not count the others")
    for problem in problems:
        check_text(problem)
        must(str(case.path) in str(problem), f"not named: FILE by {problem}")
    rows = [problem for problem in problems if re.fullmatch(re.escape(str(case.path)) + r":[1-9]\d*", problem.where)]
    must(rows in ([], problems), "some problems name a row, and some do not")
    return f"{type(error).__name__}, {'FILE:LINE' if rows else told(problems[0], case)}"


def named(error: QloraError) -> int:
    """How many rows it refuses by their place, those that it only counts included."""
    more = sum(int(problem.what.split()[0]) for problem in error.problems[MOST_NAMED:])
    return more + sum(bool(problem.where) for problem in error.problems)


def check_text(problem: Problem) -> None:
    """A problem can be printed without harm to a terminal."""
    text = str(problem)
    text.encode()
    must(len(text) < LONGEST_PROBLEM, f"{len(text)} characters: {text[:200]}")
    unseen = sorted({c for c in text if ord(c) < 32 and c not in "\n\t"} | {c for c in text if 0x7F <= ord(c) < 0xA0})
    must(not unseen, f"control characters {unseen} in {text[:200]!r}")


def told(problem: Problem, case: Case) -> str:
    """The problem of a whole file in words that many share."""
    what = problem.what.replace(str(case.path), "FILE")
    return re.sub(r"\(.*|[\d,.]+|`[^`]*`", "", what)[:60].strip()


def check_counts(case: Case, data: TokenData) -> Counter[str]:
    """Rows by what became of them; checks that they add up and that each that was lost has its place."""
    (source,) = data.receipt.sources
    must(source.read == source.kept + source.held_out + source.left_out + sum(source.dropped.values()), str(source))
    must(case.rows in (None, source.read), f"{case.rows} rows were written, {source.read} read")
    lost = list(data.lost_rows())
    bad = [row for row in lost if BAD in row["counts"]]
    must(len(bad) == source.bad == source.dropped.get(BAD, 0), f"{len(bad)} bad rows are listed of {source.bad}")
    must(all(row.get("what") for row in bad), "a bad row without a reason")
    must(not bad or case.keys["on_bad_row"] == "skip", "a bad row was left out unasked")
    encoded = [*data.train, *data.held_out]
    seen = {row.where for row in encoded} | {row["where"] for row in lost}
    must(len(seen) == source.read, f"{source.read} rows, {len(seen)} places")
    must(all(re.fullmatch(re.escape(str(case.path)) + r":[1-9]\d*", where) for where in seen), str(seen))
    for row in encoded:
        must(1 <= row.targets < len(row) <= case.keys["max_length"], f"{row.where}: {row.targets} of {len(row)}")
        known = range(len(tokenizer_for(case.keys["template"])))
        must(row.ids.min() in known and row.ids.max() in known, f"{row.where}: ids beyond the vocabulary")
    return Counter({"encoded": source.kept + source.held_out, **source.dropped})


def run(seed: int, numbers: range, longest: int = LONGEST) -> Tally:
    """Cases of these numbers; each traceback is printed with its case."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="qlora-fuzz-") as place:
        for number in numbers:
            faulthandler.dump_traceback_later(HANGS, exit=True, file=2)
            case = make_case(seed, number, Path(place), longest)
            try:
                tally.add(case)
            except BrokenError as error:
                tally.broken += 1
                print(f"{case}\nbroken: {error}\n", file=sys.stderr, flush=True)
            except Exception:
                tally.tracebacks += 1
                print(f"{case}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            case.path.unlink()
        faulthandler.cancel_dump_traceback_later()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed mutated rows and files to the data path.")
    parser.add_argument("--count", type=int, default=10_000, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case alone")
    parser.add_argument("--longest", type=int, default=LONGEST, help="characters of a long text")
    args = parser.parse_args()
    started = time.perf_counter()
    numbers = range(args.count) if args.only is None else range(args.only, args.only + 1)
    tally = run(args.seed, numbers, args.longest)
    print(json.dumps({**tally.as_json(), "seconds": round(time.perf_counter() - started, 1)}))
    return 1 if tally.tracebacks or tally.broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
