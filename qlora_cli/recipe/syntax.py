"""One sentence for text that is not YAML, and where it stops being so.

Knows the parser's exceptions and common slips; nothing of keys. The invariant: one problem per text, at the position
the parser stopped at.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import yaml

from qlora_cli.recipe.nodes import Finding, Place

# What YAML allows; the parser would report only a byte offset. (YAML 1.2, production c-printable.)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

PlaceOf = Callable[[int, int], Place]

_TAB = re.compile(r"\s*\t")
# A line, and why it may be what stopped the parser; the first that matches is told.
_SLIPS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (_TAB, "a tab stands where YAML wants spaces", "replace the tab by spaces, two per level"),
    (
        re.compile(r"[^#]*:\s+[@`%]"),
        "a value may not begin with @, ` or %",
        'put the value in quotes: "..."',
    ),
    (
        re.compile(r"[^#'\"]*:\s+[^\s'\"\[{#][^#]*:(\s|$)"),
        "a value that holds a colon and a space looks like a second key",
        'put the value in quotes: "..."',
    ),
    (re.compile(r"\s*[\w.-]+:[^\s/]"), "a key's colon must be followed by a space", "write `key: value`"),
)
_GENERAL_FIX = "check the indentation, the space after each colon, and that quotes and brackets are closed"


def unprintable(text: str, place: PlaceOf) -> Finding | None:
    """A finding for the first character that YAML does not allow, or None."""
    match = _UNPRINTABLE.search(text)
    if match is None:
        return None
    before = text[: match.start()]
    where = place(before.count("\n"), len(before) - before.rfind("\n") - 1)
    what = f"not YAML: a control character stands here (got {match.group()!a})"
    return Finding(where, what, "YAML is made of printable text", "remove the character, or write it as an escape")


def explain(error: yaml.YAMLError | ValueError, text: str, place: PlaceOf) -> Finding:
    """A finding for what the parser refused."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if (opened := _open_quote(error)) is not None:
        what = "not YAML: the quote that opens here is never closed"
        return Finding(place(opened.line, opened.column), what, "all that follows would be its text", "close the quote")
    line, column = (mark.line, mark.column) if mark else (0, 0)
    said = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
    reason, fix = _slip(text.splitlines(), line)
    return Finding(place(line, column), f"not YAML: {said or 'the text cannot be read'}", reason, fix)


def _open_quote(error: yaml.YAMLError | ValueError) -> yaml.Mark | None:
    """Where the quote opens that the text ends in; the parser itself points at the end."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.context != "while scanning a quoted scalar":
        return None
    return error.context_mark if error.problem == "found unexpected end of stream" else None


def _slip(lines: list[str], line: int) -> tuple[str, str]:
    """The likely slip: on the line where the parser stopped, or on the one before."""
    suspects = [lines[index] for index in (line, line - 1) if 0 <= index < len(lines)]
    for suspect in suspects:
        for pattern, reason, fix in _SLIPS:
            if pattern.match(suspect):
                return reason, fix
    return "the parser stopped here; the cause is often one line above", _GENERAL_FIX
