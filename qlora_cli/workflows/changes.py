"""What differs between a run as it began and as it is to go on.

Knows recipes and lock.json as plain values. Invariant: every difference is either one that cannot change what was
learned so far, or refused, or allowed by its name and written down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_cli.errors import DataError, MachineError, ModelError, Problem, QloraError, RecipeError
from qlora_cli.recipe.scalars import written
from qlora_cli.recipe.schema import Recipe

FREE = ("train.steps", "train.epochs", "save", "eval.every", "log", "data.cache", "quantization.cache")
"""Keys that may differ: of more steps the learning rate knows (see `lr_at`), the others change no value."""
LOCKED = (
    "qlora",
    "base_sha256",
    "data_sha256",
    "versions",
    "python",
    "device",
    "threads",
    "compute_dtype",
    "processes",
)
"""What is compared of lock.json, as keys."""
KINDS: Mapping[str, type[QloraError]] = {"base_sha256": ModelError, "data_sha256": DataError}


@dataclass(frozen=True)
class Change:
    """A key, dotted, and its two values."""

    key: str
    before: Any
    now: Any

    def line(self) -> str:
        """One line of text."""
        return f"{self.key} was {_shown(self.before)}, and is {_shown(self.now)}"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def under(self, keys: Sequence[str]) -> bool:
        """Whether the key is one of these, or in one of them."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in keys)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and len(value) == 64 else written(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def recipe_changes(before: Recipe, now: Recipe) -> list[Change]:
    """Keys whose values differ, but for where the run is."""
    return _changes(*(each.model_dump(mode="json", exclude={"output"}) for each in (before, now)))


def lock_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs of two lock.json. Of files that only one of them hashes nothing is known."""
    return _changes(_compared(before, now), _compared(now, before))


def _compared(lock: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    hashes = {"data_sha256": lock.get("data")}
    if not (lock.get("base_sha256") and other.get("base_sha256")):
        hashes["base_sha256"] = lock.get("base_samples")
    return {key: hashes.get(key, lock.get(key)) for key in LOCKED}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    was, is_now = dict(_leaves(before)), dict(_leaves(now))
    keys = [*is_now, *(key for key in was if key not in is_now)]
    return [Change(key, was.get(key), is_now.get(key)) for key in keys if was.get(key) != is_now.get(key)]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_changes(changes: Sequence[Change], allowed: Sequence[str], run: str) -> None:
    """Raises an error that names every change that is neither free nor allowed."""
    refused = [change for change in changes if not change.under([*FREE, *allowed])]
    if not refused:
        return
    kind = KINDS.get(refused[0].key.split(".")[0], MachineError if refused[0].under(LOCKED) else RecipeError)
    why = "what was trained so far would not go on as it began"
    problems = [
        Problem(change.line(), why, f"put it back as it was, or allow it: --allow-change {change.key}", run)
        for change in refused
    ]
    raise kind.of(problems)


def check_allowed(allowed: Sequence[str], recipe: Recipe) -> None:
    """Raises `RecipeError` for a key of `--allow-change` that there is not."""
    known = {part for key, _ in _leaves(recipe.model_dump(mode="json")) for part in _upwards(key)} | {*LOCKED}
    for key in allowed:
        if key not in known and key.split(".")[0] not in LOCKED:
            what = f"--allow-change {key}: no key of a recipe, nor of {', '.join(LOCKED)}"
            raise RecipeError(what, fix="name it as the refusal to resume did")


def _upwards(key: str) -> Iterator[str]:
    parts = key.split(".")
    yield from (".".join(parts[: end + 1]) for end in range(len(parts)))
