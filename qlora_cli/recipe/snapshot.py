"""The resolved recipe as a file: every value, and where it came from.

Knows how to write a `Recipe` as YAML and to read it back. The invariant: reading what was written gives an equal
`Recipe`, whatever text its values hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_cli.recipe.load import LoadedRecipe, load_recipe
from qlora_cli.recipe.scalars import printable, written
from qlora_cli.recipe.schema import Recipe, Section


def resolved_yaml(loaded: LoadedRecipe) -> str:
    """Every value of the recipe on a line of its own, its origin behind it as a comment."""
    head = "# Every value of this run, and where it came from."
    return "\n".join([head, *_lines(loaded.recipe, loaded.origins, ())]) + "\n"


def read_resolved(path: str | Path) -> Recipe:
    """The recipe that `resolved_yaml` wrote to a file."""
    return load_recipe(path).recipe


def _lines(section: Section, origins: Mapping[str, str], prefix: tuple[str, ...]) -> Iterator[str]:
    indent = "  " * len(prefix)
    for name in type(section).model_fields:
        value = getattr(section, name)
        path = (*prefix, name)
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _lines(value, origins, path)
        elif isinstance(value, dict) and any(isinstance(each, Section) for each in value.values()):
            yield f"{indent}{name}:  # {printable(origins['.'.join(path)])}"
            yield from (f"{indent}  {written(key)}: {written(each.model_dump())}" for key, each in value.items())
        else:
            yield f"{indent}{name}: {written(value)}  # {printable(origins['.'.join(path)])}"
