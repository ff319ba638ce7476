"""What a rule finds: keys that do not go together.

Knows words. Invariant: a clash names every key that was read, the one most likely at fault first, and a way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qlora_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Clash:
    """Keys that do not go together; `what` is a phrase about the first of them."""

    keys: tuple[str, ...]
    what: str
    why: str
    fix: str


Rule = Callable[[Recipe], Iterator[Clash]]
