"""From a tree to a valid `Recipe`, or to everything that is wrong with it at once.

Knows pydantic's errors and turns each into one sentence about one key; nothing of files. The invariant: exactly one
finding per wrong key, and a rule is reported only when none of its keys is wrong already.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from qlora_cli.recipe import fields, hints, rules
from qlora_cli.recipe.nodes import (
    Finding,
    Place,
    Scalar,
    Table,
    broken_keys,
    entry_at,
    merge,
    nearest_place,
    nested,
    plain,
    without,
)
from qlora_cli.recipe.schema import Recipe

# What to write for the keys that have no default. A test compares them with the schema.
EXAMPLES = {"model.base": "Qwen/Qwen3-8B"}
OF_A_SOURCE = {"path": "rows.jsonl"}


@dataclass
class _Complaints:
    """What was found so far: keys that are wrong, and keys that an unknown one was surely meant to be."""

    is_whole: bool
    findings: list[Finding] = field(default_factory=list)
    wrong: set[tuple[str, ...]] = field(default_factory=set)
    meant: set[tuple[str, ...]] = field(default_factory=set)

    def is_wrong(self, parts: tuple[str, ...]) -> bool:
        """Whether the key, or a section around it, is wrong already."""
        return not self.wrong.isdisjoint(_beginnings(parts))

    def explains(self, parts: tuple[str, ...]) -> bool:
        """Whether the absence of the key follows from something already found."""
        return not self.is_whole or not (self.wrong | self.meant).isdisjoint(_beginnings(parts))


def _beginnings(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [parts[:length] for length in range(1, len(parts) + 1)]


def check(table: Table, is_whole: bool = True) -> tuple[Recipe | None, list[Finding]]:
    """The recipe (None when it is not valid) and what is wrong with it, in no order.

    Of a table that is not whole (a recipe it extends could not be read), what is absent is not held against it.
    """
    complaints = _Complaints(is_whole=is_whole, wrong=broken_keys(table))
    recipe = _validated(_pruned(table, complaints.wrong))
    if isinstance(recipe, ValidationError):
        _complain(table, recipe, complaints)
    repaired = recipe if isinstance(recipe, Recipe) else _repaired(table, complaints.wrong)
    complaints.findings += _contradictions(repaired, table, complaints)
    is_valid = isinstance(recipe, Recipe) and not complaints.findings
    return (repaired if is_valid else None), complaints.findings


def _validated(table: Table) -> Recipe | ValidationError:
    try:
        return Recipe.model_validate(plain(table))
    except ValidationError as error:
        return error


def _pruned(table: Table, keys: Iterable[tuple[str, ...]]) -> Table:
    for parts in keys:
        table = without(table, parts)
    return table


def _repaired(table: Table, wrong: Iterable[tuple[str, ...]]) -> Recipe | None:
    """The recipe with defaults or examples in place of what is wrong, so that the rules can look at the rest."""
    table = _pruned(table, wrong)
    for key, example in EXAMPLES.items():
        filler = nested(tuple(key.split(".")), Scalar(table.place, example))
        table = merge(filler, table)
    recipe = _validated(table)
    return recipe if isinstance(recipe, Recipe) else None


def _complain(table: Table, error: ValidationError, complaints: _Complaints) -> None:
    """One finding per wrong key; unknown keys first, because a misspelt key also looks like a missing one."""
    found = [
        (detail["type"], tuple(detail["loc"])) for detail in error.errors(include_url=False, include_context=False)
    ]
    absent = [loc for kind, loc in found if kind == "missing" and fields.known_part(loc) == loc]
    unknown = [loc for kind, loc in found if kind == "extra_forbidden"]
    for loc in unknown:
        _unknown(table, loc, complaints)
    for _, loc in found:
        if loc not in unknown and loc not in absent:  # a list that lacks an item is a wrong list, not a missing key
            _wrong_value(table, fields.known_part(loc), complaints)
    for loc in absent:
        for parts in _missing_leaves(fields.known_part(loc)):
            _missing(table, parts, complaints)


def _unknown(table: Table, loc: tuple[Any, ...], complaints: _Complaints) -> None:
    parts = tuple(str(part) for part in loc)
    suggestion = hints.for_key(".".join(parts[:-1]), parts[-1])
    complaints.wrong.add(parts)
    if suggestion.target:
        complaints.meant.add(tuple(suggestion.target.split(".")))
    entry = entry_at(table, parts)
    got = hints.shown(entry.node) if entry else "a value"
    what = f"{hints.key_text(parts)}: unknown key (got {got})"
    why = suggestion.why or "an unknown key would have no effect"
    complaints.findings.append(Finding(nearest_place(table, parts), what, why, suggestion.fix))


def _wrong_value(table: Table, parts: tuple[str, ...], complaints: _Complaints) -> None:
    if complaints.is_wrong(parts):
        return
    complaints.wrong.add(parts)
    entry = entry_at(table, parts)
    assert entry is not None, "pydantic complains only of values that are there"
    schema, key = fields.at(parts), ".".join(parts)
    what = f"{key}: must be {fields.wanted(schema)} (got {hints.shown(entry.node)})"
    why = f"this key means: {fields.meaning(schema)}"
    fix = hints.for_value(key, schema, entry.node)
    complaints.findings.append(Finding(entry.node.place, what, why, fix))


def _missing_leaves(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A missing section stands for the required keys in it."""
    inner = fields.required(fields.at(parts))
    return [(*parts, name) for name in inner] or [parts]


def _missing(table: Table, parts: tuple[str, ...], complaints: _Complaints) -> None:
    if complaints.explains(parts):
        return
    complaints.wrong.add(parts)
    key = ".".join(parts)
    example = EXAMPLES.get(key) or OF_A_SOURCE[parts[-1]]
    fix = f"write `{parts[-1]}: {example}` under `{parts[-2]}:`, or pass --set {key}={example}"
    what = f"{key}: this key is required (got nothing)"
    why = f"this key means: {fields.meaning(fields.at(parts))}"
    complaints.findings.append(Finding(nearest_place(table, parts), what, why, fix))


def _contradictions(recipe: Recipe | None, table: Table, complaints: _Complaints) -> list[Finding]:
    if recipe is None:
        return []
    return [
        Finding(_rule_place(table, clash.keys), f"{clash.keys[0]}: {clash.what}", clash.why, clash.fix)
        for clash in rules.clashes(recipe)
        if not any(complaints.explains(tuple(key.split("."))) for key in clash.keys)
    ]


def _rule_place(table: Table, keys: tuple[str, ...]) -> Place:
    """The first of the keys that is written down, or else the section of the first."""
    paths = [tuple(key.split(".")) for key in keys]
    for parts in paths:
        if entry := entry_at(table, parts):
            return entry.node.place if isinstance(entry.node, Scalar) else entry.key
    return nearest_place(table, paths[0])
