"""A recipe file and the recipes it extends, merged into one tree.

Knows files and the `extends` key; nothing of the rest of the schema. The invariant: a chain is finite (no cycle, at
most `MAX_CHAIN` files), and every problem on the way is placed in the file that has it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import RecipeError
from qlora_cli.recipe import library
from qlora_cli.recipe.nodes import Broken, Finding, Scalar, Table, merge, without
from qlora_cli.recipe.scalars import printable, written
from qlora_cli.recipe.tree import Parsed, kind, read_file
from qlora_cli.secrets import redact

MAX_CHAIN = 10
KEY = "extends"


@dataclass(frozen=True)
class Link:
    """One file of a chain."""

    path: Path
    source: str
    parsed: Parsed


@dataclass(frozen=True)
class Chain:
    """The files, the recipe's own first, and what is wrong in them.

    `table` is None when nothing could be read; `is_whole` is false when a part is missing from it.
    """

    links: tuple[Link, ...]
    table: Table | None
    findings: tuple[Finding, ...]
    is_whole: bool


def read_chain(recipe: str | Path) -> Chain:
    """The recipe at a path, or the shipped one of that name, and all it extends."""
    links = [_link(locate(recipe))]
    findings = [*links[0].parsed.findings]
    while (parent := _parent(links, findings)) is not None:
        links.append(_link(parent))
        findings += links[-1].parsed.findings
    last = links[-1].parsed.root  # a chain that broke off ends in a recipe that says it extends another
    is_whole = isinstance(last, Table) and KEY not in last.entries
    return Chain(tuple(links), _merged(links), tuple(findings), is_whole)


def locate(recipe: str | Path) -> Path:
    """The file meant by a path or a shipped recipe's name; a `RecipeError` that lists near names when there is none."""
    path = Path(recipe)
    if _is_file(path):
        return path
    if shipped := library.find(str(recipe)):
        return shipped
    what = "there is no such recipe, neither a file nor a shipped one"
    if _is_dir(path):
        what = "this is a folder; a recipe is a YAML file"
    fix = f"check the path, or take a shipped recipe: {', '.join(library.near(str(recipe)))}"
    raise RecipeError(f"{what} (got {printable(str(recipe))!r})", "", fix, printable(str(recipe)))


def _link(path: Path) -> Link:
    source = _label(path)
    return Link(path, source, read_file(path, source))


def _label(path: Path) -> str:
    """The file's name in messages: as given, or relative when it lies below the working directory."""
    normal = os.path.normpath(path)
    here = str(Path.cwd()) + os.sep
    return redact(printable(normal.removeprefix(here)))


def _parent(links: list[Link], findings: list[Finding]) -> Path | None:
    """The file that the last link extends; None at the end of the chain or when it cannot be used."""
    child = links[-1]
    root = child.parsed.root
    entry = root.entries.get(KEY) if isinstance(root, Table) else None
    if entry is None:
        return None
    node = entry.node
    if not isinstance(node, Scalar) or not isinstance(node.value, str) or not node.value:
        if not isinstance(node, Broken):
            got = written(node.value) if isinstance(node, Scalar) else kind(node)
            what = f"{KEY}: must be the path or the name of one recipe (got {got})"
            findings.append(Finding(node.place, what, "", "e.g. `extends: base.yaml`"))
        return None
    parent = _named(node.value, child.path)
    finding = _unusable(parent, node, links)
    findings += [finding] if finding else []
    return None if finding else parent


def _named(name: str, child: Path) -> Path | None:
    beside = child.parent / name
    return beside if _is_file(beside) else library.find(name)


def _unusable(parent: Path | None, node: Scalar, links: list[Link]) -> Finding | None:
    """Why the parent cannot be used, or None."""
    if parent is None:
        what = f"{KEY}: there is no such recipe (got {node.value!r})"
        why = "a path is relative to the file that says it; a bare name is a shipped recipe"
        return Finding(node.place, what, why, f"shipped recipes: {', '.join(library.near(str(node.value)))}")
    seen = [link.path.resolve() for link in links]
    if parent.resolve() in seen:
        circle = links[seen.index(parent.resolve()) :]
        shown = " -> ".join([*(link.source for link in circle), circle[0].source])
        return Finding(node.place, f"{KEY}: the recipes extend each other in a circle (got {shown})", "", _CUT)
    if len(links) >= MAX_CHAIN:
        shown = " -> ".join(link.source for link in links)
        return Finding(node.place, f"{KEY}: more than {MAX_CHAIN} recipes in a chain (got {shown})", "", _CUT)
    return None


_CUT = "remove one `extends:` line and write out the keys it brought"


def _merged(links: list[Link]) -> Table | None:
    """The chain as one table. `output` is not inherited: two recipes would write into one directory."""
    roots = [link.parsed.root for link in links]
    tables = [root if i == 0 else without(root, ("output",)) for i, root in enumerate(roots) if isinstance(root, Table)]
    if not tables:
        return None
    merged = tables[-1]
    for table in reversed(tables[:-1]):
        merged = merge(merged, table)
    return without(merged, (KEY,))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, a NUL
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
