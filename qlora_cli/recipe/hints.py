"""How to mend a key or a value: the nearest known name, the nearest word, the likely slip.

Knows the schema and one node; nothing of files. The invariant: a hint names a key that exists and a value that the
key accepts.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from qlora_cli.recipe import fields
from qlora_cli.recipe.nodes import Broken, Items, Node, Scalar, Table, plain
from qlora_cli.recipe.scalars import printable, read_plain, written
from qlora_cli.recipe.synonyms import NOTES, SYNONYMS

_YES = {
    "yes": "true",
    "on": "true",
    "y": "true",
    "1": "true",
    "no": "false",
    "off": "false",
    "n": "false",
    "0": "false",
}
_SHOWN = 60


@dataclass(frozen=True)
class Suggestion:
    """The known key an unknown one stands for (None: several, or none), and the sentence that says so."""

    target: str | None
    fix: str
    why: str = ""


def shown(node: Node) -> str:
    """A value as messages show it: short, on one line, text in quotes."""
    if isinstance(node, Broken):
        return "a refused value"
    value = plain(node)
    text = repr(value) if isinstance(value, str) else written(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def for_key(section: str, name: str) -> Suggestion:
    """What the unknown key `name` of `section` ("" at the top) stands for."""
    bare = name.lower().replace("-", "_")
    known = SYNONYMS.get(f"{section}.{bare}") or SYNONYMS.get(bare)
    if known:
        return _meant(section, known, NOTES.get(bare, ""))
    exact = [key for key in _all_keys() if bare in (key, key.rsplit(".", 1)[-1])]
    if exact:
        return _meant(section, *exact) if len(exact) == 1 else Suggestion(None, f"write one of {', '.join(exact)}")
    near = _nearest_key(section, bare) if len(bare) <= _SHOWN else None
    return _meant(section, near) if near else Suggestion(None, _keys_there(section))


def for_value(key: str, schema: fields.Schema, node: Node) -> str:
    """One sentence: what to write instead of `node`."""
    for hint in _HINTS:
        if text := hint(schema, node):
            return text
    default = schema.get("default")
    if default is None:
        return f"choose a value it accepts, with --set {key}=VALUE or in the file"
    return f"e.g. --set {key}={written(default)}, the default"


def nearest_word(text: str, words: list[str]) -> str | None:
    """The word most like `text`, or None when none is."""
    begun = [word for word in words if len(text) > 1 and word.startswith(text.lower())]
    found = difflib.get_close_matches(text.lower(), words, n=1, cutoff=0.5) if len(text) <= _SHOWN else []
    return next(iter(begun + found), None)


def _meant(section: str, key: str, note: str = "") -> Suggestion:
    parent, _, name = key.rpartition(".")
    place = f", indented under `{parent}:`" if parent and parent != section else ""
    return Suggestion(key, f"did you mean {key}? write `{name}: ...`{place}", note)


def _all_keys() -> list[str]:
    return [*fields.leaves(), *fields.sections()]


def _nearest_key(section: str, name: str) -> str | None:
    """A misspelt key of the same section, else of any section, else of another tool."""
    own = {key: f"{section}.{key}".lstrip(".") for key in _keys_of(section)}
    other = (
        SYNONYMS | {key.rsplit(".", 1)[-1]: key for key in reversed(_all_keys())} | {key: key for key in _all_keys()}
    )
    for pool, cutoff in ((own, 0.7), (other, 0.75), (own, 0.5)):
        if found := difflib.get_close_matches(name, pool, n=1, cutoff=cutoff):
            return pool[found[0]]
    return None


def _keys_of(section: str) -> list[str]:
    return list(fields.keys_of(fields.at(tuple(section.split("."))) if section else fields.recipe_schema()))


def _keys_there(section: str) -> str:
    return f"remove it; the keys {f'of {section}' if section else 'at the top'} are: {', '.join(_keys_of(section))}"


def _quoted(schema: fields.Schema, node: Node) -> str | None:
    """`"5"` where 5 is wanted."""
    if not isinstance(node, Scalar) or node.plain or not isinstance(node.value, str):
        return None
    value = read_plain(node.value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    takes_number = fields.kinds(schema) & {"integer", "number"}
    takes_boolean = "boolean" in fields.kinds(schema) and isinstance(value, bool)
    return f"remove the quotes: {written(value)}" if (is_number and takes_number) or takes_boolean else None


def _yes_no(schema: fields.Schema, node: Node) -> str | None:
    """`yes` where `true` is wanted."""
    if not isinstance(node, Scalar) or fields.kinds(schema) & {"integer", "number"}:
        return None
    word = str(node.value).lower()
    meant = _YES.get(word, word if word in ("true", "false") else None)
    if meant is None:
        return None
    if "boolean" in fields.kinds(schema):
        return f"write {meant}; only true and false are booleans"
    switch = {"true": "on", "false": "off"}[meant]
    return f"write {switch}" if switch in fields.choices(schema) else None


def _word(schema: fields.Schema, node: Node) -> str | None:
    """A misspelt word of a choice."""
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        return None
    words = {str(choice): choice for choice in fields.choices(schema)}
    near = nearest_word(node.value, list(words))
    return f"did you mean {written(words[near])}?" if near else None


def _whole(schema: fields.Schema, node: Node) -> str | None:
    """`16.0` where 16 is wanted."""
    if not isinstance(node, Scalar) or not isinstance(node.value, float) or "integer" not in fields.kinds(schema):
        return None
    is_whole = node.value.is_integer() and "number" not in fields.kinds(schema) and abs(node.value) < 1e15
    return f"write {int(node.value)}, without a point or exponent" if is_whole else None


def _number_form(schema: fields.Schema, node: Node) -> str | None:
    """Text that was meant as a number."""
    if not isinstance(node, Scalar) or not isinstance(node.value, str) or not node.plain:
        return None
    if not fields.kinds(schema) & {"integer", "number"} or not any(char.isdigit() for char in node.value):
        return None
    return "a number is decimal, as in 16, 0.5 or 2e-4: no leading zeros, separators or units"


def _no_list(schema: fields.Schema, node: Node) -> str | None:
    if isinstance(node, Items) and "array" not in fields.kinds(schema):
        return "write one value, without brackets or dashes"
    return None


def _wants_list(schema: fields.Schema, node: Node) -> str | None:
    default = schema.get("default")
    if isinstance(node, Scalar) and isinstance(default, (list, tuple)):
        return f"write a list in brackets, e.g. {written(default)}"
    return None


def _null(schema: fields.Schema, node: Node) -> str | None:
    if not isinstance(node, Scalar) or node.value is not None:
        return None
    if fields.keys_of(schema):
        return "write its keys below it, indented, or remove the line"
    return f"remove the line for the default, {written(schema['default'])}" if "default" in schema else "write a value"


def _section(schema: fields.Schema, node: Node) -> str | None:
    names = list(fields.keys_of(schema))
    if not names or isinstance(node, Table):
        return None
    return f"write its keys below it, indented: {', '.join(names[:4])}, ..."


_HINTS: tuple[Callable[[fields.Schema, Node], str | None], ...] = (
    _null,
    _section,
    _quoted,
    _yes_no,
    _no_list,
    _wants_list,
    _word,
    _whole,
    _number_form,
)


def key_text(parts: tuple[object, ...]) -> str:
    """A dotted key as messages show it."""
    return printable(".".join(str(part) for part in parts))
