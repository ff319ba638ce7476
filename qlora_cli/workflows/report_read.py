"""A run directory as a report wants it: all its records, whole or what is left of them.

Knows the files of a run. Invariant: it only reads; no content of them raises, what cannot be used is among the
problems, and no secret is passed on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.recipe.nodes import Items, Node, Scalar
from qlora_cli.recipe.nodes import Table as Keys
from qlora_cli.recipe.scalars import written
from qlora_cli.recipe.tree import read_file
from qlora_cli.secrets import redact
from qlora_cli.workflows.eval import EVALUATIONS
from qlora_cli.workflows.locate import MERGED
from qlora_cli.workflows.resume import LOCK
from qlora_cli.workflows.run_files import Values, plain, read_lines, text
from qlora_cli.workflows.rundir import RESOLVED, SAMPLES
from qlora_cli.workflows.show import METRICS, ShowResult, run_show

PLAN, RECEIPT = "plan.json", "data_receipt.json"
KEPT = "\n\t\u200c\u200d"
"""Characters that do not print and do no harm: the last two join and part letters and pictures."""
LARGEST = 1 << 26
"""Bytes of a JSON record; a larger one is none of ours."""


@dataclass(frozen=True)
class Setting:
    """A value of the recipe as it is written, and where it came from."""

    value: str
    origin: str


@dataclass(frozen=True)
class Record:
    """What a run left. `name` tells it from the others of the report, `colour` counts them."""

    name: str
    colour: int
    found: ShowResult
    steps: tuple[Values, ...]
    evals: tuple[Values, ...]
    plan: Values
    receipt: Values
    lock: Values
    recipe: Mapping[str, Setting]
    samples: tuple[Values, ...]
    evaluations: tuple[tuple[str, Values], ...]
    merges: tuple[tuple[str, Values], ...]
    problems: tuple[str, ...]

    @property
    def base(self) -> str:
        """The base model's name; empty where it is not known."""
        named = text(dig(self.lock, "base").get("name"))
        written_down = self.recipe.get("model.base")
        return named or (written_down.value.strip('"') if written_down else "")


def read_record(run: Path, name: str, colour: int) -> Record:
    """All of a run. Raises `ModelError` for what is no run directory."""
    found = run_show(run)
    problems = list(found.problems)
    lines = [line for line in read_lines(run / METRICS, []) if isinstance(line.get("kind"), str)]
    return Record(
        name=clean(name),
        colour=colour,
        found=found,
        steps=tuple(line for line in lines if line["kind"] == "step"),
        evals=tuple(map(_clean, (line for line in lines if line["kind"] == "eval"))),
        plan=_object(run / PLAN, problems),
        receipt=_object(run / RECEIPT, problems),
        lock=_object(run / LOCK, problems),
        recipe=_recipe(run / RESOLVED, problems),
        samples=tuple(map(_clean, read_lines(run / SAMPLES, problems))),
        evaluations=tuple(_objects(run, f"{EVALUATIONS}/*.json", problems)),
        merges=tuple(_objects(run, f"*/{MERGED}", problems)),
        problems=tuple(map(clean, problems)),
    )


def dig(values: Values, *names: str) -> Values:
    """The object under these names, one in the other; empty where there is none."""
    for name in names:
        inner = values.get(name)
        values = inner if isinstance(inner, dict) else {}
    return values


def items(values: Values, name: str) -> list[Values]:
    """The objects of a list."""
    found = values.get(name)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def clean(value: str) -> str:
    """Text without secrets and without characters that could not be printed or would turn it round."""
    shown = redact(value.encode("utf-8", "backslashreplace").decode("utf-8"))
    return "".join(each if each in KEPT or each.isprintable() else _escape(each) for each in shown)


def _escape(char: str) -> str:
    return " " if char.isspace() else char.encode("unicode_escape").decode("ascii")


def _clean(value: Any) -> Any:
    """A JSON value, all its text clean; what cannot be one becomes an empty object."""
    try:
        return _cleaned(plain(value))
    except RecursionError:
        return {}


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {clean(key): _cleaned(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    return clean(value) if isinstance(value, str) else value


def _object(path: Path, problems: list[str]) -> Values:
    """The object that a JSON file holds; empty where it does not, which is then a problem, or is not there."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no object")
        return {}
    found: Values = _clean(value)
    return found


def _objects(run: Path, pattern: str, problems: list[str]) -> Iterator[tuple[str, Values]]:
    """(its path in the run, what it holds) of every such file."""
    try:
        paths = sorted(run.glob(pattern))
    except OSError as error:
        problems.append(f"{pattern} cannot be read: {error}")
        return
    for path in paths:
        if found := _object(path, problems):
            yield clean(path.relative_to(run).as_posix()), found


def _recipe(path: Path, problems: list[str]) -> dict[str, Setting]:
    """Every value by its dotted key. It is read as a tree, so that a recipe of another version is one, too."""
    if not path.is_file():
        problems.append(f"{path.name} is missing: the recipe is not known")
        return {}
    parsed = read_file(path, path.name)
    problems += [f"{finding.place}: {finding.what}" for finding in parsed.findings]
    lines = parsed.text.split("\n")
    leaves = _leaves(parsed.root, "") if isinstance(parsed.root, Keys) else iter(())
    return {clean(key): Setting(clean(written(_value(node))), _origin(lines, node)) for key, node in leaves}


def _leaves(table: Keys, prefix: str) -> Iterator[tuple[str, Node]]:
    for name, entry in table.entries.items():
        if isinstance(entry.node, Keys) and entry.node.entries:
            yield from _leaves(entry.node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry.node


def _value(node: Node) -> Any:
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [_value(each) for each in node.nodes]
    return {name: _value(entry.node) for name, entry in node.entries.items()} if isinstance(node, Keys) else "?"


def _origin(lines: list[str], node: Node) -> str:
    """What the snapshot says behind the value; empty where it says nothing."""
    line = lines[node.place.line - 1] if 0 < node.place.line <= len(lines) else ""
    return clean(line.rpartition("  # ")[2]) if "  # " in line else ""
