"""Strict YAML: what it reads, what it refuses, and where it says so."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.recipe import tree
from qlora_cli.recipe.nodes import Items, Table, plain
from qlora_cli.recipe.scalars import Value, printable, read_plain, written
from qlora_cli.recipe.tree import parse_document

LOADERS = [yaml.Loader, *([yaml.CLoader] if hasattr(yaml, "CLoader") else [])]
PLAIN: dict[str, Value] = {
    "": None,
    "~": None,
    "null": None,
    "Null": "Null",
    "true": True,
    "false": False,
    "True": "True",
    "on": "on",
    "off": "off",
    "yes": "yes",
    "0": 0,
    "-7": -7,
    "+7": 7,
    "0123": "0123",
    "0x10": "0x10",
    "1_000": "1_000",
    "1:30": "1:30",
    "9" * 18: 10**18 - 1,
    "9" * 5000: "9" * 5000,
    "2e-4": 2e-4,
    "1E5": 1e5,
    ".5": 0.5,
    "1.": 1.0,
    "01.5": "01.5",
    ".": ".",
    "e5": "e5",
    ".inf": ".inf",
    ".nan": ".nan",
    "1e999": "1e999",
    "2024-01-01": "2024-01-01",
}


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every claim holds for the C parser and for the pure one."""
    monkeypatch.setattr(tree, "_LOADER", request.param)
    return request.param.__name__


def refused(text: str) -> list[str]:
    return [f"{finding.place}: {finding.what}" for finding in parse_document(text, "r").findings]


@pytest.mark.parametrize("text", PLAIN)
def test_an_unquoted_scalar_is_null_a_boolean_a_decimal_number_or_text(text: str) -> None:
    value = read_plain(text)
    assert (value, type(value)) == (PLAIN[text], type(PLAIN[text]))


@pytest.mark.usefixtures("parser")
def test_a_quoted_scalar_is_text_and_every_node_knows_its_place() -> None:
    root = parse_document("a: '5'\nb:\n  c: [1, \"true\"]\n", "r").root
    assert isinstance(root, Table)
    assert plain(root) == {"a": "5", "b": {"c": (1, "true")}}
    inner = root.entries["b"].node
    assert isinstance(inner, Table)
    listed = inner.entries["c"]
    assert isinstance(listed.node, Items)
    assert (str(listed.key), str(listed.node.place), str(listed.node.nodes[1].place)) == ("r:3:3", "r:3:6", "r:3:10")


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "a: 1\nb: 2\na: 3\n": "r:3:1: a: this key is set twice (first at r:1:1)",
        "a: {b: 1, b: 2}\n": "r:1:11: a.b: this key is set twice (first at r:1:5)",
        "a: &x 1\n": "r:1:4: a: anchors are refused (got &x)",
        "a: {b: *x}\n": "r:1:8: a.b: aliases are refused (got *x)",
        "a: !!int 1\n": "r:1:4: a: tags are refused (got tag:yaml.org,2002:int)",
        "a: ! 1\n": "r:1:4: a: tags are refused (got !)",
        "a:\n  <<: {b: 1}\n": "r:2:3: a: merge keys are refused (got <<)",
        "5: a\n": "r:1:1: a key must be text (got '5')",
        "? [a]\n: b\n": "r:1:3: a key must be text (got a list)",
        "a: 1\n---\nb: 2\n": "r:2:1: a recipe is one document (got a second `---`)",
        "- a\n": "r:1:1: a recipe is a mapping of keys (got a list)",
        "word\n": "r:1:1: a recipe is a mapping of keys (got text)",
        "": "r:1:1: the recipe is empty",
        "# only words\n": "r:1:1: the recipe is empty",
        "a: \x07\n": "r:1:4: not YAML: a control character stands here (got '\\x07')",
        "a: " + "[" * 21 + "]" * 21: "r:1:23: a: nested deeper than 20 levels",
        "a: " + "[" * 100_000: "r:1:23: a: nested deeper than 20 levels",
    }.items(),
)
def test_what_yaml_lets_pass_is_refused_at_its_place(text: str, expected: str) -> None:
    assert refused(text) == [expected]


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("train:\n\tlr: 5\n", "r:2:1", "a tab stands where YAML wants spaces"),
        ("lr:5\nseed: 6\n", "r:2:5", "a key's colon must be followed by a space"),
        ("a: b: c\n", "r:1:5", "a value that holds a colon and a space looks like a second key"),
        ("a: @b\n", "r:1:4", "a value may not begin with @, ` or %"),
        ("a: [b\n", "r:2:1", "the parser stopped here; the cause is often one line above"),
        ("c: 1\na: 'b\nd: 2\n", "r:2:4", "all that follows would be its text"),
        ('a: {b: "c}\n', "r:1:8", "all that follows would be its text"),
    ],
)
def test_text_that_is_not_yaml_is_one_problem_with_a_likely_reason(text: str, place: str, reason: str) -> None:
    (finding,) = parse_document(text, "r").findings
    assert (finding.why, bool(finding.fix)) == (reason, True)
    assert str(finding.place) in (place, "r:2:3" if "lr:5" in text else place)


@pytest.mark.usefixtures("parser")
def test_all_problems_of_a_text_are_collected() -> None:
    assert len(refused("a: *x\nb: &y 1\nb: 2\n7: !t 3\n")) == 5


def test_escapes_past_unicode_are_refused_by_both_parsers(parser: str) -> None:
    assert parser
    for text in ('a: "\\U00110000"\n', 'a: "\\ud800"\n'):
        assert len(refused(text)) == 1


@given(st.text())
def test_no_text_makes_the_parser_raise(text: str) -> None:
    parsed = parse_document(text, "r")
    assert parsed.root is not None or parsed.findings


@given(st.text(alphabet="ab:-[]{}&*!?|>'\"#%@, \n\t\r<0.~\\xuU\ufeff\x85\u2028"))
def test_no_text_of_yaml_signs_makes_the_parser_raise(text: str) -> None:
    parsed = parse_document(text, "r")
    assert parsed.root is not None or parsed.findings


@given(st.none() | st.booleans() | st.integers(-(10**18) + 1, 10**18 - 1) | st.floats(allow_nan=False) | st.text())
def test_what_is_written_reads_back_equal(value: Value) -> None:
    if isinstance(value, float) and math.isinf(value):
        return
    parsed = parse_document(f"a: {written(value)}  # {printable(str(value))}\n", "r")
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        return
    assert parsed.findings == ()
    assert plain(parsed.root or Table(tree.Place("r"), {})) == {"a": value}
