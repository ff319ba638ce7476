"""Recipes and overrides, mutated at random: each is loaded, or refused in words.

Knows how recipes are written and `load_recipe`. A case is a valid recipe, changed as text, as bytes or as a tree, with
overrides of any key; all are drawn by hypothesis, which reduces what fails to its simplest form. Invariant:
`load_recipe` returns a recipe that reads back from its own snapshot, or raises a `RecipeError` of which every problem
has a place and can be printed. Anything else is a failure.
"""

from __future__ import annotations

import json
import math
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from battery.common import Failures, result
from qlora_cli.errors import Problem, RecipeError
from qlora_cli.recipe.fields import choices, kinds, leaves
from qlora_cli.recipe.library import shipped
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.snapshot import read_resolved, resolved_yaml

TITLE = "10,000 fuzzed recipes and overrides: 0 tracebacks"
FULL, SMALL = 10_000, 200
LONGEST = 20_000
"""Characters in which a problem must be told."""
MINIMAL = "model: {base: b}\ndata: {train: t}\ntrain: {steps: 10}\n"
PIECES = [
    *(
        "",
        "\n",
        " ",
        "\t",
        ":",
        ": ",
        "- ",
        "#",
        "'",
        '"',
        ",",
        "[",
        "]",
        "{",
        "}",
        "|",
        ">",
        "|\n",
        "&a ",
        "*a",
        "!!int ",
    ),
    *("!!python/object/apply:os.system [ls]", "<<: *a", "---\n", "...\n", "%YAML 9.9\n", "? ", "!x ", "\ufeff", "\0"),
    *(
        "null",
        "~",
        "true",
        "on",
        "yes",
        "0x1F",
        "0o7",
        "0123",
        "1_000",
        "1e999",
        "-1",
        ".inf",
        "-.inf",
        ".nan",
        "1e-400",
    ),
    *(
        "2e-4",
        "9" * 400,
        "9" * 5000,
        "12:30:45",
        "2001-01-01",
        "\\ud800",
        '"\\ud800"',
        '"\\U00110000"',
        "\x1b[2J",
        "\x85",
    ),
    *("\u2028", "\U0001f600", "e\u0301", "[" * 30, "{a: " * 30, "- " * 30, "a" * 5000, "extends: tiny-demo\n"),
    *(
        "extends: mine.yaml\n",
        "extends: [a]\n",
        "extends: ../x\n",
        "lora: null\n",
        "train:\n",
        "data: {sources: {a: {}}}",
    ),
    *("{%", "{{ x }}", "${HOME}", "~nobody/x", "//", "=", "a.b", "model.base", "hf_" + "a" * 34),
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, 1e308, -0.0, math.nan, math.inf, "", " ", "x", "\ud800"),
    *(
        [],
        {},
        [None],
        [[]],
        [1, "a"],
        {"a": 1},
        {"a": {"b": []}},
        {"": ""},
        {1: 2},
        {None: 1},
        {"model": {"base": "b"}},
    ),
    *("null", "1", "1e-3", "auto", "none", "\x1b[2J", "a\nb", "a: b", "*a", "x" * 5000),
]
EDITS = ["insert", "delete", "repeat", "swap", "indent", "replace"]
CHANGES = ["replace", "delete", "rename", "add", "copy"]

Draw = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A recipe's bytes, and overrides."""

    content: bytes
    overrides: Sequence[str]


@cache
def valid() -> list[str]:
    """Recipes without a fault: the shipped ones, a short one, and one that says every key."""
    texts = [path.read_text(encoding="utf-8") for path in shipped().values()]
    return [MINIMAL, *texts, resolved_yaml(load_recipe("tiny-demo"))]


def edited(text: str, edit: tuple[str, int, int, str]) -> str:
    """The text with one edit at a place."""
    kind, at, length, piece = edit
    at, length = at % (len(text) + 1), length % 40
    if kind == "insert":
        return text[:at] + piece + text[at:]
    if kind in {"delete", "replace"}:
        return text[:at] + (piece if kind == "replace" else "") + text[at + length :]
    lines = text.splitlines(keepends=True) or [""]
    one, other = at % len(lines), length % len(lines)
    if kind == "repeat":
        lines.insert(other, lines[one])
    elif kind == "swap":
        lines[one], lines[other] = lines[other], lines[one]
    else:
        lines[one] = " " * (length % 5) + lines[one].lstrip()
    return "".join(lines)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def changed(tree: Any, change: tuple[str, int, Any, str]) -> None:
    """One change to a value of a tree, in place."""
    kind, at, value, name = deepcopy(change)  # or later changes would be made to the values drawn from
    found = places(tree)
    if not found:
        return
    holder, key = found[at % len(found)]
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[name] = holder.pop(key)
    elif kind == "add" and isinstance(holder, dict):
        holder[name] = value
    elif kind == "copy":
        other, source = found[(at * 7 + 3) % len(found)]
        holder[key] = deepcopy(other[source])
    else:
        holder[key] = value


def written(tree: Any, style: str) -> str:
    """A tree as YAML or JSON; as Python shows it where it cannot be one."""
    try:
        if style == "json":
            return json.dumps(tree)
        return yaml.safe_dump(tree, default_flow_style=style == "flow", allow_unicode=True)
    except (yaml.YAMLError, ValueError, TypeError, UnicodeError):
        return repr(tree)


