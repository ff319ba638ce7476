"""Rows from JSON: one object per line, or one array of objects.

Knows JSON and lines, nothing of formats. Invariant: an object comes out as it was written or is a problem: no key
given twice, no number that JSON does not have, no half of a character, no nesting that a later part could choke on.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from qlora_cli.data.compressed import BLOCK
from qlora_cli.data.rows import LONGEST, LONGEST_SHOWN, Outcome, Place, SourceRow

DEEPEST = 200
_SPACE = " \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ARRAY_OF_ROWS = re.compile(rb"[ \t\r\n]*\[[ \t\r\n]*(\{|$)")
_WRAPPERS = {"data", "rows", "train", "examples", "instances", "items", "records"}
_TOO_DEEP = f"nested more than {DEEPEST} deep"
_WANTED = "rows are read from an array of objects, or from one object per line"
_UNWRAP = "jq -c '.KEY[]' FILE > rows.jsonl, with the key that holds the rows"


class _RefusedError(ValueError):
    """What Python's reader of JSON takes, but is none or would be read wrong."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError(f"the key {json.dumps(twice)[:80]} stands twice in one object")
    return values


def _no_number(name: str) -> NoReturn:
    raise _RefusedError(f"not JSON: {name}")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in {float("inf"), float("-inf")}:
        raise _RefusedError(f"the number {digits[:40]} is too large to be read")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite)
_SKIM = json.JSONDecoder(parse_constant=str, parse_float=str, parse_int=str)  # finds the end of what `_STRICT` refuses


def parse_row(text: str, place: Place) -> Outcome:
    """The row that `text`, one JSON value, holds."""
    try:
        return place.row(_checked(_STRICT.decode(text), text))
    except json.JSONDecodeError as error:
        return place.problem(f"not JSON: {error.msg} (column {error.colno})", fix="write one JSON object per line")
    except _RefusedError as error:
        return place.problem(str(error))
    except ValueError:  # int() reads no more than sys.get_int_max_str_digits()
        return place.problem("a number of thousands of digits, which cannot be read", fix="write it as text")
    except RecursionError:
        return place.problem(_TOO_DEEP)


def _checked(values: Any, text: str) -> dict[str, Any]:
    """`values`, read from `text`, which are a row."""
    if not isinstance(values, dict):
        raise _RefusedError(f"a row must be a JSON object, but is: {text[:40]}")
    if text.count("{") + text.count("[") > DEEPEST and _deeper(values, DEEPEST):
        raise _RefusedError(_TOO_DEEP)
    if _SURROGATE.search(text) and _half_characters(values):
        raise _RefusedError("half of a character (a lone \\ud800 to \\udfff) is no text")
    return values


def _deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
    return bool(level)


def _half_characters(values: dict[str, Any]) -> bool:
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def lines(stream: io.BufferedReader[Any], place: Place) -> Iterator[bytes | None]:
    """The lines as `place` counts them; None for one that is too long, which is passed over."""
    while line := stream.readline(LONGEST + 1):
        if len(line) <= LONGEST:
            yield line
        else:
            while line and not line.endswith(b"\n"):
                line = stream.readline(LONGEST)
            yield None
        place.number += 1


def read_lines(stream: io.BufferedReader[Any], place: Place) -> Iterator[Outcome]:
    """One object per line; blank lines count as lines."""
    if _ARRAY_OF_ROWS.match(stream.peek(64)[:64].removeprefix(codecs.BOM_UTF8)):
        fix = "give it the suffix .json, or write one object per line: jq -c '.[]'"
        yield place.rest_lost("the file is one JSON array, and its name says one object per line", fix=fix)
        return
    for line in lines(stream, place):
        outcome = place.too_long("the line") if line is None else _line(line, place)
        if outcome is not None:
            yield outcome


def _line(line: bytes, place: Place) -> Outcome | None:
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode("utf-8").rstrip(_SPACE)
    except UnicodeDecodeError as error:
        return place.problem(f"not UTF-8 (byte {error.start + 1} of the line)", fix="save the file as UTF-8")
    return parse_row(text, place) if text else None


