"""A recipe file plus overrides, as a valid `Recipe` that knows where each value came from.

Knows the order of precedence: overrides, recipe, what it extends, defaults. Nothing of YAML (`tree.py`) or of the
keys (`schema.py`). The invariant: it returns a valid recipe, or raises one `RecipeError` that holds every problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import QloraError, RecipeError
from qlora_cli.recipe import extends
from qlora_cli.recipe.check import check
from qlora_cli.recipe.nodes import Finding, Place, Table, entry_at, merge, nested
from qlora_cli.recipe.scalars import printable
from qlora_cli.recipe.schema import Recipe, Section
from qlora_cli.recipe.tree import parse_value

DEFAULT = "default"


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, its file, that file's text as it stands, and the origin of every value by dotted key."""

    recipe: Recipe
    path: Path
    text: str
    origins: Mapping[str, str]
    extends: tuple[Path, ...]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe at `path` (a file, or a shipped recipe's name) with `key=value` overrides; the later one wins."""
    chain = extends.read_chain(path)
    findings = [*chain.findings]
    table = chain.table
    laid = [_override(text, findings) for text in overrides]
    if table is not None:
        for over in laid:
            table = merge(table, over) if over else table
        table = Table(Place(chain.links[0].source, 1, 1), table.entries)
    recipe, wrong = check(table, chain.is_whole) if table is not None else (None, [])
    findings += wrong
    if findings or recipe is None or table is None:
        raise _error(findings, [link.source for link in chain.links])
    origins = dict(_origins(recipe, table, ()))
    first, *parents = chain.links
    return LoadedRecipe(recipe, first.path, first.parsed.text, origins, tuple(link.path for link in parents))


def _override(text: str, findings: list[Finding]) -> Table | None:
    """The tree of one `key=value`; None when it is malformed, which is then among the findings."""
    key, equals, value = text.partition("=")
    parts = tuple(key.strip().split("."))
    source = f"--set {printable(key.strip())}"
    fault = _fault(text, equals, parts)
    if fault:
        findings.append(Finding(Place(source), fault, "", "e.g. --set train.lr=1e-4"))
        return None
    parsed = parse_value(value, source, parts)
    findings += parsed.findings
    if parsed.root is None or parsed.findings:
        return None
    return nested(parts, parsed.root)


def _fault(text: str, equals: str, parts: tuple[str, ...]) -> str | None:
    """What is wrong with the form of an override, or None."""
    if not equals:
        return f"an override is KEY=VALUE (got {printable(text)!r})"
    if not all(parts) or any(char.isspace() for part in parts for char in part):
        return f"an override's key is names joined by dots (got {printable('.'.join(parts))!r})"
    if parts[0] == extends.KEY:
        return f"{extends.KEY}: this key stands in the file and cannot be overridden (got {printable(text)!r})"
    return None


def _error(findings: list[Finding], sources: list[str]) -> QloraError:
    """All findings as one error: by file (the recipe's own first), by position, the overrides last."""
    rank = {source: index for index, source in enumerate(sources)}
    ordered = sorted(
        findings,
        key=lambda one: (rank.get(one.place.source, len(rank)), one.place.line, one.place.column),
    )
    return RecipeError.of(list(dict.fromkeys(finding.problem() for finding in ordered)))


def _origins(section: Section, table: Table, prefix: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Where each value of the recipe was written down, in the schema's order."""
    for name in type(section).model_fields:
        path = (*prefix, name)
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _origins(value, table, path)
        else:
            entry = entry_at(table, path)
            yield ".".join(path), entry.key.origin if entry else DEFAULT
