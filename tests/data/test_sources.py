"""Sources: what a path, a folder, a pattern or a dataset of the Hub names, and what is said where it names nothing."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from qlora_cli.data.hub_rows import HubName, HubSource, open_hub
from qlora_cli.data.sources import RestLost, Source, SourceRow, is_local, open_source, raise_all, read_rows
from qlora_cli.errors import DataError, MachineError, Problem


def read(path: Path) -> list[SourceRow]:
    return read_rows(str(path), "train")


def refusal(path: Path | str) -> DataError:
    with pytest.raises(DataError) as caught:
        read_rows(str(path), "train")
    return caught.value


def lay(folder: Path, **files: str) -> None:
    """Files of one row each, {"n": name}; `__` in a name stands for a folder, the first `_` for the dot."""
    for name, suffix in files.items():
        path = folder / f"{name.replace('__', '/')}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"n": name}).encode() + b"\n"
        path.write_bytes(gzip.compress(line) if suffix.endswith("gz") else line)


def names(source: Source, folder: Path) -> list[str]:
    return [Path(file).relative_to(folder).as_posix() for file in source.files]


def test_rows_carry_file_and_line_and_blank_lines_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "\xc3\xa4 \\u00e4"}')
    assert read(path) == [
        SourceRow({"text": "a"}, str(path), 1),
        SourceRow({"text": "ä ä"}, str(path), 4),
    ]
    assert [row.where for row in read(path)] == [f"{path}:1", f"{path}:4"]


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
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason[:30] for _, reason in BAD_LINES])
def test_a_line_that_cannot_be_read_is_named_by_file_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    problems = refusal(path).problems
    assert [(problem.where, problem.what) for problem in problems] == [(f"{path}:2", reason)]


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


def test_a_file_without_rows_among_others_is_none(tmp_path: Path) -> None:
    lay(tmp_path, a="jsonl")
    (tmp_path / "b.csv").write_text("text\n")
    assert [row.values for row in read(tmp_path)] == [{"n": "a"}]


def test_a_file_that_is_missing_is_refused_with_its_neighbours(tmp_path: Path) -> None:
    lay(tmp_path, rows="jsonl", other="csv")
    problem = refusal(tmp_path / "row.jsonl").problems[0]
    assert problem.what == f"{tmp_path / 'row.jsonl'}: no such file"
    assert problem.fix == f"{tmp_path} has: rows.jsonl"
    assert refusal(tmp_path / "zz.txt").problems[0].fix == f"{tmp_path} has: other.csv, rows.jsonl"


def test_a_missing_file_among_none_is_refused_with_where_paths_start(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no" / "rows.jsonl").problems[0].fix == "paths are relative to the current folder"


REFUSED = [
    ("a.zip", "it holds files, not rows"),
    ("a.jsonl.tar.gz", "it holds files, not rows"),
    ("a.pkl", "reading it could run code that it contains"),
    ("a.bin", "reading it could run code that it contains"),
    ("a.PT", "reading it could run code that it contains"),
    ("a.jsonl.xz", "this compression is not read"),
    ("a.xlsx", "spreadsheets are not read"),
    ("a.gz", "known are .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, .arrow, .feather, each also with .gz or "),
    ("a.xml", "known are .jsonl, "),
    ("a", "known are .jsonl, "),
]


@pytest.mark.parametrize(("name", "why"), REFUSED, ids=[name for name, _ in REFUSED])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    problem = refusal(tmp_path / name).problems[0]
    assert problem.what.startswith(f"{tmp_path / name}: cannot read ")
    assert problem.why.startswith(why)
    assert problem.fix


def test_a_path_that_the_system_refuses_is_refused(tmp_path: Path) -> None:
    problem = refusal(tmp_path / f"{'x' * 300}.jsonl").problems[0]
    assert problem.what.endswith("x.jsonl: cannot be read: File name too long")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    loop = f"{tmp_path}/loop.jsonl"
    assert refusal(loop).problems[0].what == f"{loop}: cannot be read: Too many levels of symbolic links"
    assert "names no file" in refusal(f"{tmp_path}/a\0.jsonl").problems[0].what
    assert "names no file" in refusal("~nobody-of-this-name/a.jsonl").problems[0].what


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert refusal(tmp_path / "rows.jsonl").problems[0].what == f"{tmp_path}/rows.jsonl is no regular file"


def test_a_name_that_is_no_utf_8_is_read_and_can_be_printed(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe4.jsonl"))
    path.write_text("{}\nno\n")
    outcomes = list(open_source(str(path)).rows())
    assert [each.where.encode() for each in outcomes] == [f"{tmp_path}/\\udce4.jsonl:{n}".encode() for n in (1, 2)]


def test_a_folder_is_all_its_data_files_in_order_but_hidden_ones(tmp_path: Path) -> None:
    lay(tmp_path, b="jsonl", a="jsonl.gz", z__c="json", z__y__d="ndjson", README="md", model="bin")
    (tmp_path / ".hidden.jsonl").write_text("{}\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.jsonl").write_text("{}\n")
    source = open_source(str(tmp_path))
    assert names(source, tmp_path) == ["a.jsonl.gz", "b.jsonl", "z/c.json", "z/y/d.ndjson"]
    rows = [row for row in source.rows() if isinstance(row, SourceRow)]
    assert [row.values["n"] for row in rows] == ["a", "b", "z__c", "z__y__d"]
    assert source.bytes == sum(Path(file).stat().st_size for file in source.files)


def test_a_link_to_a_folder_is_followed_but_not_back(tmp_path: Path) -> None:
    lay(tmp_path, rows__a="jsonl", other__b="jsonl")
    (tmp_path / "rows" / "back").symlink_to(tmp_path / "rows")
    (tmp_path / "rows" / "linked").symlink_to(tmp_path / "other")
    assert names(open_source(str(tmp_path / "rows")), tmp_path) == ["rows/a.jsonl", "rows/linked/b.jsonl"]
    assert names(open_source(f"{tmp_path}/**/*.jsonl"), tmp_path) == ["other/b.jsonl", "rows/a.jsonl"]


def test_a_folder_without_data_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no rows")
    assert refusal(tmp_path).problems[0].what == f"{tmp_path} holds no file that rows are read from"


def test_a_folder_that_datasets_saved_is_its_rows_and_one_of_several_splits_must_be_named(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "saved"))
    assert [row.values for row in read(tmp_path / "saved" / "train")] == [{"text": "a"}, {"text": "b"}]
    problem = refusal(tmp_path / "saved").problems[0]
    assert (problem.what, problem.fix) == (
        f"{tmp_path}/saved holds several splits",
        "name one of its folders: test, train",
    )


PATTERNS = [
    ("*.jsonl", ["a.jsonl", "b.jsonl"]),
    ("[a]*", ["a.csv", "a.jsonl"]),
    ("?.jsonl", ["a.jsonl", "b.jsonl"]),
    ("**/*.jsonl", ["a.jsonl", "b.jsonl", "z/c.jsonl", "z/y/d.jsonl"]),
    ("z/**", ["z/c.jsonl", "z/y/d.jsonl"]),
    ("*/c.*", ["z/c.jsonl"]),
    (".h*", [".h.jsonl"]),
]


@pytest.mark.parametrize(("pattern", "found"), PATTERNS, ids=[pattern for pattern, _ in PATTERNS])
def test_a_pattern_is_the_files_that_match_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, found: list[str]
) -> None:
    lay(tmp_path, b="jsonl", a="jsonl", z__c="jsonl", z__y__d="jsonl")
    (tmp_path / ".h.jsonl").write_text("{}\n")
    (tmp_path / "a.csv").write_text("n\na\n")
    assert names(open_source(f"{tmp_path}/{pattern}"), tmp_path) == found
    monkeypatch.chdir(tmp_path)
    assert open_source(pattern).files == tuple(found)


def test_a_pattern_without_a_match_is_refused_with_what_is_near(tmp_path: Path) -> None:
    lay(tmp_path, rows="csv")
    problem = refusal(f"{tmp_path}/*.jsonl").problems[0]
    assert (problem.what, problem.fix) == (f"{tmp_path}/*.jsonl: no file matches", f"{tmp_path} has: rows.csv")
    assert refusal(f"{tmp_path}/no/*.jsonl").problems[0].what == f"{tmp_path}/no/*.jsonl: no file matches"


def test_a_pattern_that_matches_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    lay(tmp_path, a="jsonl", b="md")
    assert refusal(f"{tmp_path}/*").problems[0].what == f"{tmp_path}/b.md: cannot read .md"


def test_a_name_with_brackets_that_exists_is_that_file(tmp_path: Path) -> None:
    lay(tmp_path, **{"a[1]": "jsonl", "a1": "jsonl"})
    assert [row.values for row in read(tmp_path / "a[1].jsonl")] == [{"n": "a[1]"}]


def test_a_tilde_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lay(tmp_path, a="jsonl")
    assert open_source("~/a.jsonl").files == (f"{tmp_path}/a.jsonl",)
    assert open_source("~/*.jsonl").files == (f"{tmp_path}/a.jsonl",)


def test_reading_goes_on_with_the_next_file_behind_a_damaged_one(tmp_path: Path) -> None:
    lay(tmp_path, a="jsonl", b="parquet", c="jsonl.gz")
    outcomes = list(open_source(str(tmp_path)).rows())
    assert [type(each) for each in outcomes] == [SourceRow, RestLost, SourceRow]


def test_the_fingerprint_is_of_content_order_and_format_not_of_names(tmp_path: Path) -> None:
    lay(tmp_path, one__a="jsonl", one__b="jsonl")
    first = open_source(str(tmp_path / "one")).fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    assert open_source(str(tmp_path / "two")).fingerprint() == first
    (tmp_path / "two" / "a.jsonl").rename(tmp_path / "two" / "c.jsonl")
    swapped = open_source(str(tmp_path / "two")).fingerprint()
    (tmp_path / "two" / "c.jsonl").rename(tmp_path / "two" / "c.txt")
    as_text = open_source(str(tmp_path / "two")).fingerprint()
    source = open_source(str(tmp_path / "two"))
    (tmp_path / "two" / "c.txt").write_text('{"n": "one__A"}\n')
    assert len({first, swapped, as_text, source.fingerprint()}) == 4


def test_a_file_here_has_no_config_and_no_revision(tmp_path: Path) -> None:
    lay(tmp_path, a="jsonl")
    for options in ({"config": "main"}, {"revision": "v1"}):
        with pytest.raises(DataError, match=f"a file here has no {next(iter(options))}"):
            open_source(str(tmp_path / "a.jsonl"), **options)


LOCAL = ["rows.jsonl", "./rows", "/a/b", "~/a", "a/b.jsonl", "a/b.csv", "a/b/c", "rows", "a/*", "a/b.arrow", "a/b.zst"]


@pytest.mark.parametrize("source", LOCAL)
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


def test_a_name_too_long_for_a_file_is_none_here() -> None:
    assert not is_local(f"owner/{'x' * 300}")


def test_a_hub_dataset_without_a_network_names_the_login_and_the_local_file() -> None:
    with pytest.raises(MachineError) as caught:
        read_rows("owner/rows-2.5", "train")
    problem = caught.value.problems[0]
    assert problem.what.startswith("owner/rows-2.5: no such file here, and the Hub dataset could not be read")
    assert "hf auth login" in problem.fix
    assert ".jsonl" in problem.fix


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `datasets` loads as it would load the Hub's: a folder with two configs and 300 rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "owner"
    folder.mkdir()
    rows = [{"text": f"row {n}", "turns": [{"role": "user"}]} for n in range(300)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = "".join(f"- config_name: {name}\n  data_files: a.jsonl\n" for name in ("one", "two"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return str(folder)


def test_a_hub_dataset_streams_its_rows_numbered_from_0(dataset: str) -> None:
    source = open_hub(HubName(dataset, "train", "one"))
    rows = list(source.rows())
    assert rows[0] == SourceRow({"text": "row 0", "turns": [{"role": "user"}]}, f"{dataset}[train]", 0)
    assert [row.where for row in rows] == [f"{dataset}[train]:{n}" for n in range(300)]
    assert (source.files, source.bytes) == ((f"{dataset}[train]",), None)


def test_the_fingerprint_of_a_hub_dataset_tells_splits_and_configs_apart(dataset: str) -> None:
    asked = [("train", "one"), ("train", "two"), ("train[:10]", "one"), ("train", "one")]
    prints = [open_hub(HubName(dataset, *each)).fingerprint() for each in asked]
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3


HUB_MISTAKES = [
    (("test", "one"), "has no split `test`: Unknown split", "set data.split"),
    (("train", "three"), "has no config `three`: BuilderConfig 'three' not found. Available: ['one', 'two']", "config"),
    (("train", None), "has several configs: Config name is missing.", "config"),
]


@pytest.mark.parametrize(("asked", "what", "fix"), HUB_MISTAKES, ids=[what[:18] for _, what, _ in HUB_MISTAKES])
def test_a_split_or_config_that_a_hub_dataset_has_not_is_named(
    dataset: str, asked: tuple[str, str | None], what: str, fix: str
) -> None:
    with pytest.raises(DataError) as caught:
        open_hub(HubName(dataset, *asked))
    problem = caught.value.problems[0]
    assert problem.what.startswith(f"{dataset} {what}")
    assert fix in problem.fix


def test_a_hub_dataset_that_is_a_program_is_refused(dataset: str) -> None:
    for file in Path(dataset).iterdir():
        file.unlink()
    (Path(dataset) / "owner.py").write_text("raise SystemExit\n")
    with pytest.raises(DataError, match="consists of a program"):
        open_hub(HubName(dataset, "train"))


def test_a_hub_dataset_without_rows_is_refused() -> None:
    from datasets import Dataset

    with pytest.raises(DataError, match=r"owner/x\[train\] has no rows"):
        list(HubSource(HubName("owner/x", "train"), Dataset.from_dict({"text": []})).rows())
