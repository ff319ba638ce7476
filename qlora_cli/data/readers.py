"""Rows from one file of any known format: the table of formats, and the readers of CSV, TSV and plain text.

Knows suffixes and heads of files, nothing of what a row means. Invariant: a reader yields rows and problems and raises
nothing; what it could not read of a file is a `RestLost`, never an early end.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qlora_cli.data.columnar import read_arrow, read_parquet
from qlora_cli.data.compressed import PACKINGS, DamagedError, unpacked, unpacked_file
from qlora_cli.data.json_rows import lines, read_json, read_lines
from qlora_cli.data.rows import LONGEST, Outcome, Place, Position, RestLost
from qlora_cli.errors import DataError

_SEPARATORS = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}
_NUL = "\udc00"  # stands for a NUL while a record is taken apart: before Python 3.11 the csv module stops at one
_UTF8 = "save the file as UTF-8"
_HEADS = (
    (codecs.BOM_UTF32_LE, "UTF-32", _UTF8),
    (codecs.BOM_UTF32_BE, "UTF-32", _UTF8),
    (codecs.BOM_UTF16_LE, "UTF-16", _UTF8),
    (codecs.BOM_UTF16_BE, "UTF-16", _UTF8),
    (b"\x1f\x8b", "compressed with gzip", "add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "add .zst to its name"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or save it as .csv"),
    (b"PAR1", "Parquet", "give it the suffix .parquet"),
    (b"ARROW1", "Arrow", "give it the suffix .arrow"),
)
_CODE = ("reading it could run code that it contains", "convert it to .jsonl or .parquet")
_ARCHIVE = ("it holds files, not rows", "unpack it")
_SHEET = ("spreadsheets are not read", "save the sheet as .csv")
REFUSED = {
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib"), _CODE),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".br"), ("this compression is not read", "compress it with gzip or zstd")),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), _SHEET),
}

StreamReader = Callable[["io.BufferedReader[Any]", Place], Iterator[Outcome]]
FileReader = Callable[[Path, Place], Iterator[Outcome]]


def read_table(stream: io.BufferedReader[Any], place: Place, separator: str) -> Iterator[Outcome]:
    """CSV or TSV with a header line; every value is text. A record may span lines; it is numbered by its first."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    records = csv.reader(_decoded(stream, Place("")), delimiter=separator, strict=True)
    header: list[str] | None = None
    try:
        for record in records:
            if header is None and record:
                header = record
                if refusal := _header_problem(header, separator, place):
                    yield refusal
                    return
            elif header is not None and record:
                yield _record(header, record, place)
            place.number = records.line_num + 1
    except csv.Error as error:  # where quotes do not pair, no later line can be trusted to start a record
        fix = 'quote a field that holds a quote, and write that quote twice: "say ""yes"""'
        yield place.rest_lost(f"the record that starts here cannot be taken apart: {error}", fix=fix)


def _decoded(stream: io.BufferedReader[Any], place: Place) -> Iterator[str]:
    """Lines as text; bytes that are no UTF-8 and NULs as lone surrogates, to be found in the record they are in."""
    for line in lines(stream, place):
        if line is None:
            raise csv.Error("a line is too long")
        plain = line.removeprefix(codecs.BOM_UTF8) if place.number == 1 else line
        yield plain.decode("utf-8", "surrogateescape").replace("\0", _NUL)


def _header_problem(header: Sequence[str], separator: str, place: Place) -> RestLost | None:
    fix = "write one name for each column into the first line, each once"
    if bad := _not_text("".join(header)):
        return place.rest_lost(f"the header is {bad}", fix=_UTF8)
    others = [name for each, name in _SEPARATORS.items() if each != separator and each in header[0]]
    if len(header) == 1 and others:
        what = f"the header is one column, `{header[0][:80]}`, whose names are separated by {others[0]}"
        return place.rest_lost(what, fix=f"separate columns by {_SEPARATORS[separator]} (.tsv: by a tab)")
    empty = [number for number, name in enumerate(header, start=1) if not name.strip()]
    if empty:
        return place.rest_lost(f"column {empty[0]} has no name", fix=fix)
    twice = [name for name, count in Counter(header).items() if count > 1]
    return place.rest_lost(f"the header names `{twice[0][:80]}` twice", fix=fix) if twice else None


