"""Whether a run's memory suffices: its plan beside what is free, and after the run beside what it took.

Knows the plan of memory and the recipe. Invariant: a run is refused only where it lacks more than the plan's error, and
what is then proposed was planned too, and fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_cli.errors import DeviceMemoryError
from qlora_cli.model.device import peak_memory, restart_peak
from qlora_cli.recipe.schema import Recipe
from qlora_cli.workflows.events import size
from qlora_cli.workflows.memory import TURNS, Load, Shape, plan_memory, total

ERROR = {"cpu": 0.15, "cuda": 0.10}
"""What a plan may be off by."""
CHECKPOINTING, SHARE_WITHOUT = "train.gradient_checkpointing", 0.5
"""Of the free memory: `auto` computes nothing again where the run needs at most this share."""


@dataclass(frozen=True)
class Needs:
    """A recipe's plan of memory on a device, of which `free` bytes are free (None: not known)."""

    recipe: Recipe
    shape: Shape
    load: Load
    dtype: torch.dtype
    device: str
    free: int | None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return plan_memory(self.recipe, self.shape, self.load, self.dtype, self.device)

    @property
    def lacking(self) -> bool:
        """Whether it needs more than what is free, by more than the plan's error."""
        return self.free is not None and total(self.parts) > self.free * (1 + ERROR[self.device])

    def line(self) -> str:
        """The total against what is free, and the parts."""
        free = "" if self.free is None else f" of {size(self.free)} free"
        named = ", ".join(f"{name} {size(count)}" for name, count in self.parts.items() if count)
        return f"about {size(total(self.parts))}{free} ({named}; of {', '.join(TURNS)} only the largest counts)"

    def problem(self) -> DeviceMemoryError:
        """What to say where it lacks memory."""
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
        named = ", ".join(f"{name} {size(count)}" for name, count in largest)
        return DeviceMemoryError(
            f"the run would need about {size(total(self.parts))} of memory, and {size(self.free or 0)} are free",
            why=f"its largest parts are {named}; no weight was read",
            fix=self.remedy(),
        )

    def remedy(self) -> str:
        """The first values of the recipe that fit, each change on top of those before; else what helps."""
        changes: dict[str, Any] = {}
        needs = self
        for key, value in _smaller(self.recipe):
            changes[key] = value
            needs = replace(needs, recipe=_with(needs.recipe, key, value))
            needs = replace(needs, load=_within(self.load, self.recipe, needs.recipe))
            if needs.free is not None and total(needs.parts) <= needs.free:
                named = " ".join(f"-s {key}={value}" for key, value in changes.items())
                return f"set {named}, for which about {size(total(needs.parts))} are planned"
        return "take a smaller model or a lower lora.r, or free memory: the smallest micro-batches do not suffice"


def settled(needs: Needs) -> Needs:
    """With what `train.gradient_checkpointing: auto` stands for here; off too where it is not known what is free."""
    if needs.recipe.train.gradient_checkpointing != "auto":
        return needs
    off, on = (replace(needs, recipe=_with(needs.recipe, CHECKPOINTING, mode)) for mode in ("off", "on"))
    return off if needs.free is None or total(off.parts) <= needs.free * SHARE_WITHOUT else on


def _smaller(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Changes that need less memory, those first that cost least."""
    if recipe.train.gradient_checkpointing == "off":
        yield CHECKPOINTING, "on"
    yield from (("train.micro_batch_size", rows) for rows in _halves(recipe.train.micro_batch_size, 1))
    yield from (("eval.batch_size", rows) for rows in _halves(recipe.eval.batch_size, 1))
    if not recipe.train.optimizer.endswith("8bit"):
        yield "train.optimizer", "paged_adamw_8bit"
    yield from (("data.max_length", length) for length in _halves(recipe.data.max_length, 64))


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _with(recipe: Recipe, key: str, value: Any) -> Recipe:
    section, _, name = key.partition(".")
    sections = {"train": recipe.train, "eval": recipe.eval, "data": recipe.data}
    return recipe.model_copy(update={section: sections[section].model_copy(update={name: value})})


def _within(load: Load, before: Recipe, now: Recipe) -> Load:
    """At most the load of smaller micro-batches."""
    length = now.data.max_length
    rows, held_out = now.train.micro_batch_size, now.eval.batch_size
    share = rows / before.train.micro_batch_size if not now.train.packing else 1
    return replace(
        load,
        tokens=min(round(load.tokens * share), rows * length),
        longest=min(load.longest, length),
        eval_tokens=min(load.eval_tokens, held_out * length),
        eval_longest=min(load.eval_longest, length),
    )


class Watch:
    """The growth of memory since its making, which comes just before the base is read."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, restart_peak(device)
        self._before = 0 if device.type == "cuda" else self._before

    def growth(self) -> int:
        """Bytes: resident memory's growth, or what was allocated on a CUDA device."""
        return max(0, peak_memory(self._device) - self._before)


def score(planned: int, measured: int) -> str:
    """One line of text."""
    return f"planned {size(planned)}, measured {size(measured)} ({measured / planned:.0%} of the plan)"
