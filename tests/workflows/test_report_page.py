"""The page of `qlora report` in a real browser: what it shows, and that it says, loads and runs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.workflows.report import run_report
from tests.browser import Browser, browser_path
from tests.workflows.report_runs import add_evaluation, add_merge, add_samples, write_run

PROGRAM = browser_path()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium or Chrome on PATH")
PHONE_WIDTH, PHONE_HEIGHT = 375, 800
MARKUP = "<img src=x onerror=window.owned=1></script><script>window.owned=2"
GAP = 30


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    started = Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    try:
        started.call("Browser.getVersion")
    except (RuntimeError, OSError) as error:  # a program of that name may only say how to install one
        started.close()
        pytest.skip(f"{PROGRAM} does not start: {error}")
    with started:
        yield started


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: one with all there is, and a step without a loss; one named as markup; a short one that failed."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first")
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "loss": math.nan} if line["kind"] == "step" and line["step"] == GAP else line for line in lines]
    (first / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    add_samples(first)
    add_evaluation(first)
    add_merge(first)
    second = write_run(folder / MARKUP.replace("/", "\N{DIVISION SLASH}"), seed=1, base=MARKUP)
    (second / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": MARKUP, "answer": MARKUP * 40}))
    third = write_run(folder / "third", steps=40, seed=2, rank=8)
    status = json.loads((third / "status.json").read_text())
    (third / "status.json").write_text(json.dumps({**status, "state": "failed", "reason": "memory ran out"}))
    return [first, second, third]


@pytest.fixture(scope="module")
def one(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the first run."""
    path = tmp_path_factory.mktemp("pages") / "one.html"
    run_report(runs[:1], path)
    return path


