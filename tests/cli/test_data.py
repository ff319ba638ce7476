"""`qlora data` on the terminal, in a pipe and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli.app import main
from tests.conftest import chat_rows, write_jsonl

Run = Callable[..., str]
COLOURS = ("FORCE_COLOR", "NO_COLOR", "COLORTERM", "TERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "x\ty\x1b[31m"},
        {"role": "assistant", "content": "two\nlines 日本"},
        {"role": "user", "content": "[bold]"},
        {"role": "assistant", "content": "k"},
    ]
}
ROWS = [TWO_TURNS, *chat_rows(3), {"nothing": 1}, chat_rows(1)[0]]
OPTIONS = ["-q", "-s", "data.eval_split=1", "-s", "data.on_bad_row=skip", "-s", "data.cache=false"]
OPTIONS += ["-s", "train.packing=false"]


@pytest.fixture
def run(
    recipe_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Run:
    """A function that runs `qlora data` on six rows in the current folder and returns its stdout."""
    for name in COLOURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    recipe = recipe_file(rows=ROWS)

    def data(*arguments: str, code: int = 0) -> str:
        status = main(["data", str(recipe), *OPTIONS, "-s", "data.train=rows.jsonl", *arguments])
        captured = capsys.readouterr()
        assert (status, captured.err) == (code, "") if code == 0 else status == code, captured.err
        return captured.out

    return data


RECEIPT = """\
source                 read  kept  held out  dropped  cut  duplicates  overlap
rows.jsonl (messages)     6     4         1        1    0           1        0
rows.jsonl: 1 dropped: cannot be read

          rows  sequences  tokens  carry loss  share  shortest  median  90%  longest