PIECE = st.one_of(st.sampled_from(PIECES), st.text(max_size=12))
SPOT = st.integers(0, 100_000)
EDIT = st.tuples(st.sampled_from(EDITS), SPOT, SPOT, PIECE)


@cache
def a_key() -> st.SearchStrategy[str]:
    """Dotted keys, most of which there are."""
    known = list(leaves())
    sections = sorted({key.rpartition(".")[0] for key in known} - {""})
    spoilt = st.tuples(st.sampled_from(known), EDIT).map(lambda pair: edited(*pair))
    return st.one_of(st.sampled_from(known), st.sampled_from(known), st.sampled_from(sections), spoilt, PIECE)


@cache
def a_likely_override() -> st.SearchStrategy[str]:
    """One of a value that its key may have, though not with every other."""
    pairs = [(key, json.dumps(value)) for key, schema in leaves().items() for value in choices(schema)]
    numbers = [key for key, schema in leaves().items() if kinds(schema) & {"integer", "number"}]
    counts = st.tuples(st.sampled_from(numbers), st.integers(0, 64).map(str))
    return st.one_of(st.sampled_from(pairs), counts).map("=".join)


@cache
def an_override() -> st.SearchStrategy[str]:
    """`KEY=VALUE`, or nearly. Made once, as are the others: that takes longer than a case."""
    odd = st.sampled_from(ODD).map(lambda value: written(value, "json"))
    value = st.one_of(odd, PIECE, st.integers().map(str), st.floats().map(str))
    whole = st.tuples(a_key(), st.sampled_from(["="] * 9 + ["", " = ", "=="]), value).map("".join)
    return st.one_of(a_likely_override(), whole, st.tuples(whole, EDIT).map(lambda pair: edited(*pair)))


@cache
def a_change() -> st.SearchStrategy[tuple[str, int, Any, str]]:
    """See `changed`."""
    name = st.one_of(a_key().map(lambda key: key.rpartition(".")[2]), PIECE)
    return st.tuples(st.sampled_from(CHANGES), SPOT, st.sampled_from(ODD), name)


@st.composite
def a_case(draw: Draw) -> Case:
    """A recipe that was changed in some way or none, with up to three overrides."""
    text = draw(st.sampled_from(valid()))
    kind = draw(st.sampled_from(["as it is"] * 3 + ["text", "text", "tree", "tree", "bytes", "noise"]))
    if kind == "tree":
        tree = yaml.safe_load(text)
        for each in draw(st.lists(a_change(), min_size=1, max_size=3)):
            changed(tree, each)
        text = written(tree, draw(st.sampled_from(["block", "flow", "json"])))
    elif kind == "noise":
        text = draw(st.one_of(st.text(max_size=200), st.lists(PIECE, max_size=12).map("".join)))
    elif kind != "as it is":
        for each in draw(st.lists(EDIT, min_size=1, max_size=3)):
            text = edited(text, each)
    content = text.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        at = draw(SPOT) % (len(content) + 1)
        content = content[:at] + draw(st.binary(min_size=1, max_size=6)) + content[at:]
    return Case(content, draw(st.one_of(st.just([]), st.lists(an_override(), max_size=3))))


class BrokenError(Exception):
    """What came back is not what it must be."""


def outcome(case: Case, folder: Path) -> str:
    """`loaded` or `refused`. Raises `BrokenError`, or whatever the loader lets through."""
    path = folder / "mine.yaml"
    path.write_bytes(case.content)
    try:
        loaded = load_recipe(path, case.overrides)
    except RecipeError as error:
        for problem in error.problems:
            check(problem)
        return "refused"
    (folder / "resolved.yaml").write_text(resolved_yaml(loaded), encoding="utf-8")
    if read_resolved(folder / "resolved.yaml") != loaded.recipe:
        raise BrokenError("the snapshot reads back as another recipe")
    return "loaded"


def check(problem: Problem) -> None:
    """A problem has a place, is not endless, and can be printed without harm to a terminal."""
    said = str(problem)
    said.encode("utf-8")
    if not problem.where or not problem.what or len(said) > LONGEST:
        raise BrokenError(f"a problem without a place, without words or without end: {said[:300]!r}")
    if unseen := {char for char in said if not char.isprintable() and char != "\n"}:
        raise BrokenError(f"control characters {sorted(unseen)} in {said[:300]!r}")


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """10,000 cases, or 200; see `scripts/reliability`."""
    work.mkdir(parents=True, exist_ok=True)
    tally: Counter[str] = Counter()
    seen: list[Case] = []

    def one(case: Case) -> None:
        seen[:] = [case]
        tally[outcome(case, work)] += 1

    failures = _examined(one, FULL if full else SMALL, seed, seen)
    count = tally.total()
    if not failures and min(tally["loaded"], tally["refused"]) < count / 20:
        failures = [f"the cases are one-sided: {dict(tally)}"]
    figure = f"{count:,} cases: {tally['loaded']:,} loaded, {tally['refused']:,} refused, {len(failures)} tracebacks"
    return result(count, figure, failures)


def _examined(one: Callable[[Case], None], count: int, seed: int, seen: list[Case]) -> Failures:
    """Runs `one` on so many cases; the simplest case that fails is the failure."""
    quiet = settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    try:
        seeded(seed)(quiet(given(a_case())(one)))()
    except Exception:  # whatever the loader let through is what is looked for
        return [f"{str(seen)[:1500]}\n{traceback.format_exc()[-1500:]}"]
    return []