@pytest.fixture(scope="module")
def three(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of all of them."""
    path = tmp_path_factory.mktemp("pages") / "three.html"
    run_report(runs, path)
    return path


def room(browser: Browser, chart: str) -> dict[str, float]:
    """Where a chart is, once it is in sight."""
    box = f"document.querySelector('[data-chart={chart}]')"
    browser.value(f"{box}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    found: dict[str, float] = browser.value(f"{box}.getBoundingClientRect().toJSON()")
    return found


def tip(browser: Browser, chart: str) -> str | None:
    """What a chart says of a place; None where it says nothing."""
    box = f"document.querySelector('[data-chart={chart}] .tip')"
    said: str | None = browser.value(f"{box}.hidden ? null : {box}.innerText.replace(/\\s+/g, ' ').trim()")
    return said


def point_at(browser: Browser, chart: str, step: int, last: int = 120, touch: bool = False) -> None:
    at = room(browser, chart)
    x, y = at["x"] + at["width"] * (step - 1) / (last - 1), at["y"] + at["height"] / 2
    (browser.touch if touch else browser.point)(x, y)


def recorded(run: Path, step: int) -> dict[str, Any]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found: dict[str, Any] = next(line for line in lines if line["kind"] == "step" and line["step"] == step)
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 375])
def test_the_page_complains_of_nothing_and_asks_for_nothing_but_itself(
    browser: Browser, one: Path, three: Path, width: int, dark: bool
) -> None:
    for page in (one, three):
        browser.open(page, width=width, dark=dark)
        point_at(browser, "loss", 60)
        events = [(each["method"], each["params"]) for each in browser.events]
        asked = [params["request"]["url"] for method, params in events if method == "Network.requestWillBeSent"]
        assert asked == [page.resolve().as_uri()]
        assert [each for each in events if each[0] != "Network.requestWillBeSent"] == []


def test_the_driver_hears_what_a_page_complains_of_and_asks_for(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='x.png'><script>console.error('no'); missing()</script>")
    browser.open(page)
    heard = {each["method"] for each in browser.events}
    assert heard >= {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.requestWillBeSent"}
    assert any(each["params"].get("request", {}).get("url", "").endswith("x.png") for each in browser.events)


def test_text_of_a_run_runs_nothing(browser: Browser, three: Path) -> None:
    browser.open(three)
    point_at(browser, "loss", 60)
    assert "<img src=x onerror=window.owned=1>" in browser.value("document.body.innerText")
    assert "<img src=x onerror=window.owned=1>" in str(tip(browser, "loss"))
    assert browser.value("typeof window.owned") == "undefined"
    assert browser.value("document.images.length") == 0


def test_a_phone_scrolls_down_only_and_wide_tables_within_their_box(browser: Browser, one: Path, three: Path) -> None:
    for page in (one, three):
        browser.open(page, width=PHONE_WIDTH, height=PHONE_HEIGHT)
        browser.value("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert browser.value("document.scrollingElement.scrollWidth") <= PHONE_WIDTH
        browser.value("document.scrollingElement.scrollTo(500, 0)")
        assert browser.value("document.scrollingElement.scrollLeft") == 0
        wide = "[...document.querySelectorAll('.wide')].filter((each) => each.scrollWidth > each.clientWidth + 1)"
        assert browser.value(f"{wide}.length") > 3
        assert browser.value(f"{wide}.every((each) => {{ each.scrollLeft = 50; return each.scrollLeft > 0; }})") is True
        sizes = browser.value(
            "[...document.querySelectorAll('.tick')].map((each) => each.getBoundingClientRect().height)"
        )
        assert min(sizes) > 9  # pixels: text of a chart does not shrink with it


def test_the_pointer_shows_the_values_that_were_recorded_there(browser: Browser, one: Path, runs: list[Path]) -> None:
    browser.open(one)
    assert tip(browser, "loss") is None
    for step in (1, 61, 120):
        point_at(browser, "loss", step)
        said = str(tip(browser, "loss"))
        assert said.startswith(f"step {step} ")
        assert f"training loss {recorded(runs[0], step)['loss']:.4f}" in said
    point_at(browser, "rate", 61)
    assert f"{recorded(runs[0], 61)['lr']:.2e}".replace("e-0", "e-") in str(tip(browser, "rate"))
    marks = "document.querySelectorAll('[data-chart=rate] .rule, [data-chart=rate] g circle').length"
    assert browser.value(marks) == 2
    browser.point(1, 1)
    assert tip(browser, "rate") is None
    assert browser.value(marks) == 0


def test_the_dot_under_the_pointer_lies_on_its_line(browser: Browser, one: Path) -> None:
    browser.open(one)
    point_at(browser, "rate", 61)
    distance = browser.value(
        """(() => {
            const plot = document.querySelector("[data-chart=rate] .plot"), path = plot.querySelector("path");
            const dot = plot.querySelector("g circle").getBoundingClientRect(), room = plot.getBoundingClientRect();
            const x = dot.x + dot.width / 2 - room.x, y = dot.y + dot.height / 2 - room.y;
            const away = (at) => Math.hypot((at.x * room.width) / 1000 - x, (at.y * room.height) / 1000 - y);
            const along = [...Array(4001).keys()].map((i) => (path.getTotalLength() * i) / 4000);
            return Math.min(...along.map((length) => away(path.getPointAtLength(length))));
        })()"""
    )
    assert distance < 1.5  # pixels


def test_of_several_runs_the_values_of_all_are_shown_with_their_steps(
    browser: Browser, three: Path, runs: list[Path]
) -> None:
    browser.open(three)
    point_at(browser, "loss", 40)
    said = str(tip(browser, "loss"))
    for run in runs:
        assert f"{run.name} {recorded(run, 40)['loss']:.4f}" in said
    point_at(browser, "loss", 100)
    assert "third" not in str(tip(browser, "loss"))
    point_at(browser, "held-out", 41)
    assert "(step " in str(tip(browser, "held-out"))


def test_where_there_is_no_number_the_pointer_says_so(browser: Browser, one: Path) -> None:
    browser.open(one)
    point_at(browser, "loss", GAP)
    assert f"step {GAP} training loss not finite" in str(tip(browser, "loss"))


def test_a_finger_and_the_arrow_keys_show_values_too(browser: Browser, one: Path, runs: list[Path]) -> None:
    browser.open(one, width=PHONE_WIDTH, height=PHONE_HEIGHT)
    point_at(browser, "loss", 80, touch=True)
    said = str(tip(browser, "loss"))
    step = int(said.split()[1])
    assert abs(step - 80) <= 1
    assert f"{recorded(runs[0], step)['loss']:.4f}" in said
    inside = "(() => { const t = document.querySelector('[data-chart=loss] .tip').getBoundingClientRect(); "
    assert browser.value(f"{inside} return t.left >= 0 && t.right <= {PHONE_WIDTH}; }})()") is True
    browser.open(one)
    browser.value("document.querySelector('[data-chart=pace]').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert str(tip(browser, "pace")).startswith("step 2 ")
    browser.press("ArrowLeft")
    assert str(tip(browser, "pace")).startswith("step 1 ")
    browser.press("Escape")
    assert tip(browser, "pace") is None


def test_without_scripts_every_chart_is_drawn(browser: Browser, three: Path) -> None:
    browser.open(three, scripts=False)
    charts = browser.value("document.querySelectorAll('[data-chart]').length")
    assert charts == 6
    sizes = browser.value(
        """[...document.querySelectorAll("[data-chart] path")].map((each) => {
            const room = each.getBoundingClientRect();
            return [room.width, getComputedStyle(each).stroke];
        })"""
    )
    assert len(sizes) >= 3 * charts - 2
    assert all(width > 50 and stroke.startswith("rgb(") for width, stroke in sizes)
    browser.point(600, 500)
    assert tip(browser, "loss") is None
    assert browser.value("document.querySelectorAll('.tip:not([hidden])').length") == 0


def test_the_charts_have_names_and_the_tables_have_headers(browser: Browser, three: Path) -> None:
    browser.open(three)
    assert browser.value("document.title") == "3 runs compared · qlora report"
    names = browser.value("[...document.querySelectorAll('[role=img]')].map((each) => each.getAttribute('aria-label'))")
    assert len(names) > 6
    assert any("first: from " in name and " at step 120, lowest " in name for name in names)
    assert all(names)
    bare = "[...document.querySelectorAll('table')].filter((each) => !each.querySelector('thead th[scope=col]'))"
    assert browser.value(f"{bare}.length") == 0
    empty = "[...document.querySelectorAll('thead th')].filter((each) => !each.textContent.trim())"
    assert browser.value(f"{empty}.length") == 0
    assert browser.value("[...document.querySelectorAll('nav a')].every((a) => document.querySelector(a.hash))") is True


TEXTS = (
    "h1",
    ".kind",
    ".facts",
    ".state.bad",
    "nav a",
    "thead th",
    "td",
    ".notes li",
    ".note.warns",
    ".below",
    ".small",
)
STROKES = ("path.c0", "path.c1", "path.c2")


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_from_what_is_behind_them(browser: Browser, three: Path, dark: bool) -> None:
    browser.open(three, dark=dark)
    behind = _luminance(_colours(browser, "body", "backgroundColor"))
    assert (behind < 0.1) is dark
    for kinds, name, least in ((TEXTS, "color", 4.5), ((".tick",), "fill", 4.5), (STROKES, "stroke", 3.0)):
        for kind in kinds:
            colours = _colours(browser, kind, name), _behind(browser, kind)
            assert _contrast(*map(_luminance, colours)) >= least, (kind, colours)


@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_of_the_palette_stands_out_and_is_its_own(browser: Browser, one: Path, dark: bool) -> None:
    browser.open(one, dark=dark)
    names = ", ".join(f"'c{i}'" for i in range(7))
    colours = browser.value(
        f"""[{names}].map((name) => {{
            const key = document.createElement("i");
            key.className = "key " + name;
            document.querySelector(".chart").append(key);
            return getComputedStyle(key).borderTopColor;
        }})"""
    )
    assert len(set(colours)) == 7
    card = _luminance(_numbers(_behind_text(browser, ".chart")))
    assert [each for each in colours if _contrast(_luminance(_numbers(each)), card) < 3.0] == []


def _colours(browser: Browser, kind: str, name: str) -> tuple[float, ...]:
    return _numbers(browser.value(f"getComputedStyle(document.querySelector({kind!r})).{name}"))


def _behind(browser: Browser, kind: str) -> tuple[float, ...]:
    return _numbers(_behind_text(browser, kind))


def _behind_text(browser: Browser, kind: str) -> str:
    """The nearest background that is not transparent."""
    found: str = browser.value(
        f"""(() => {{
            let node = document.querySelector({kind!r});
            while (getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") node = node.parentElement;
            return getComputedStyle(node).backgroundColor;
        }})()"""
    )
    return found


def _numbers(colour: str) -> tuple[float, ...]:
    return tuple(map(float, colour.removeprefix("rgb(").removesuffix(")").split(", ")))


def _luminance(colour: tuple[float, ...]) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [c / 12.92 if (c := each / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for each in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
