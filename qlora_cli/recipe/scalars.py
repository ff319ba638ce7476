"""How one YAML scalar is read and written.

Knows text and plain values, nothing of files or keys. The invariant: `read_plain(written(v)) == v` for every value
that is written plain, and what is not exactly null, a boolean or a decimal number is text.
"""

from __future__ import annotations

import math
import re
from typing import TypeAlias

Value: TypeAlias = bool | int | float | str | None

_WORDS: dict[str, Value] = {"": None, "~": None, "null": None, "true": True, "false": False}
# No octal, no underscores, and no more digits than 64 bits hold: `0123` would be read as 83 by YAML 1.1.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_SAFE_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_SHORT_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def read_plain(text: str) -> Value:
    """The value of an unquoted scalar: null, true, false, a finite decimal number, or else the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and ("." in text or "e" in text.lower()) and math.isfinite(float(text)):
        return float(text)
    return text


def written(value: object) -> str:
    """The value as YAML flow text on one line; lists and mappings too."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key)}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(written(item) for item in value) + "]"
    if isinstance(value, str):
        return _written_text(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value)


def printable(text: str) -> str:
    """The text with every character that could move a cursor or end a comment written as an escape."""
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _written_text(text: str) -> str:
    if _SAFE_PLAIN.fullmatch(text) and isinstance(read_plain(text), str):
        return text
    return '"' + "".join(_SHORT_ESCAPES.get(char) or printable(char) for char in text) + '"'


def _escape(char: str) -> str:
    code = ord(char)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
