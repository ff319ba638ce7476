"""Rows from a local .jsonl file or a Hub dataset, each with the place it came from.

Knows files and the Hub; nothing of formats. Invariant: a row that cannot be read is an error with file and line,
never a row less; all bad lines of a file are reported together (the first ten by name).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.errors import DataError, MachineError, Problem
from qlora_cli.hub import hub_reachable

MOST_NAMED = 10
FILE_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".zip"})


@dataclass(frozen=True)
class SourceRow:
    """A row as it was read, and `FILE:LINE` or `ID[SPLIT]:INDEX`."""

    values: dict[str, Any]
    where: str


def is_local(source: str) -> bool:
    """Whether `source` names a file here rather than a dataset on the Hub."""
    has_suffix = Path(source).suffix.lower() in FILE_SUFFIXES  # a Hub id may hold a dot: `owner/rows-2.5`
    looks_like_path = source.startswith((".", "/", "~")) or has_suffix or source.count("/") != 1
    return looks_like_path or Path(source).exists()


def read_rows(source: str, split: str) -> list[SourceRow]:
    """All rows of `source`; `split` applies to the Hub only.

    Raises `DataError` for a file that is missing, empty or malformed, `MachineError` for a Hub out of reach.
    """
    rows = _read_jsonl(Path(source).expanduser()) if is_local(source) else _read_hub(source, split)
    if not rows:
        raise DataError(f"{source} has no rows", fix="check that this is the right file and that it is complete")
    return rows


def _read_jsonl(path: Path) -> list[SourceRow]:
    try:
        _check_file(path)
        with path.open("rb") as file:
            _check_head(path, file.read(4096).lstrip())
            file.seek(0)
            outcomes = [_parse_line(line, f"{path}:{number}") for number, line in enumerate(file, start=1)]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", fix="check its name and permissions") from error
    raise_all([outcome for outcome in outcomes if isinstance(outcome, Problem)])
    return [outcome for outcome in outcomes if isinstance(outcome, SourceRow)]


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder", fix="name one .jsonl file in it")
    if not path.exists():
        near = [entry.name for entry in sorted(path.parent.glob("*.jsonl"))[:5]] if path.parent.is_dir() else []
        hint = f"{path.parent} has: {', '.join(near)}" if near else "paths are relative to the current folder"
        raise DataError(f"{path}: no such file", fix=hint)
    if path.suffix.lower() not in {".jsonl", ".ndjson"}:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without suffix'}",
            why="rows are read from JSON Lines: one JSON object per line",
            fix="convert it to .jsonl",
        )


def _check_head(path: Path, head: bytes) -> None:
    """One error for a file that is something else as a whole, rather than one for each of its lines."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16", fix="save it as UTF-8")
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise DataError(
            f"{path} is one JSON array",
            why="rows are read from JSON Lines: one JSON object per line",
            fix=f"jq -c '.[]' {path} > rows.jsonl",
        )


def _parse_line(line: bytes, where: str) -> SourceRow | Problem | None:
    """The row in `line`, what is wrong with it, or None for a blank line."""
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return Problem(f"not UTF-8 (byte {error.start + 1} of the line)", fix="save the file as UTF-8", where=where)
    return _parse_object(text, where) if text else None


def _parse_object(text: str, where: str) -> SourceRow | Problem:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        fix = "write one JSON object per line"
        return Problem(f"not JSON: {error.msg} (column {error.colno})", fix=fix, where=where)
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        return Problem(f"not JSON that can be read: {error}", where=where)
    if not isinstance(values, dict):
        return Problem(f"a row must be a JSON object, but is: {text[:40]}", where=where)
    return SourceRow(values, where)


def _read_hub(source: str, split: str) -> list[SourceRow]:
    import datasets

    if not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # use what is in the cache, at once
    try:
        table = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _hub_error(source, split, error) from error
    return [SourceRow(dict(values), f"{source}[{split}]:{index}") for index, values in enumerate(table)]


def _hub_error(source: str, split: str, error: Exception) -> DataError | MachineError:
    detail = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if "split" in detail.lower() and isinstance(error, ValueError):
        return DataError(f"{source} has no split `{split}`: {detail}", fix="set data.split")
    return MachineError(
        f"{source}: no such file here, and the Hub dataset could not be read: {detail}",
        why="a gated or private dataset needs a login, and an offline machine a local copy",
        fix="run `hf auth login`, or name a local .jsonl file in data.train",
    )


def raise_all(problems: Sequence[Problem]) -> None:
    """Raises one `DataError` for all `problems`: the first ten in full, the others as a count."""
    if not problems:
        return
    shown = list(problems[:MOST_NAMED])
    if len(problems) > MOST_NAMED:
        shown.append(Problem(f"{len(problems) - MOST_NAMED} more rows like these"))
    raise DataError.of(shown)