train        4          4      80          25  31.2%        11      11   11       47
held out     1          1      11           2  18.2%        11      11   11       11
"""
FIRST = """
--- rows.jsonl:1: train; 47 tokens, 19 carry loss
<s><|user|>
x\ty␛[31m</s>
<|assistant|>
⟦two
lines 日本</s>⟧
<|user|>
[bold]</s>
<|assistant|>
⟦k</s>⟧
"""


def test_a_pipe_gets_the_receipt_and_rows_with_what_carries_loss_in_brackets(run: Run) -> None:
    assert run("--rows", "1") == RECEIPT + FIRST


def test_a_terminal_gets_colour_on_what_carries_loss_and_nothing_else(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    row = run("--rows", "1").removeprefix(RECEIPT)
    assert row.replace("\x1b[30;42m", "{").replace("\x1b[0m", "}") == (
        "\n--- rows.jsonl:1: train; 47 tokens, 19 carry loss\n"
        "<s><|user|>\nx       y␛[31m</s>\n<|assistant|>\n{two↵}\n{lines 日本</s>}\n"
        "<|user|>\n[bold]</s>\n<|assistant|>\n{k</s>}\n"
    )


def test_a_long_line_is_not_broken_for_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "10")):
        monkeypatch.setenv(name, value)
    assert "\x1b[30;42mlines 日本</s>\x1b[0m\n" in run("--rows", "1")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colour_gets_the_plain_form(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    assert run("--rows", "1") == RECEIPT + FIRST


def test_the_receipt_says_how_full_the_packs_are(run: Run) -> None:
    assert re.search(r"\npacked: \d+\.\d% of positions hold tokens\n$", run("--rows", "0", "-s", "train.packing=true"))
    assert run("--rows", "0") == RECEIPT


def test_three_rows_are_shown_unless_others_are_asked_for(run: Run) -> None:
    def shown(*arguments: str) -> int:
        return run(*arguments).count("\n--- rows.jsonl:")

    assert [shown(), shown("--rows", "2"), shown("--row", "rows.jsonl:5")] == [3, 2, 1]
    assert [shown("--lost"), shown("--row", "rows.jsonl:5", "--rows", "2"), shown("--rows", "0")] == [0, 3, 0]


def test_a_row_that_was_dropped_is_shown_with_the_reason(run: Run) -> None:
    assert run("--row", "rows.jsonl:5") == (
        f"{RECEIPT}\n--- rows.jsonl:5: dropped: cannot be read (field `messages` is missing (the row has: `nothing`))\n"
        '{"nothing": 1}\n'
    )


def test_control_characters_of_a_row_reach_no_terminal(run: Run, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "odd.jsonl", [*chat_rows(3), {"a\x1b[2J": "\x7f"}])
    out = run("--lost", "--row", "odd.jsonl:4", "-s", "data.train=odd.jsonl")
    assert "␡" in out
    assert not any(character in out for character in "\x1b\x7f")


def test_lost_rows_are_listed(run: Run) -> None:
    assert run("--lost").removeprefix(RECEIPT) == (
        "\n--- dropped, cut, duplicate or also held out: 2\n"
        "rows.jsonl:5: cannot be read (field `messages` is missing (the row has: `nothing`))\n"
        "rows.jsonl:6: duplicate\n"
    )
    everything = run("--lost-rows", "1", "-s", "data.max_length=20")
    assert everything.endswith(
        "\n--- dropped, cut, duplicate or also held out: 1 of 3\nrows.jsonl:1: longer than 20 tokens\n"
    )


def test_nothing_lost_is_said(run: Run, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good.jsonl", chat_rows(4))
    out = run("--lost", "-s", "data.train=good.jsonl")
    assert out.endswith("\n--- dropped, cut, duplicate or also held out: none\n")


def test_json_has_an_object_for_the_receipt_and_one_for_each_row(run: Run) -> None:
    found = [json.loads(line) for line in run("--json", "--rows", "1", "--lost").splitlines()]
    assert [each["event"] for each in found] == ["stage", "receipt", "lost_rows", "lost", "lost", "row"]
    receipt, count, lost, same, row = found[1:]
    assert (receipt["sources"][0]["read"], receipt["train"]["supervised_tokens"]) == (6, 25)
    assert count == {"event": "lost_rows", "count": 2, "shown": 2}
    assert (lost["where"], lost["counts"]) == ("rows.jsonl:5", ["cannot be read"])
    assert same == {"event": "lost", "where": "rows.jsonl:6", "counts": ["duplicate"]}
    assert row["text"] == (
        "<s><|user|>\nx\ty\x1b[31m</s>\n<|assistant|>\ntwo\nlines 日本</s>\n<|user|>\n[bold]</s>\n<|assistant|>\nk</s>"
    )
    assert (row["where"], row["became"], row["counts"]) == ("rows.jsonl:1", "train", [])
    assert (row["part"], row["parts"]) == (1, 1)
    assert (row["ids"][:3], row["tokens"][:3]) == ([1, 3, 203], ["<s>", "<|user|>", "Ċ"])
    assert row["supervised_tokens"] == sum(row["loss"]) == 19
    assert len(row["ids"]) == len(row["tokens"]) == len(row["loss"]) == 47


def test_json_of_a_row_without_tokens_has_what_it_says_instead(run: Run) -> None:
    row = json.loads(run("--json", "--row", "rows.jsonl:5").splitlines()[-1])
    assert row == {
        "event": "row",
        "where": "rows.jsonl:5",
        "became": "dropped",
        "counts": ["cannot be read"],
        "what": "field `messages` is missing (the row has: `nothing`)",
        "part": 1,
        "parts": 1,
        "supervised_tokens": 0,
        "ids": [],
        "tokens": [],
        "loss": [],
        "text": "",
        "values": '{"nothing": 1}',
    }


def test_a_limit_that_stops_training_ends_with_its_exit_code_after_the_rows(run: Run) -> None:
    assert run("--rows", "1", "-s", "data.limits.bad=0", code=4) == RECEIPT + FIRST


def test_rows_that_are_not_there_end_with_exit_code_four_and_no_result(run: Run) -> None:
    assert run("--row", "rows.jsonl:77", code=4) == ""
    assert run("-s", "data.train=missing.jsonl", code=4) == ""
    assert run("-s", "data.on_bad_row=error", code=4) == ""


def test_a_broken_recipe_ends_with_exit_code_three(run: Run) -> None:
    assert run("-s", "data.nonsense=1", code=3) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe, or give --clear-cache"),
        (["--rows", "2"], "name a recipe, or give --clear-cache"),
        (["x.yaml", "--clear-cache"], "give nothing else with it"),
        (["--clear-cache", "--lost"], "give nothing else with it"),
        (["x.yaml", "--row", "rows.jsonl"], "write FILE:LINE, e.g. rows.jsonl:12 (got rows.jsonl)"),
        (["x.yaml", "--row", ":3"], "write FILE:LINE"),
        (["x.yaml", "--row", "rows.jsonl:-3"], "write FILE:LINE"),
        (["x.yaml", "--rows", "-1"], "--rows"),
        (["x.yaml", "--lost-rows", "0"], "--lost-rows"),
    ],
)
def test_wrong_usage_exits_with_two_and_says_what_to_give(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in " ".join(captured.err.split())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QLORA_CACHE_LIMIT", "1")
    return tmp_path / "cache"


def entries(cache: Path) -> list[str]:
    return [path.name for path in (cache / "rows").iterdir() if not path.name.startswith(".")]


def test_clearing_the_cache_removes_encoded_rows_and_no_bases(
    run: Run, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = cache / "bases" / "kept"
    base.mkdir(parents=True)
    (base / "model.safetensors").write_bytes(b"weights")
    for length in ("60", "61"):
        run("--rows", "0", "-s", "data.cache=true", "-s", f"data.max_length={length}")
    sizes = [path.stat().st_size for name in entries(cache) for path in (cache / "rows" / name).iterdir()]
    assert len(entries(cache)) == 2
    monkeypatch.setenv("QLORA_CACHE_LIMIT", "0")  # what is there goes even where nothing more is kept
    assert main(["data", "--clear-cache", "--json"]) == 0
    done: dict[str, Any] = json.loads(capsys.readouterr().out)
    place = str(cache / "rows")
    assert done == {"event": "result", "place": place, "entries": 2, "bytes": sum(sizes), "in_use": 0}
    assert entries(cache) == []
    assert (base / "model.safetensors").read_bytes() == b"weights"


def test_clearing_the_cache_says_what_it_removed(run: Run, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--rows", "0", "-s", "data.cache=true")
    assert main(["data", "--clear-cache"]) == 0
    assert capsys.readouterr().out.startswith(f"1 entry of encoded rows removed from {cache / 'rows'} (")
    assert main(["data", "--clear-cache"]) == 0
    assert capsys.readouterr().out == f"0 entries of encoded rows removed from {cache / 'rows'} (0 kB)\n"


def test_a_cleared_cache_is_filled_again(run: Run, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run("--rows", "1", "-s", "data.cache=true")
    assert main(["data", "--clear-cache"]) == 0
    capsys.readouterr()
    assert run("--rows", "1", "-s", "data.cache=true") == first == RECEIPT + FIRST
    assert len(entries(cache)) == 1
