"""Rows from files: places, and what is said of files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_cli.data.sources import SourceRow, is_local, raise_all, read_rows
from qlora_cli.errors import DataError, MachineError, Problem


def read(path: Path) -> list[SourceRow]:
    return read_rows(str(path), "train")


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path)
    return caught.value


def test_rows_carry_file_and_line_and_blank_lines_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "\xc3\xa4 \\u00e4"}')
    assert read(path) == [
        SourceRow({"text": "a"}, f"{path}:1"),
        SourceRow({"text": "ä ä"}, f"{path}:4"),
    ]


def test_a_line_separator_inside_of_a_text_ends_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\n{"text": "d"}\n', encoding="utf-8")
    assert [row.values["text"] for row in read(path)] == ["a\u2028b\u0085c", "d"]


BAD_LINES = [
    (b'{"text": ', "not JSON: Expecting value (column 9)"),
    (b"{'text': 'a'}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
    (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data (column 15)"),
    (b'{"text": "\xe4"}', "not UTF-8 (byte 11 of the line)"),
    (b"[1, 2]", "a row must be a JSON object, but is: [1, 2]"),
    (b"7", "a row must be a JSON object, but is: 7"),
    (b'{"n": ' + b"1" * 5000 + b"}", "not JSON that can be read: "),
    (b'{"n": ' + b"[" * 100_000 + b"}", "not JSON that can be read: "),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason[:30] for _, reason in BAD_LINES])
def test_a_line_that_cannot_be_read_is_named_by_file_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    problems = refusal(path).problems
    assert len(problems) == 1
    assert problems[0].where == f"{path}:2"
    assert problems[0].what.startswith(reason)


def test_all_bad_lines_are_reported_together_the_first_ten_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + "no\n" * 13)
    problems = refusal(path).problems
    assert [problem.where for problem in problems] == [*(f"{path}:{line}" for line in range(2, 12)), ""]
    assert problems[-1].what == "3 more rows like these"


@pytest.mark.parametrize(("count", "last"), [(1, "1"), (10, "10"), (11, "1 more rows like these")])
def test_ten_problems_are_named_and_others_counted(count: int, last: str) -> None:
    with pytest.raises(DataError) as caught:
        raise_all([Problem(str(number)) for number in range(1, count + 1)])
    problems = caught.value.problems
    assert (len(problems), problems[-1].what) == (count, last)


def test_no_problem_raises_nothing() -> None:
    raise_all([])


@pytest.mark.parametrize("content", ["", "\n\n  \n", "\ufeff"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    assert refusal(path).problems[0].what == f"{path} has no rows"


def test_a_file_that_is_missing_is_refused_with_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    problem = refusal(tmp_path / "row.jsonl").problems[0]
    assert problem.what == f"{tmp_path / 'row.jsonl'}: no such file"
    assert problem.fix == f"{tmp_path} has: rows.jsonl"


def test_a_missing_file_among_none_is_refused_with_where_paths_start(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no" / "rows.jsonl").problems[0].fix == "paths are relative to the current folder"


def test_a_folder_or_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    assert refusal(tmp_path).problems[0].what == f"{tmp_path} is a folder"
    assert refusal(tmp_path / "rows.csv").problems[0].what == f"{tmp_path / 'rows.csv'}: cannot read .csv"


def test_a_path_that_the_system_refuses_is_refused(tmp_path: Path) -> None:
    problem = refusal(tmp_path / f"{'x' * 300}.jsonl").problems[0]
    assert problem.what.endswith("x.jsonl: cannot be read: File name too long")


def test_suffixes_are_read_without_regard_to_case_and_ndjson_is_jsonl(tmp_path: Path) -> None:
    for name in ("a.JSONL", "a.ndjson"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
        assert [row.values for row in read(tmp_path / name)] == [{"text": name}]


@pytest.mark.parametrize("source", ["rows.jsonl", "./rows", "/a/b", "~/a", "a/b.jsonl", "a/b.csv", "a/b/c", "rows"])
def test_paths_are_local(source: str) -> None:
    assert is_local(source)


@pytest.mark.parametrize("source", ["owner/rows", "owner/rows-2.5", "owner/v1.0-chat"])
def test_an_owner_and_a_name_are_on_the_hub_unless_they_exist_here(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local(source)
    Path(source).mkdir(parents=True)
    assert is_local(source)


def test_a_hub_dataset_without_a_network_names_the_login_and_the_local_file() -> None:
    with pytest.raises(MachineError) as caught:
        read_rows("owner/rows-2.5", "train")
    problem = caught.value.problems[0]
    assert problem.what.startswith("owner/rows-2.5: no such file here, and the Hub dataset could not be read")
    assert "hf auth login" in problem.fix
    assert ".jsonl" in problem.fix


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'[{"text": "a"},\n {"text": "b"}]\n', "is one JSON array"),
        (b'\xef\xbb\xbf\n [{"text": "a"}]', "is one JSON array"),
        ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16"),
    ],
)
def test_a_file_that_is_something_else_as_a_whole_is_one_error(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        read_rows(str(path), "train")
    assert len(caught.value.problems) == 1
