"""Writes the documents that are made from the code, or with --check names those that are out of date.

Knows which document is made from what; the texts themselves stand in the schema and in the commands' help. The
invariant: a document is a pure function of the code, so that `--check` needs nothing but a comparison.

    python scripts/make_docs.py [--check]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from qlora_cli.recipe import reference

ROOT = Path(__file__).resolve().parent.parent
_APP = "qlora_cli.cli.app"
_CLI_HEAD = """# Command line

Made from the commands' own help by `scripts/make_docs.py`; do not edit.
"""
# The program's name stands in its usage lines, so it must be the installed one.
_RUN = f"import sys; sys.argv[0] = 'qlora'; from {_APP} import main; sys.exit(main(sys.argv[1:]))"


def documents() -> dict[str, str]:
    """Path below the repository's root to text, of every generated document."""
    made = {
        "docs/recipe.schema.json": json.dumps(reference.json_schema(), indent=2) + "\n",
        "docs/recipe.md": reference.recipe_markdown(),
    }
    if importlib.util.find_spec(_APP):
        made["docs/cli.md"] = cli_markdown()
    return made


def cli_markdown() -> str:
    """The help of the program and of every command."""
    app = importlib.import_module(_APP).app
    sections = [f"## qlora {' '.join(path)}".rstrip() + f"\n\n```text\n{_help(path)}\n```\n" for path in _paths(app)]
    return "\n".join([_CLI_HEAD, *sections])


def _paths(app: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The program itself, its commands, and those of its groups."""
    commands = [command for command in app.registered_commands if not command.hidden]
    names = [command.name or command.callback.__name__.replace("_", "-") for command in commands]
    paths = [prefix, *((*prefix, name) for name in names)]
    for group in app.registered_groups:
        if not group.hidden:
            paths += _paths(group.typer_instance, (*prefix, group.name))
    return paths


def _help(path: tuple[str, ...]) -> str:
    plain = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"} | plain
    command = [sys.executable, "-c", _RUN, *path, "--help"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"qlora {' '.join(path)} --help failed:\n{done.stdout}{done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")


def stale(made: dict[str, str]) -> list[str]:
    """The documents on disk that differ from what the code makes."""
    return [name for name, text in made.items() if not _is_current(ROOT / name, text)]


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode("utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the documents that are made from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; name what is out of date and exit 1")
    only_check = parser.parse_args().check
    made = documents()
    changed = stale(made)
    for name in changed:
        print(f"out of date: {name}" if only_check else f"written: {name}")
        if not only_check:
            (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / name).write_bytes(made[name].encode("utf-8"))
    return 1 if only_check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
