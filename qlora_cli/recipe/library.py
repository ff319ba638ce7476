"""The recipes that are shipped: where they are, and what they are called.

Knows file names only, not what is in them. The invariant: a name is a file's stem, and no two files share one.
"""

from __future__ import annotations

import difflib
from pathlib import Path


def recipes_dir() -> Path:
    """The folder of shipped recipes: inside the installed package, or at the top of a source checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def shipped() -> dict[str, Path]:
    """Name to file of every shipped recipe, sorted by name."""
    return {path.stem: path for path in sorted(recipes_dir().rglob("*.yaml"), key=lambda path: path.stem)}


def find(name: str) -> Path | None:
    """The file of the shipped recipe `name`, or None."""
    return shipped().get(name)


def near(text: str) -> list[str]:
    """Names of shipped recipes that resemble `text`, the nearest first; all of them when none does."""
    names = list(shipped())
    stem = text.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
    return difflib.get_close_matches(stem, names, n=3, cutoff=0.4) or names
