"""`qlora report`: what a page, a Markdown file and a picture say of runs that are whole, at work or damaged."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli.app import main
from qlora_cli.errors import DiskError, ModelError
from qlora_cli.workflows.report import run_report
from qlora_cli.workflows.report_content import document
from qlora_cli.workflows.report_html import html_page
from qlora_cli.workflows.report_points import MOST, Point, series, smoothed, thin
from qlora_cli.workflows.report_read import read_record
from qlora_cli.workflows.report_svg import nice_ticks
from tests.workflows.report_runs import add_evaluation, add_merge, add_samples, write_object, write_run

RECORDS = ("status.json", "metrics.jsonl", "resolved.yaml", "plan.json", "data_receipt.json", "lock.json")
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """A page's elements with their attributes, its text, and what stands in each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text, self._open = "", [""]
        self.feed(text)
        assert self._open == [""], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
            self.raw.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1] in {"script", "style"}:
            self.raw[self._open[-1]][-1] += data
        else:
            self.text += f" {data}"

    def count(self, tag: str, kind: str = "") -> int:
        return sum(name == tag and kind in each.get("class", "") for name, each in self.elements)

    @property
    def values(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.raw["script"][0])
        return found


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def page_of(*runs: Path) -> Page:
    path = run_report(runs, None).path
    assert path is not None
    return Page(path.read_text(encoding="utf-8"))


def markdown_of(*runs: Path) -> str:
    return run_report(runs, None, "md").text


def full_run(path: Path, **changes: Any) -> Path:
    run = write_run(path, **changes)
    add_samples(run)
    add_evaluation(run)
    add_merge(run)
    return run