def _record(header: Sequence[str], record: Sequence[str], place: Place) -> Outcome:
    if bad := _not_text("".join(record)):
        return place.problem(f"the record is {bad}", fix=_UTF8)
    if len(record) != len(header):
        fix = "quote a field that holds a separator or a line break"
        return place.problem(f"the record has {len(record)} fields, but the header {len(header)} columns", fix=fix)
    return place.row(dict(zip(header, record, strict=True)))


def _not_text(text: str) -> str:
    """Why text with lone surrogates is none; empty for any other."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return f"not UTF-8 (byte 0x{byte:02x})" if byte else "not text (a NUL)"
    return ""


def read_text(stream: io.BufferedReader[Any], place: Place) -> Iterator[Outcome]:
    """The whole file as one row, {"text": ...}, its line ends as they are; none where there is nothing but space. Lines
    or paragraphs as rows would be a guess: write .jsonl for these."""
    content = stream.read(LONGEST + 1).removeprefix(codecs.BOM_UTF8)
    if len(content) > LONGEST:
        yield place.too_long("the file, which is one row,")
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield place.problem(f"not UTF-8 (byte 0x{content[error.start]:02x} in line {line})", fix=_UTF8)
        return
    if "\0" in text:
        yield place.problem(f"not text (a NUL in line {text.count(chr(10), 0, text.index(chr(0))) + 1})")
    elif text.strip():
        yield place.row({"text": text})


def _streamed(reader: StreamReader, path: Path, place: Place) -> Iterator[Outcome]:
    with unpacked(path, place.position) as stream:
        if (found := _head_problem(stream.peek(4096)[:4096])) is not None:
            yield place.rest_lost(f"the file is {found[0]}, and its name says {path.suffix}", fix=found[1])
        else:
            yield from reader(stream, place)


def _head_problem(head: bytes) -> tuple[str, str] | None:
    """(what a file is that is something else than text, what to do about it)."""
    start = head.lstrip()
    for magic, name, fix in _HEADS:
        if start.startswith(magic):
            return name, fix
    odd, even = head[1::2].count(0), head[::2].count(0)
    if max(odd, even) * 4 > len(head) and min(odd, even) * 20 < len(head):  # a zero beside nearly every letter
        return "UTF-16", _UTF8
    return None


def _whole(reader: FileReader, path: Path, place: Place) -> Iterator[Outcome]:
    with unpacked_file(path) as plain:
        yield from reader(plain, place)


READERS: dict[str, FileReader] = {
    ".jsonl": partial(_streamed, read_lines),
    ".ndjson": partial(_streamed, read_lines),
    ".json": partial(_streamed, read_json),
    ".csv": partial(_streamed, partial(read_table, separator=",")),
    ".tsv": partial(_streamed, partial(read_table, separator="\t")),
    ".txt": partial(_streamed, read_text),
    ".parquet": partial(_whole, read_parquet),
    ".arrow": partial(_whole, read_arrow),
    ".feather": partial(_whole, read_arrow),
}


def format_of(path: Path) -> str | None:
    """The suffix of `READERS` that a file's name has, before that of a compression; None where it has none."""
    name = path.with_suffix("") if path.suffix.lower() in PACKINGS else path
    suffix = name.suffix.lower()
    return suffix if suffix in READERS else None


def unreadable(path: Path, file: str) -> DataError:
    """Why a file without known suffix is not read."""
    inner = path.with_suffix("") if path.suffix.lower() in PACKINGS else path
    known = f"{', '.join(READERS)}, each also with {' or '.join(PACKINGS)} behind it"
    why, fix = REFUSED.get(
        inner.suffix.lower(), (f"known are {known}", "convert it, or give it the suffix of its format")
    )
    return DataError(f"{file}: cannot read {inner.suffix or 'a file without suffix'}", why=why, fix=fix)


def read_file(path: Path, file: str, position: Position) -> Iterator[Outcome]:
    """The rows of one file, named `file` in what is said of them, and a problem for each that cannot be read;
    `position` follows how far it is read."""
    suffix = format_of(path)
    assert suffix is not None, "files without known suffix are refused before one is read"
    place = Place(file, position=position)
    try:
        yield from READERS[suffix](path, place)
    except DamagedError as error:
        yield place.rest_lost(f"the file is {error}", fix="fetch or write it again")
    except OSError as error:
        yield place.rest_lost(f"the file cannot be read: {error.strerror or error}")
