"""Rows from every format and compression, and what is said of each kind of damage."""

from __future__ import annotations

import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import feather, ipc, parquet

from qlora_cli.data.readers import READERS, read_file
from qlora_cli.data.rows import LONGEST, Outcome, Position, RestLost, SourceRow
from qlora_cli.errors import Problem

ROWS = [{"text": "ä \U0001f600", "id": "1"}, {"text": 'say "b"\nnow', "id": "2"}]


def table(rows: Sequence[Mapping[str, object]]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(list(rows))


def parquet_of(content: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(content, sink)
    return sink.getvalue()


def feather_of(content: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    feather.write_feather(content, sink)
    return sink.getvalue()


def stream_of(content: pyarrow.Table, rows_each: int | None = None) -> bytes:
    sink = io.BytesIO()
    with ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=rows_each)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}
CSV = '\ufefftext,id\r\n"ä \U0001f600",1\r\n\r\n"say ""b""\nnow",2'.encode()
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CONTENT: dict[str, bytes] = {
    ".jsonl": LINES,
    ".ndjson": LINES.replace(b"\n", b"\r\n\n")[:-3],
    ".json": json.dumps(ROWS, ensure_ascii=False, indent=2).encode(),
    ".csv": CSV,
    ".tsv": CSV.replace(b",", b"\t"),
    ".parquet": parquet_of(table(ROWS)),
    ".arrow": stream_of(table(ROWS), 1),
    ".feather": feather_of(table(ROWS)),
}
NUMBERS = {".ndjson": [1, 3], ".csv": [2, 4], ".tsv": [2, 4]}


def outcomes(path: Path, content: bytes) -> list[Outcome]:
    path.write_bytes(content)
    return list(read_file(path, path.name, Position()))


def told(found: list[Outcome]) -> list[object]:
    """Numbers of rows; problems as `FILE:NUMBER: what`, with `...` where the rest of the file is lost."""
    return [
        each.number if isinstance(each, SourceRow) else f"{each.where}: {each.what}{'...' * isinstance(each, RestLost)}"
        for each in found
    ]


def test_every_known_format_is_read_below() -> None:
    assert set(CONTENT) | {".txt"} == set(READERS)


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", CONTENT)
def test_rows_of_every_format_and_compression(tmp_path: Path, suffix: str, packing: str) -> None:
    found = outcomes(tmp_path / f"Rows{suffix.upper()}{packing}", PACK[packing](CONTENT[suffix]))
    rows = [row for row in found if isinstance(row, SourceRow)]
    assert [row.values for row in rows] == ROWS
    assert [row.number for row in rows] == NUMBERS.get(suffix, [1, 2])
    assert rows[0].where == f"Rows{suffix.upper()}{packing}:{rows[0].number}"
    assert len(found) == 2


@pytest.mark.parametrize("packing", PACK)
def test_a_text_file_is_one_row_whose_line_ends_stay(tmp_path: Path, packing: str) -> None:
    found = outcomes(tmp_path / f"a.txt{packing}", PACK[packing](b"\xef\xbb\xbfone\r\n\ntwo\n"))
    assert found == [SourceRow({"text": "one\r\n\ntwo\n"}, f"a.txt{packing}", 1)]


@pytest.mark.parametrize("content", [b"\n \n", b"\xef\xbb\xbf"])
def test_a_text_file_of_nothing_but_space_is_no_row(tmp_path: Path, content: bytes) -> None:
    assert outcomes(tmp_path / "a.txt", content) == []


def test_one_object_per_line_is_read_from_a_file_named_json(tmp_path: Path) -> None:
    assert told(outcomes(tmp_path / "a.json", b'\n{"a": 1}\nno\n{"a": {}}')) == [
        2,
        "a.json:3: not JSON: Expecting value (column 1)",
        4,
    ]
    chat = b'{"messages": [{"role": "user"}]}'
    assert told(outcomes(tmp_path / "b.json", chat)) == [1]
    assert told(outcomes(tmp_path / "c.json", b'{"data": [{"a": 1}]}\n{"data": [{"a": 1}]}\n')) == [1, 2]
    assert told(outcomes(tmp_path / "d.json", b'{"a": \n{"a": 1}\n')) == [
        "d.json:1: not JSON: Expecting value (column 6)",
        2,
    ]


LINE_DAMAGE = [
    (b'{"a": 1, "b": {"c": 1, "c": 1}}', 'the key "c" stands twice in one object'),
    (b'{"\\ud800": 1, "\\ud800": 1}', 'the key "\\ud800" stands twice in one object'),
    (b'{"a": NaN}', "not JSON: NaN"),
    (b'{"a": [-Infinity]}', "not JSON: -Infinity"),
    (b'{"a": -1e999}', "the number -1e999 is too large to be read"),
    (b'{"a": "\\ud83d"}', "half of a character (a lone \\ud800 to \\udfff) is no text"),
    (b'{"\\uDE00": "a"}', "half of a character (a lone \\ud800 to \\udfff) is no text"),
    (b'{"a": ' + b"[" * 201 + b"]" * 201 + b"}", "nested more than 200 deep"),
    (b'{"a": ' + b"[" * 100_000 + b"}", "nested more than 200 deep"),
    (b'{"a": ' + b"1" * 5000 + b"}", "a number of thousands of digits, which cannot be read"),
    (b'{"a": "\x00"}', "not JSON: Invalid control character at (column 8)"),
    (b"\x00\x00", "not JSON: Expecting value (column 1)"),
    (b'  {"a": 1]', "not JSON: Expecting ',' delimiter (column 10)"),
    (b'"' + b"a" * 50 + b'"', 'a row must be a JSON object, but is: "' + "a" * 39),
    (b"\xc2\xa0", "not JSON: Expecting value (column 1)"),
]


@pytest.mark.parametrize(("line", "what"), LINE_DAMAGE, ids=[what[:30] for _, what in LINE_DAMAGE])
def test_an_object_that_would_be_read_wrong_is_refused_and_reading_goes_on(
    tmp_path: Path, line: bytes, what: str
) -> None:
    found = outcomes(tmp_path / "a.jsonl", b"{}\n" + line + b"\n{}\n")
    assert told(found) == [1, f"a.jsonl:2: {what}", 3]


ARRAY_DAMAGE = [case for case in LINE_DAMAGE if "column" not in case[1]]


@pytest.mark.parametrize(("element", "what"), ARRAY_DAMAGE, ids=[what[:30] for _, what in ARRAY_DAMAGE])
def test_an_element_that_would_be_read_wrong_is_refused_and_reading_goes_on_where_it_can(
    tmp_path: Path, element: bytes, what: str
) -> None:
    found = told(outcomes(tmp_path / "a.json", b"[{},\n" + element + b", {}]"))
    deep = ["a.json:2: not JSON: nested too deeply (line 2, column 1)..."]
    assert found == [1, *(deep if len(element) > 50_000 else [f"a.json:2: {what}", 3])]


def test_escapes_of_whole_characters_and_of_nul_are_text(tmp_path: Path) -> None:
    found = outcomes(tmp_path / "a.jsonl", b'{"a": "\\ud83d\\ude00 \\\\ud800 \\u0000"}')
    assert found == [SourceRow({"a": "\U0001f600 \\ud800 \0"}, "a.jsonl", 1)]


def test_nesting_of_200_is_read(tmp_path: Path) -> None:
    assert told(outcomes(tmp_path / "a.jsonl", b'{"a": ' + b"[" * 199 + b"]" * 199 + b"}")) == [1]


def test_many_shallow_objects_in_a_row_are_not_deep(tmp_path: Path) -> None:
    assert told(outcomes(tmp_path / "a.jsonl", json.dumps({"a": [{}] * 300}).encode())) == [1]


NO_ROW = "a row must be a JSON object, but is:"
JSON_DAMAGE = [
    (b"[{}, {}", [1, 2, "3: not JSON: expected `,` or `]`, but found 'the end of the file' (line 1, column 8)..."]),
    (b"[{},\n {} {}]", [1, 2, "3: not JSON: expected `,` or `]`, but found '{' (line 2, column 5)..."]),
    (b"[{},\n\n]", [1, "2: not JSON: Expecting value (line 3, column 1)..."]),
    (b'[{}, {"a": tru', [1, "2: not JSON: Expecting value (line 1, column 12)..."]),
    (b'[{}, {"a": "b', [1, "2: not JSON: Unterminated string starting at (line 1, column 12)..."]),
    (b"[{}] x", [1, "2: not JSON: 'x' behind the end of the array (line 1, column 6)..."]),
    (b'[{}, {"a": "\xe4"}, {}]', [1, "2: not UTF-8 (byte 0xe4)", 3]),
    (b"[{}, \xe4, {}]", [1, "2: not JSON: Expecting value (line 1, column 6)..."]),
    (b"[{}, 12, [1], {}]", [1, f"2: {NO_ROW} 12", f"3: {NO_ROW} [1]", 4]),
    (b"[ ]", []),
    (b'{\n "data": [{}]}', ["1: the file is an object that spans lines, not rows..."]),
    (b'{"data": [{}]}\n', ["1: the rows are inside of the key `data`..."]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), JSON_DAMAGE, ids=[repr(content)[:30] for content, _ in JSON_DAMAGE])
def test_damage_of_an_array_is_named_by_row_line_and_column(
    tmp_path: Path, content: bytes, expected: list[object]
) -> None:
    expected = [f"a.json:{each}" if isinstance(each, str) else each for each in expected]
    assert told(outcomes(tmp_path / "a.json", content)) == expected


def test_rows_of_an_array_across_many_blocks_come_whole(tmp_path: Path) -> None:
    rows = [{"n": n, "text": 'ä\\"' * (n % 700)} for n in range(1500)]
    rows.append({"n": 1500, "text": "b" * 1_000_000})
    content = json.dumps(rows, ensure_ascii=False).encode()
    assert len(content) > 3 << 20
    assert [row.values for row in outcomes(tmp_path / "a.json", content) if isinstance(row, SourceRow)] == rows


def test_the_place_in_an_array_counts_over_blocks(tmp_path: Path) -> None:
    content = b'[{"a": "' + b"x" * 300_000 + b'"},\n{"a": "' + b"x" * 300_000 + b'"}, no]'
    assert told(outcomes(tmp_path / "a.json", content)) == [
        1,
        2,
        "a.json:3: not JSON: Expecting value (line 2, column 300012)...",
    ]


RAGGED = "the record has %d fields, but the header 2 columns"
TABLE_DAMAGE = [
    (b"a,b\n1,2\n1\n1,2,3\n4,5", [2, f"3: {RAGGED % 1}", f"4: {RAGGED % 3}", 5]),
    (b"a,b\n1,\xe4\n1,2\n", ["2: the record is not UTF-8 (byte 0xe4)", 3]),
    (b"a,b\n1,\x00\n1,2\n", ["2: the record is not text (a NUL)", 3]),
    (b'a,b\n1,2\n1,"2\n3,4\n', [2, "3: the record that starts here cannot be taken apart: unexpected end of data..."]),
    (b'a,b\n"1" x,2\n3,4\n', ["2: the record that starts here cannot be taken apart: ',' expected after '\"'..."]),
    (b"a,b,a\n1,2,3\n", ["1: the header names `a` twice..."]),
    (b"a,,c\n1,2,3\n", ["1: column 2 has no name..."]),
    (b"a;b\n1;2\n", ["1: the header is one column, `a;b`, whose names are separated by a semicolon..."]),
    (b"\xe4,b\n1,2\n", ["1: the header is not UTF-8 (byte 0xe4)..."]),
    (b"a,b\n", []),
    (b"a\n\n1\n", [3]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), TABLE_DAMAGE, ids=[repr(content)[:30] for content, _ in TABLE_DAMAGE])
def test_damage_of_a_table_is_named_by_the_first_line_of_the_record(
    tmp_path: Path, content: bytes, expected: list[object]
) -> None:
    expected = [f"a.csv:{each}" if isinstance(each, str) else each for each in expected]
    assert told(outcomes(tmp_path / "a.csv", content)) == expected


HEADS = [
    ("a.jsonl", b"\xff\xfe{\x00}\x00", "the file is UTF-16, and its name says .jsonl"),
    ("a.csv", "a,b\n1,2\n".encode("utf-16-le"), "the file is UTF-16, and its name says .csv"),
    ("a.txt", "a text".encode("utf-32"), "the file is UTF-32, and its name says .txt"),
    ("a.jsonl", gzip.compress(b"{}"), "the file is compressed with gzip, and its name says .jsonl"),
    ("a.json", zstd(b"{}"), "the file is compressed with zstd, and its name says .json"),
    ("a.csv", b"PK\x03\x04...", "the file is a zip archive or a spreadsheet, and its name says .csv"),
    ("a.jsonl", CONTENT[".parquet"], "the file is Parquet, and its name says .jsonl"),
    ("a.jsonl", CONTENT[".feather"], "the file is Arrow, and its name says .jsonl"),
    ("a.jsonl", b"[{}]", "the file is one JSON array, and its name says one object per line"),
    ("a.jsonl.gz", b"{}\n", "the file is not gzip, damaged or cut short: Not a gzipped file (b'{}')"),
    ("a.jsonl.gz", b"", "the file is empty, not even the start of a gzip file"),
    ("a.csv.zst", b"", "the file is empty, not even the start of a zstd file"),
    ("a.arrow", b"", "the file is empty, and no Arrow file"),
    ("a.feather", b"FEA1....", "the file is Feather of version 1"),
    ("a.arrow", parquet_of(table(ROWS)), "the file is no Arrow, damaged or cut short: "),
    ("a.parquet", b"", "the file is no Parquet, damaged or cut short: "),
    ("a.parquet", feather_of(table(ROWS)), "the file is no Parquet, damaged or cut short: "),
    ("a.parquet.gz", b"PAR1", "the file is not gzip, damaged or cut short: "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "what"), HEADS, ids=[f"{name} {what[9:40]}" for name, _, what in HEADS])
def test_a_file_that_is_something_else_than_its_name_says_is_one_problem(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    found = outcomes(tmp_path / name, content)
    assert [type(each) for each in found] == [RestLost]
    assert str(told(found)[0]).startswith(f"{name}:1: {what}")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", CONTENT)
def test_a_compressed_file_that_is_cut_short_never_ends_like_a_whole_one(
    tmp_path: Path, suffix: str, packing: str
) -> None:
    whole = PACK[packing](CONTENT[suffix] if suffix != ".jsonl" else random.Random(0).randbytes(9000).hex().encode())
    for length in (1, len(whole) // 2, len(whole) - 1):
        found = outcomes(tmp_path / f"a{suffix}{packing}", whole[:length])
        assert isinstance(found[-1], RestLost)
        assert "damaged or cut short" in found[-1].what


def test_lines_before_a_damage_are_rows_and_it_is_named_by_the_line_behind_them(tmp_path: Path) -> None:
    noise = random.Random(0)
    lines = [json.dumps({"text": noise.randbytes(200).hex()}) + "\n" for _ in range(5000)]
    packed = gzip.compress("".join(lines).encode())
    found = outcomes(tmp_path / "a.jsonl.gz", packed[: len(packed) // 2])
    rows = [each for each in found if isinstance(each, SourceRow)]
    assert 1000 < len(rows) < 2500
    assert [row.values for row in rows] == [json.loads(line) for line in lines[: len(rows)]]
    assert [each.where for each in found if isinstance(each, Problem)] == [f"a.jsonl.gz:{len(rows) + 1}"]


def test_an_arrow_stream_that_is_cut_between_batches_is_a_problem(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with ipc.new_stream(sink, table(ROWS).schema) as writer:
        writer.write_table(table(ROWS[:1]))
        cut = sink.tell()
        writer.write_table(table(ROWS[1:]))
    assert told(outcomes(tmp_path / "a.arrow", sink.getvalue())) == [1, 2]
    found = told(outcomes(tmp_path / "a.arrow", sink.getvalue()[:cut]))
    assert found == [1, "a.arrow:2: the stream has no end mark: it was cut short..."]


def test_a_row_of_parquet_whose_text_is_no_utf_8_is_found_among_its_neighbours(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xe4", b"c"] * 100, pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path)
    found = list(read_file(path, "a.parquet", Position()))
    assert [each.values["text"] for each in found if isinstance(each, SourceRow)] == ["a", "c"] * 100
    assert [each.where for each in found if isinstance(each, Problem)] == [f"a.parquet:{n}" for n in range(2, 301, 3)]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    for name, content in (("a.parquet", parquet_of(twice)), ("a.arrow", stream_of(twice))):
        assert told(outcomes(tmp_path / name, content)) == [f"{name}:1: two columns have the name `text`..."]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"a\nb\xe4", "not UTF-8 (byte 0xe4 in line 2)"),
        (b"a\n\nb\x00", "not text (a NUL in line 3)"),
    ],
)
def test_a_text_file_that_is_no_text_is_a_problem(tmp_path: Path, content: bytes, what: str) -> None:
    assert told(outcomes(tmp_path / "a.txt", content)) == [f"a.txt:1: {what}"]


def test_a_row_of_50_mb_is_read(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b'{"text": "%b"}'), ("a.json", b'[{"text": "%b"}]'), ("a.csv", b"text\n%b")):
        found = outcomes(tmp_path / name, content % (b"x" * 50_000_000))
        assert [len(each.values["text"]) for each in found if isinstance(each, SourceRow)] == [50_000_000]


def test_a_longer_row_than_is_held_in_memory_is_a_problem(tmp_path: Path) -> None:
    long = b'{"text": "' + b"x" * LONGEST + b'"}'
    assert told(outcomes(tmp_path / "a.jsonl", b"{}\n" + long + b"\n{}")) == [
        1,
        "a.jsonl:2: the line is longer than 64 MiB",
        3,
    ]
    assert told(outcomes(tmp_path / "a.csv", b"text\n" + long)) == [
        "a.csv:2: the record that starts here cannot be taken apart: a line is too long..."
    ]


def test_a_file_that_goes_away_is_a_problem(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.arrow", "a.csv.gz"):
        found = list(read_file(tmp_path / name, name, Position()))
        assert [type(each) for each in found] == [RestLost]
        assert "No such file" in str(found[0])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet"])
def test_reading_20_mb_takes_less_than_4_mb_of_memory(tmp_path: Path, name: str) -> None:
    row = {"text": "x" * 1000}
    line = json.dumps(row).encode()
    parts = {"a.json": b"[" + b",\n".join([line] * 20_000) + b"]", "a.csv": b"text\n" + (b"x" * 1000 + b"\n") * 20_000}
    content = parts.get(name, (line + b"\n") * 20_000)
    packed = gzip.compress(content, 1) if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(parquet_of(table([row] * 20_000)) if name == "a.parquet" else packed)
    next(read_file(tmp_path / name, name, Position()))  # what is imported by need is no part of it
    tracemalloc.start()
    try:
        count = sum(isinstance(each, SourceRow) for each in read_file(tmp_path / name, name, Position()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 4_000_000


PIECES = [b"\0", b"\xff\xfe", b'"', b"{", b"[", b"\\ud800", b"\n", b"\r", b"1e999", b"NaN", b"\xe4", b"]", b"9" * 5000]


def mutated(content: bytes, noise: random.Random) -> bytes:
    """`content` with a few bytes cut, changed, put in or repeated."""
    data = bytearray(content)
    for _ in range(noise.choice((1, 1, 2, 5))):
        at = noise.randrange(len(data)) if data else 0
        change = noise.randrange(5)
        if change == 0:
            del data[at:]
        elif change == 1:
            data[at : at + 1] = noise.randbytes(1)
        elif change == 2:
            data[at:at] = noise.choice(PIECES)
        elif change == 3:
            del data[at : at + noise.randrange(1, 40)]
        else:
            data[at:at] = data[max(0, at - 30) : at]
    return bytes(data)


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [*CONTENT, ".txt"])
def test_whatever_is_done_to_a_file_rows_and_problems_come_out(tmp_path: Path, suffix: str, packing: str) -> None:
    noise = random.Random(f"{suffix}{packing}")
    content, problems = PACK[packing](CONTENT.get(suffix, b"a text\nof lines")), 0
    for number in range(60):
        name = f"{number}{suffix}{packing}"
        for each in outcomes(tmp_path / name, mutated(content, noise)):
            assert isinstance(each, SourceRow | Problem)
            if isinstance(each, SourceRow):
                json.dumps(each.values, ensure_ascii=False).encode()
                assert each.where.startswith(f"{name}:")
            else:
                str(each).encode()
                assert each.where.startswith(f"{name}:")
                problems += 1
    assert problems >= 5
