"""The schema as data: which keys there are, and what each wants, in words.

Knows the JSON Schema that pydantic makes of `Recipe`; nothing of values or files. The invariant: no key, range or
word is written here; all of it is read from `schema.py`, so that messages and documents cannot drift from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

from qlora_cli.recipe.scalars import written
from qlora_cli.recipe.schema import Recipe

Schema: TypeAlias = dict[str, Any]

_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}


@cache
def recipe_schema() -> Schema:
    """The JSON Schema of a recipe. Shared: do not change it."""
    return Recipe.model_json_schema()


def branches(schema: Schema) -> list[Schema]:
    """The types a value may have, references followed, without unions."""
    if "anyOf" in schema:
        return [inner for branch in schema["anyOf"] for inner in branches(branch)]
    if "$ref" in schema:
        return branches(recipe_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]])
    return [schema]


def keys_of(schema: Schema) -> Schema:
    """Name to schema of the keys below a section; empty for anything else."""
    return next((branch["properties"] for branch in branches(schema) if "properties" in branch), {})


def below(schema: Schema, name: str) -> Schema | None:
    """The schema of the key `name` of a section, or of any name in a mapping to sections; None where there is none."""
    named = keys_of(schema).get(name)
    if named is not None:
        return dict(named)
    inner = next((branch["additionalProperties"] for branch in branches(schema) if _maps(branch)), None)
    return inner if inner is not None and keys_of(inner) else None


def _maps(branch: Schema) -> bool:
    return isinstance(branch.get("additionalProperties"), dict)


def leaves() -> dict[str, Schema]:
    """Dotted key to schema of every key that holds a value."""
    return dict(_walk(recipe_schema(), ""))


def sections() -> dict[str, Schema]:
    """Name to schema of every section."""
    return {name: schema for name, schema in keys_of(recipe_schema()).items() if keys_of(schema)}


def at(parts: tuple[str, ...]) -> Schema:
    """The schema of a known key."""
    schema = recipe_schema()
    for part in parts:
        inner = below(schema, part)
        assert inner is not None, f"no key {part} of {parts}"
        schema = inner
    return schema


def known_part(parts: tuple[object, ...]) -> tuple[str, ...]:
    """The longest beginning of `parts` that names a key."""
    schema = recipe_schema()
    known: list[str] = []
    for part in map(str, parts):
        inner = below(schema, part)
        if inner is None:
            break
        schema = inner
        known.append(part)
    return tuple(known)


def kinds(schema: Schema) -> set[str]:
    """The JSON types a key accepts: integer, number, string, boolean, array, object, null."""
    return {branch["type"] for branch in branches(schema) if "type" in branch} | {
        "string" for value in choices(schema) if isinstance(value, str)
    }


def choices(schema: Schema) -> list[Any]:
    """The words (or numbers) a key accepts, where it accepts only some."""
    return [value for branch in branches(schema) for value in _choices(branch)]


def wanted(schema: Schema) -> str:
    """What a key accepts, as a phrase that follows "must be"."""
    phrases = [_phrase(branch) for branch in branches(schema)]
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " or " + phrases[-1]


def required(schema: Schema) -> list[str]:
    """The keys of a section that have no default."""
    return next((branch.get("required", []) for branch in branches(schema) if "properties" in branch), [])


def meaning(schema: Schema) -> str:
    """The key's help text; a section's own where the key has none."""
    return schema.get("description") or next(branch["description"] for branch in branches(schema))


def _walk(schema: Schema, prefix: str) -> Iterator[tuple[str, Schema]]:
    for name, inner in keys_of(schema).items():
        if keys_of(inner):
            yield from _walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _choices(branch: Schema) -> list[Any]:
    return branch["enum"] if "enum" in branch else [branch["const"]] if "const" in branch else []


def _phrase(branch: Schema) -> str:
    if values := _choices(branch):
        names = [written(value) for value in values]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    return _PHRASES[branch["type"]](branch)


def _numeric(noun: str, branch: Schema) -> str:
    bounds = [text.format(branch[name]) for name, text in _BOUNDS.items() if name in branch]
    joined = " and ".join(bounds)
    return f"{noun} of {joined}" if joined.startswith("at") else f"{noun} {joined}".rstrip()


def _array(branch: Schema) -> str:
    if "prefixItems" in branch:
        items = branch["prefixItems"]
        return f"a list of {len(items)} values, each {wanted(items[0])}"
    least = f" of at least {branch['minItems']}" if "minItems" in branch else ""
    return f"a list{least}, each {wanted(branch['items'])}"


def _object(branch: Schema) -> str:
    if "properties" in branch:
        return "a section of keys"
    return "a mapping of names to sections" if keys_of(branch["additionalProperties"]) else "a mapping of text to text"


def _text(branch: Schema) -> str:
    if "pattern" in branch:
        return str(branch["title"])
    return "text" if "minLength" not in branch else "text that is not empty"


_PHRASES = {
    "integer": lambda branch: _numeric("a whole number", branch),
    "number": lambda branch: _numeric("a number", branch),
    "string": _text,
    "boolean": lambda branch: "true or false",
    "null": lambda branch: "null",
    "array": _array,
    "object": _object,
}
