"""The recipe's reference: a JSON Schema for editors, and tables for people.

Knows the schema through `fields.py`; nothing of loading. The invariant: every key appears once, with the words,
ranges, defaults and help texts of `schema.py` and no others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from qlora_cli.recipe import fields
from qlora_cli.recipe.extends import KEY as EXTENDS
from qlora_cli.recipe.scalars import written

_EXTENDS: fields.Schema = {
    "type": "string",
    "minLength": 1,
    "description": "Another recipe to start from: a path relative to this file, or a shipped recipe's name. "
    "Sections are merged key by key; lists and single values are replaced; null replaces a whole section; `output` is "
    "not inherited.",
}
_HEAD = """# Recipe reference

Made from `qlora_cli/recipe/schema.py` by `scripts/make_docs.py`; do not edit.

A recipe is one YAML mapping. Unknown keys, duplicate keys, aliases, tags and merge keys are refused. Numbers are
decimal (`16`, `0.5`, `2e-4`); only `true` and `false` are booleans. Any key can be set for one run:
`--set train.lr=1e-4`. A value comes from `--set`, or else the recipe, or else what the recipe extends, or else the
default.
"""


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file: the recipe, and `extends`, which relaxes what is required."""
    schema = copy.deepcopy(fields.recipe_schema())
    complete = {"required": schema.pop("required"), "properties": {}}
    for name, section in fields.sections().items():
        if needed := fields.required(section):
            complete["properties"][name] = {"required": list(needed)}
    for section in schema["$defs"].values():
        section.pop("required", None)
    schema["properties"] = {EXTENDS: dict(_EXTENDS), **schema["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "anyOf": [{"required": [EXTENDS]}, complete],
    }


def recipe_markdown() -> str:
    """Every key in a table per section."""
    top = {EXTENDS: _EXTENDS, **{key: schema for key, schema in fields.leaves().items() if "." not in key}}
    parts = [_HEAD, *_section("Top level", "", top)]
    for name, section in fields.sections().items():
        parts += _tables(name, section)
    return "\n".join(parts)


def _tables(name: str, section: fields.Schema) -> Iterator[str]:
    """The table of a section, and those of the sections in it."""
    keys = fields.keys_of(section)
    inner = {key: schema for key, schema in keys.items() if fields.keys_of(schema)}
    named = {f"{key}.NAME": found for key in keys if key not in inner and (found := fields.below(keys[key], "NAME"))}
    yield from _section(f"`{name}`", fields.meaning(section), {k: v for k, v in keys.items() if k not in inner})
    for key, schema in (inner | named).items():
        yield from _tables(f"{name}.{key}", schema)


def _section(title: str, text: str, keys: dict[str, fields.Schema]) -> Iterator[str]:
    yield f"## {title}\n"
    if text:
        yield f"{text}\n"
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, schema in keys.items():
        cells = [f"`{name}`", fields.wanted(schema), _default(schema), fields.meaning(schema)]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _default(schema: fields.Schema) -> str:
    if "default" not in schema:
        return "none" if schema is _EXTENDS else "`{}`" if schema.get("type") == "object" else "required"
    return f"`{written(schema['default'])}`"
