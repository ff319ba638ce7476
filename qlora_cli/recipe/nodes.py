"""The recipe as a tree that remembers where each key and value stands.

Knows places, nodes and how two trees merge; nothing of YAML syntax, files or the schema. The invariant: every node
and every key carries the place of the text it came from, also after a merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from qlora_cli.errors import Problem
from qlora_cli.recipe.scalars import Value


@dataclass(frozen=True)
class Place:
    """A position in a file (line and column from 1), or an override, which has no lines (0)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    @property
    def origin(self) -> str:
        """The place without its column."""
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Finding:
    """A problem at a place, not yet sorted among the others."""

    place: Place
    what: str
    why: str = ""
    fix: str = ""

    def problem(self) -> Problem:
        return Problem(self.what, self.why, self.fix, str(self.place))


@dataclass(frozen=True)
class Scalar:
    """A single value; `plain` when it was written without quotes."""

    place: Place
    value: Value
    plain: bool = True


@dataclass(frozen=True)
class Items:
    """A list."""

    place: Place
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Table:
    """A mapping of text keys."""

    place: Place
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class Broken:
    """A value that was refused while it was read; its problem is already reported."""

    place: Place


Node: TypeAlias = Scalar | Items | Table | Broken


@dataclass(frozen=True)
class Entry:
    """The place of a key, and its value."""

    key: Place
    node: Node


def nested(parts: tuple[str, ...], node: Node) -> Table:
    """The table that holds only `node`, under the keys `parts` (at least one)."""
    inner = nested(parts[1:], node) if len(parts) > 1 else node
    return Table(node.place, {parts[0]: Entry(node.place, inner)})


def merge(base: Table, over: Table) -> Table:
    """`over` laid on `base`: tables key by key, everything else replaced."""
    entries = dict(base.entries)
    for name, entry in over.entries.items():
        old = entries.get(name)
        if old and isinstance(old.node, Table) and isinstance(entry.node, Table):
            entry = replace(entry, node=merge(old.node, entry.node))  # noqa: PLW2901
        entries[name] = entry
    return Table(over.place, entries)


def plain(node: Node) -> Any:
    """The bare values; lists as tuples, because the schema is strict and its lists are tuples."""
    if isinstance(node, Table):
        return {name: plain(entry.node) for name, entry in node.entries.items()}
    if isinstance(node, Items):
        return tuple(plain(item) for item in node.nodes)
    return node.value if isinstance(node, Scalar) else None


def entry_at(table: Table, parts: Iterable[str]) -> Entry | None:
    """The entry under the nested keys, or None."""
    node: Node = table
    entry: Entry | None = None
    for part in parts:
        entry = node.entries.get(part) if isinstance(node, Table) else None
        if entry is None:
            return None
        node = entry.node
    return entry


def nearest_place(table: Table, parts: tuple[str, ...]) -> Place:
    """Where the key stands, or else the deepest section around it that is written down, or else the root."""
    for length in range(len(parts), 0, -1):
        if entry := entry_at(table, parts[:length]):
            return entry.key
    return table.place


def broken_keys(table: Table, prefix: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Paths of the keys whose values were refused while they were read."""
    found: set[tuple[str, ...]] = set()
    for name, entry in table.entries.items():
        path = (*prefix, name)
        if isinstance(entry.node, Broken):
            found.add(path)
        elif isinstance(entry.node, Table):
            found |= broken_keys(entry.node, path)
    return found


def without(table: Table, parts: tuple[str, ...]) -> Table:
    """The table less the key `parts`; unchanged when it is not there."""
    entry = table.entries.get(parts[0])
    if entry is None:
        return table
    entries = dict(table.entries)
    if len(parts) == 1:
        del entries[parts[0]]
    elif isinstance(entry.node, Table):
        entries[parts[0]] = replace(entry, node=without(entry.node, parts[1:]))
    return replace(table, entries=entries)