def read_json(stream: io.BufferedReader[Any], place: Place) -> Iterator[Outcome]:
    """An array of objects, or one object per line. An object that spans lines, or whose only key holds the rows, is
    refused: which of its parts are rows would be a guess."""
    head = stream.peek(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        yield from read_array(stream, place)
        return
    outcomes = read_lines(stream, place)
    first = None if _spans_lines(head) else next(outcomes, None)
    if _spans_lines(head):
        yield place.rest_lost("the file is an object that spans lines, not rows", _WANTED, _UNWRAP)
    elif isinstance(first, SourceRow) and _wraps(first.values) and not stream.peek(1).strip():
        yield place.rest_lost(f"the rows are inside of the key `{next(iter(first.values))}`", _WANTED, _UNWRAP)
    elif first is not None:
        yield first
        yield from outcomes


def _spans_lines(head: bytes) -> bool:
    first, _, rest = head.partition(b"\n")
    return first.startswith(b"{") and not first.rstrip().endswith(b"}") and rest.lstrip()[:1] not in {b"", b"{"}


def _wraps(values: dict[str, Any]) -> bool:
    """Whether an object is {"data": [{...}, ...]}, as data sets have it, rather than {"messages": [...]}."""
    key, value = next(iter(values.items()), ("", None))
    rows = isinstance(value, list) and all(isinstance(each, dict) for each in value)
    return len(values) == 1 and key in _WRAPPERS and rows


class _Characters:
    """The characters of a stream that are not yet used up, and where in the file they start. Bytes that are no UTF-8
    come as lone surrogates, so that reading goes on behind them."""

    def __init__(self, stream: io.BufferedReader[Any]) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.text, self.at, self._line, self._column, self._ended = "", 0, 1, 1, False

    def more(self) -> bool:
        """Fetches as many again as there are; False at the end."""
        if self._ended:
            return False
        self._line, self._column = self._coordinates(self.at)
        rest = self.text[self.at :]
        block = self._stream.read(max(BLOCK, len(rest)))
        self._ended = not block
        self.text, self.at = rest + self._decoder.decode(block, not block), 0
        return True

    def next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self.at = _end_of_space(self.text, self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def position(self, at: int) -> str:
        """`line L, column C` of the character at `at`."""
        line, column = self._coordinates(at)
        return f"line {line}, column {column}"

    def _coordinates(self, at: int) -> tuple[int, int]:
        breaks = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) if breaks else self._column + at
        return self._line + breaks, column


def _end_of_space(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    assert found is not None, "no space at all matches too"
    return found.end()


def read_array(stream: io.BufferedReader[Any], place: Place) -> Iterator[Outcome]:
    """The objects of one array, numbered from 1. Behind a mistake of JSON itself nothing can be told apart."""
    characters = _Characters(stream)
    found = characters.next()
    while found in {"[", ","}:
        characters.at += 1
        if characters.next() == "]" and place.number == 1:
            break
        try:
            end = _end_of_value(characters)
        except _RefusedError as error:
            yield place.rest_lost(f"not JSON: {error}")
            return
        yield _element(characters.text[characters.at : end], place)
        place.number += 1
        characters.at = end
        found = characters.next()
    yield from _behind(characters, place)


def _end_of_value(characters: _Characters) -> int:
    """Where the value that starts at hand ends; fetches characters until that is known."""
    while True:
        text = characters.text
        try:
            end = _SKIM.raw_decode(text, characters.at)[1]
            if end < len(text) or not characters.more():  # a number at the very end may go on
                return end
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos > len(text) - 12
            if cut and len(text) - characters.at > LONGEST:
                raise _RefusedError(f"a row is longer than {LONGEST_SHOWN}") from error
            if not cut or not characters.more():
                raise _RefusedError(f"{error.msg} ({characters.position(error.pos)})") from error
        except RecursionError as error:
            raise _RefusedError(f"nested too deeply ({characters.position(characters.at)})") from error


def _element(text: str, place: Place) -> Outcome:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return place.problem(f"not UTF-8 (byte 0x{byte:02x})", fix="save the file as UTF-8")
    return parse_row(text, place)


def _behind(characters: _Characters, place: Place) -> Iterator[Outcome]:
    """What is wrong with the end of the array."""
    if characters.next() != "]":
        found = characters.next() or "the end of the file"
        where = characters.position(characters.at)
        yield place.rest_lost(f"not JSON: expected `,` or `]`, but found {found!r} ({where})")
        return
    characters.at += 1
    if found := characters.next():
        yield place.rest_lost(f"not JSON: {found!r} behind the end of the array ({characters.position(characters.at)})")