def rows_of(text: str) -> list[list[str]]:
    """The rows of all Markdown tables; each table is as wide in every row."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    tables = [[line.removeprefix("| ").removesuffix(" |").split(" | ") for line in block] for block in blocks]
    assert tables
    assert [table for table in tables if len(set(map(len, table))) > 1] == []
    return [row for table in tables for row in table]


def test_a_run_as_training_and_evaluation_leave_it_is_reported_with_its_own_figures(
    recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["-s", "eval.metrics=[exact]", "-s", "eval.samples=[hello there]", "-s", "eval.max_new_tokens=2"]
    assert main(["train", str(recipe_file()), "-o", "run", "-q", *asked]) == 0
    assert main(["eval", "run", "--against", "base", "-q"]) == 0
    capsys.readouterr()
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    page, lines = Page(Path("report.html").read_text()), Path("run/metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if line["kind"] == "step"]
    held_out = [line for line in map(json.loads, lines) if line["kind"] == "eval"]
    assert f"{steps[-1]['loss']:.4f}" in page.text
    assert f"{held_out[-1]['loss']:.4f}" in page.text
    assert f"{held_out[-1]['scores'][0]['right']} of 4" in page.text
    assert page.values["loss"]["lines"][0]["values"] == [float(f"{line['loss']:.5g}") for line in steps]
    result = json.loads(next(Path("run/evaluations").iterdir()).read_text())
    assert f"{result['interval']['low']:.4f} to {result['interval']['high']:.4f}" in page.text
    assert f"{result['against']['difference']['mean']:+.4f} (" in page.text
    assert "hello there" in page.text
    sections = [each["id"] for tag, each in page.elements if tag == "section"]
    assert sections == [*("summary", "curves", "evaluation", "samples", "data", "memory", "recipe", "environment")]
    assert page.count("p", "warns") == 0


def test_everything_that_is_known_of_a_run_is_on_its_page(place: Path) -> None:
    page = page_of(full_run(place / "demo"))
    ids = [each["id"] for tag, each in page.elements if tag == "section"]
    assert ids == [
        *("summary", "curves", "evaluation", "samples", "data", "memory", "merge", "recipe", "environment"),
    ]
    said = " ".join(page.text.split())
    for text in (
        *("meta-llama/Llama-3.1-8B", "NVIDIA A10G", "2:03:04"),
        *(
            "-0.5000 (-0.6000 to -0.4000) nats per token",
            "1.1900 to 1.2700",
            "190 of 200",
            "91.0% to 97.0%",
            "+0.8000 (+0.7400 to +0.8600)",
            "1.0e-09",
        ),
        *("mmlu.jsonl", "153 of 300", "52.0% (46.0% to 58.0%)", "31.0%", "+0.2000 (+0.1400 to +0.2600)", "4.0e-04"),
        *("astronomy", "51 of 100", "arc_easy acc,none 0.61 0.0123 2,376", "chat.jsonl", "code.jsonl"),
        *("Explain to a child why the sky is blue.", '{"name": "Ada Lovelace", "born": 1815}', "ended: stop token"),
        *("88 too long; 12 duplicate", "2,911,204 (60%)", "94.7% of positions hold tokens"),
        *("8.88 GB", "8.69 GB (98% of the plan)", "4-bit weights"),
        *("dequantized bf16", "passed", "2.4e-04", "99.9%"),
        *("lora.r", "mine.yaml:4", "bitsandbytes", "0.50.2"),
    ):
        assert text in said, text


def test_the_page_loads_nothing_and_lets_the_browser_run_nothing_else(place: Path) -> None:
    page = page_of(full_run(place / "demo"))
    links = [each[name] for _, each in page.elements for name in ("href", "src") if name in each]
    assert links
    assert [link for link in links if not link.startswith(("#", "data:,"))] == []
    assert [each for _, each in page.elements if "style" in each or any(name.startswith("on") for name in each)] == []
    policy = next(each["content"] for _, each in page.elements if each.get("http-equiv") == "Content-Security-Policy")
    for kind, text in (("style", page.raw["style"][0]), ("script", page.raw["script"][1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "@import" not in page.raw["style"][0]
    assert "url(" not in page.raw["style"][0]


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def evil_run(path: Path) -> Path:
    """Every text of it is markup."""
    run = full_run(path, base=EVIL, state="failed")
    for name in ("plan.json", "data_receipt.json", "lock.json", "merged/merge_receipt.json"):
        write_object(run / name, _spoiled(json.loads((run / name).read_text())))
    for file in (run / "evaluations").iterdir():
        write_object(file, _spoiled(json.loads(file.read_text())))
    status = json.loads((run / "status.json").read_text())
    write_object(run / "status.json", {**status, "reason": EVIL})
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [_spoiled(json.loads(line), keep=("kind",)) for line in (run / name).read_text().splitlines()]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (run / "resolved.yaml").open("a") as recipe:
        recipe.write(f"extra: {{{json.dumps('k' + EVIL)}: {json.dumps(EVIL)}}}  # {EVIL}\n")
    return run


def _spoiled(value: Any, keep: tuple[str, ...] = ()) -> Any:
    if isinstance(value, dict):
        return {key: each if key in keep else _spoiled(each) for key, each in value.items()} | {EVIL: 1}
    if isinstance(value, list):
        return [_spoiled(each) for each in value]
    return EVIL if isinstance(value, str) else value


def test_no_text_of_a_run_becomes_an_element_of_the_page(place: Path) -> None:
    name = EVIL.replace("/", "\N{DIVISION SLASH}").replace("<\N{DIVISION SLASH}", "<")
    good, evil = page_of(full_run(place / "good")), page_of(evil_run(place / name))
    assert evil.count("script") == good.count("script") == 2
    assert evil.count("img") == 0
    assert {tag for tag, _ in evil.elements} <= {tag for tag, _ in good.elements} | {"p"}
    assert evil.text.count("onerror=alert(2)") > 20
    both = page_of(place / "good", place / name)
    assert both.count("script") == 2
    assert any("onerror" in line["name"] for line in both.values["loss"]["lines"])


def test_no_text_of_a_run_becomes_an_element_of_the_markdown(place: Path) -> None:
    text = markdown_of(evil_run(place / "evil"))
    assert "<" not in text.replace("<!-- qlora report", "")
    assert rows_of(text)


def test_a_cell_of_markdown_cannot_break_its_table(place: Path) -> None:
    run = write_run(place / "demo")
    (run / "samples.jsonl").write_text(
        json.dumps({"step": 1, "prompt": "a|b", "answer": "x|y\n# z\n| q", "ended": "`"})
    )
    assert ["1", "x\\|y / \\# z / \\| q", "\\`"] in rows_of(markdown_of(run))


def test_secrets_are_told_in_no_format(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "abcDEF123456" * 3
    monkeypatch.setenv("JUDGE_API_KEY", "correct-horse-7-battery")
    run = full_run(place / "demo")
    for text in (secret, "correct-horse-7-battery"):
        with (run / "samples.jsonl").open("a") as samples:
            samples.write(
                json.dumps({"step": 1, "prompt": f"use {text}", "answer": f"I use {text}", "ended": text}) + "\n"
            )
        with (run / "resolved.yaml").open("a") as recipe:
            recipe.write(f"note{len(text)}: plain  # {text}\n")
    status = json.loads((run / "status.json").read_text())
    write_object(run / "status.json", {**status, "reason": secret, "state": "failed"})
    write_object(run / "lock.json", {"device": secret, "base": {"name": secret}, "versions": {secret: secret}})
    write_object(
        run / "data_receipt.json", {"sources": [{"source": secret, "dropped": {secret: 1}}], "notes": [secret]}
    )
    html = run_report([run], place / "report.html").path
    assert html is not None
    for text in (html.read_text(), markdown_of(run)):
        assert secret not in text
        assert "correct-horse-7-battery" not in text
        assert text.count("[secret]") >= 8 or text.count("\\[secret\\]") >= 8


DAMAGES: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"kind": "step", "step": 1, "lo',
    "no text": b"\xff\xfe\x00\x9d" * 50,
    "another kind": b"[1, 2]",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("name", [*RECORDS, "samples.jsonl", "evaluations/2026-11-22T10-00-00.json"])
def test_a_damaged_record_is_said_and_the_others_are_shown(name: str, place: Path) -> None:
    run = full_run(place / "demo")
    for what, damage in DAMAGES.items():
        (run / name).write_bytes(damage)
        result = run_report([run], place / "report.html")
        page = Page((place / "report.html").read_text())
        silent = what == "empty" and name.endswith((".jsonl", ".yaml"))
        assert silent or any(Path(name).name in problem for problem in result.problems), (name, what)
        assert page.count("p", "warns") == len(result.problems), (name, what)
        assert "anatomy" in page.text or "2,911,204" in page.text


@pytest.mark.parametrize("name", RECORDS)
def test_a_run_that_lacks_a_record_is_reported(name: str, place: Path) -> None:
    run = full_run(place / "demo")
    (run / name).unlink()
    assert "meta-llama/Llama-3.1-8B" in page_of(run).text
    assert rows_of(markdown_of(run))


def test_a_folder_with_nothing_but_a_status_is_reported_in_every_format(place: Path) -> None:
    write_object(place / "run" / "status.json", {"state": "failed", "step": 0, "reason": "no rows"})
    assert "failed: no rows" in page_of(place / "run").text
    assert "failed: no rows" in markdown_of(place / "run")
    pytest.importorskip("matplotlib")
    assert run_report([place / "run"], None, "png").path == Path("report.png")


ODD: tuple[Any, ...] = (
    None,
    "x",
    [],
    {},
    [{}],
    {"a": [1]},
    True,
    -1,
    10**400,
    float("nan"),
    float("-inf"),
    1e308,
    "\ud800",
)


def test_no_value_of_any_record_is_trusted(place: Path) -> None:
    run = full_run(place / "demo", steps=3)
    files = [
        *(run / name for name in RECORDS if name.endswith(".json")),
        *run.glob("evaluations/*"),
        *run.glob("*/*receipt*"),
    ]
    tried = 0
    for file in files:
        whole = json.loads(file.read_text())
        for damaged in _with_odd_values(whole):
            file.write_text(json.dumps(damaged))
            record = read_record(run, "demo", 0)
            assert Page(html_page(document([record, record][: 1 + tried % 2]))).values["loss"]["lines"]
            tried += 1
        file.write_text(json.dumps(whole))
    assert tried > 120
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for key in json.loads(lines[0]):
        odd = [json.dumps({**json.loads(lines[0]), key: value}) for value in ODD]
        (run / "metrics.jsonl").write_text("\n".join([*odd, *lines]))
        assert page_of(run).values["loss"]["lines"]


def _with_odd_values(whole: Any) -> Iterator[Any]:
    """The value with each of its parts replaced; which odd value a part gets goes round."""
    places = list(_places(whole, ()))
    for i, path in enumerate(places):
        for odd in ODD[i % len(ODD) :: len(ODD)]:
            copy = json.loads(json.dumps(whole))
            inner = copy
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = odd
            yield copy


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in parts:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def test_a_run_at_work_is_reported_as_far_as_it_is(place: Path) -> None:
    run = write_run(place / "demo", steps=50)
    status = {"state": "running", "step": 50, "total_steps": 200, "reason": "", "started": 1.0, "updated": 2.0}
    write_object(run / "status.json", {**status, "pid": os.getpid(), "host": socket.gethostname()})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 51, "lo')
    plan = json.loads((run / "plan.json").read_text())
    write_object(run / "plan.json", {key: value for key, value in plan.items() if key != "measured_memory_bytes"})
    said = " ".join(page_of(run).text.split())
    assert "running" in said
    assert "the run is at work: this is what it had recorded so far" in said
    assert "metrics.jsonl: no JSON object on line" in said
    assert "50 of 200" in said
    assert "9.10 GB so far" in said


def test_what_are_no_runs_is_named_all_at_once_and_nothing_is_written(place: Path) -> None:
    run = write_run(place / "demo")
    (place / "empty").mkdir()
    with pytest.raises(ModelError) as error:
        run_report([place / "nowhere", run, place / "empty"], None)
    assert [problem.what.partition(": ")[0] for problem in error.value.problems] == [
        str(place / "nowhere"),
        f"{place / 'empty'} is no run directory",
    ]
    assert not (place / "report.html").exists()
    assert main(["report", "nowhere", "empty"]) == 5
    assert main(["report"]) == 2


def test_an_earlier_report_is_replaced_and_no_other_file(place: Path) -> None:
    run, other = write_run(place / "demo"), place / "page.html"
    assert main(["report", "demo", "-o", "page.html"]) == 0
    first = other.read_text()
    write_object(run / "status.json", {"state": "failed", "step": 1})
    assert main(["report", "demo", "-o", "page.html"]) == 0
    assert other.read_text() != first
    for name, text in (("mine.html", "<html>my own page</html>"), ("notes.md", "# qlora report\n"), ("x.png", "PNG")):
        (place / name).write_text(text)
        assert main(["report", "demo", "-o", name]) == 8
        assert (place / name).read_text() == text
    with pytest.raises(DiskError, match="it is no file"):
        run_report([run], place)
    with pytest.raises(DiskError, match="it is no file"):
        run_report([run], Path(os.devnull))
    for name in ("again.md", "again.png"):
        assert [main(["report", "demo", "-o", name]) for _ in range(2)] == [0, 0]


def test_the_runs_are_left_as_they_were(place: Path) -> None:
    run = full_run(place / "demo")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    page_of(run)
    markdown_of(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_format_is_what_the_output_is_called(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(place / "demo")
    assert main(["report", "demo", "-o", "a.md"]) == 0
    assert (place / "a.md").read_text().startswith("<!-- qlora report")
    assert main(["report", "demo", "-o", "b.html", "--format", "md"]) == 2
    assert "name two formats" in capsys.readouterr().err
    assert not (place / "b.html").exists()
    assert main(["report", "demo", "-o", "b.txt", "--format", "md"]) == 0
    assert (place / "b.txt").read_text().startswith("<!-- qlora report")


def test_markdown_goes_to_stdout_and_the_others_tell_where_they_are(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(place / "demo")
    assert main(["report", "demo", "--format", "md"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("<!-- qlora report")
    assert ["Steps", "120", "of 120"] in rows_of(said)
    assert list(place.glob("report*")) == []
    assert main(["report", "demo", "--json"]) == 0
    event = json.loads(capsys.readouterr().out)
    assert event == {"event": "result", "format": "html", "path": "report.html", "runs": ["demo"], "problems": []}
    assert main(["report", "demo", "--json", "--format", "md"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith("<!-- qlora report")


def test_the_picture_is_a_png_with_a_panel_for_each_chart(place: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(place / "$x_1$ demo")
    path = run_report([run, write_run(place / "other", seed=1)], None, "png").path
    assert path is not None
    head = path.read_bytes()[:33]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(head[20:24], "big") > 5 * 250  # pixels high: six charts


def test_a_run_named_twice_counts_once_and_two_of_one_name_are_told_by_their_paths(place: Path) -> None:
    one, two = write_run(place / "a" / "demo"), write_run(place / "b" / "demo")
    assert run_report([one, one, place / "a" / "." / "demo"], None, "md").runs == (one,)
    names = [line["name"] for line in page_of(one, two).values["held-out"]["lines"]]
    assert names == [str(one), str(two)]


def test_what_differs_between_recipes_is_shown_and_where_they_are_is_not(place: Path) -> None:
    one, two = write_run(place / "one", rank=8), write_run(place / "two", rank=64, lr=3e-4)
    rows = rows_of(markdown_of(one, two).partition("### Differences\n\n")[2].partition("###")[0])
    assert rows == [
        ["key", "one", "two"],
        ["---", "---", "---"],
        ["lora.r", "8", "64"],
        ["train.lr", "0.0002", "0.0003"],
    ]
    assert "Differences: none, all runs have the same values." in markdown_of(one, write_run(place / "three", rank=8))


def test_of_several_runs_every_row_says_whose_it_is(place: Path) -> None:
    one, two = full_run(place / "one"), write_run(place / "two", seed=1)
    rows = rows_of(markdown_of(one, two))
    merged = next(row for row in rows if "dequantized bf16" in row)
    assert merged[:2] == ["one", "merged"]
    lines = page_of(one, two).values["loss"]["lines"]
    assert [(line["name"], line["class"]) for line in lines] == [
        *(("one", "c0"), ("one, mean", "c0")),
        *(("two", "c1"), ("two, mean", "c1")),
    ]


def test_a_value_that_is_not_finite_is_a_gap_and_is_said(place: Path) -> None:
    run = write_run(place / "demo", steps=20)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [
        {**line, "loss": {7: math.nan, 8: None}.get(line["step"], line["loss"])}
        for line in lines
        if line["kind"] == "step"
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = run_report([run], None).path
    page = page_of(run)
    assert "2 values are not finite (steps 7, 8): a gap in the line" in page.text
    assert page.values["loss"]["lines"][0]["values"][6:8] == [None, None]
    drawn = next(each["d"] for tag, each in page.elements if tag == "path")
    assert drawn.count("M") == 2
    assert page.count("text", "gap") == 2
    assert text is not None
    assert "not finite" in markdown_of(run)


def test_a_long_run_is_thinned_says_so_and_makes_a_small_page(place: Path) -> None:
    run = write_run(place / "demo", steps=10_000)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[4321] = json.dumps({**json.loads(lines[4321]), "loss": 99.5})
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = page_of(run)
    assert (place / "report.html").stat().st_size < 300_000
    line = page.values["loss"]["lines"][0]
    assert len(line["steps"]) <= MOST
    assert (line["steps"][0], line["steps"][-1], max(line["values"])) == (1, 10_000, 99.5)
    assert f"{len(line['steps'])} of 10,000 points are drawn: of every stretch the lowest and the highest" in page.text


def test_thinning_keeps_ends_extremes_and_gaps_whatever_the_line() -> None:
    pick = random.Random(0)
    for size in (5, 999, 1000, 1001, 1500, 30_000):
        points: list[Point] = [(i, pick.gauss(0, 1) if pick.random() > 0.01 else None) for i in range(size)]
        kept = thin(points)
        assert len(kept) <= MOST
        assert list(kept) == sorted(set(kept) & set(points))
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        numbers = [value for _, value in points if value is not None]
        drawn = [value for _, value in kept if value is not None]
        assert (min(drawn), max(drawn)) == (min(numbers), max(numbers))
        assert any(value is None for _, value in kept) == any(value is None for _, value in points)
    assert thin(points[:1000]) == tuple(points[:1000])


def test_the_mean_beside_a_noisy_line_is_of_its_neighbours_and_leaves_gaps() -> None:
    points: list[Point] = [(i, None if i == 40 else float(i % 2)) for i in range(400)]
    mean = dict(smoothed(points))
    assert mean[40] is None
    assert mean[200] == pytest.approx(sum(i % 2 for i in range(195, 206)) / 11)
    assert mean[41] == pytest.approx(sum(i % 2 for i in range(36, 47)) / 10)
    assert smoothed(points[:59]) == ()


def test_of_a_step_that_was_logged_twice_the_last_counts_and_lines_without_the_value_do_not() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 2, "loss": 1.0},
        {"step": 1, "loss": 3},
        {"step": 2, "loss": 2.0},
        {"step": 3},
        {"loss": 5.0},
    ]
    assert series(lines, "loss").points == ((1, 3), (2, 2.0))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 7), (0.0009, 0.0012), (1e15, 1e15 + 4), (0, 1e299), (1, 10_001)]
)
def test_ticks_are_few_and_within_the_axis(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low * (1 - 1e-9) <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_tokens_are_counted_where_all_steps_are_logged_and_estimated_where_not(place: Path) -> None:
    logged, thinned = write_run(place / "a", steps=40), write_run(place / "b", steps=40, every=10)
    lines = [json.loads(line) for line in (logged / "metrics.jsonl").read_text().splitlines()]
    exact = sum(line["tokens"] for line in lines if line["kind"] == "step")
    assert f"| Tokens trained on | {exact:,} | all steps logged |" in markdown_of(logged)
    assert re.search(r"\| Tokens trained on \| about 3\d\d,\d+ \| from 5 logged steps \|", markdown_of(thinned))
