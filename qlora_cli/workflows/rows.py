"""Reading and encoding rows, told as it goes.

Sees a recipe's data section. Invariant: whoever reads a recipe's rows, for training, evaluation or a preview, reads
them through here, and so from the same cache with the same seed.
"""

from __future__ import annotations

from typing import Any

from qlora_cli.cache.entries import find_cache
from qlora_cli.data.batches import Batching, Order
from qlora_cli.data.dataset import Opened, Setting, TokenData, Watch
from qlora_cli.recipe.schema import Recipe
from qlora_cli.workflows.events import Emit, Fact, Meter, Notice, Stage

TOLD_EVERY = 10_000
SAMPLED_STEPS = 50
LARGE = 10_000_000
"""Bytes of a source from which its progress is told."""


def setting_of(recipe: Recipe, tokenizer: Any, emit: Emit) -> Setting:
    """What the rows of `recipe` are encoded with."""
    return Setting(
        tokenizer=tokenizer,
        seed=recipe.train.seed,
        cache=find_cache(
            recipe.data.cache, lambda text: emit(Fact("cache", text)), lambda text: emit(Notice(text)), kind="rows"
        ),
        watch=_watch(emit),
    )


def packing_share(recipe: Recipe, data: TokenData, order: Order, rows: int) -> float | None:
    """The share of positions that hold tokens in the first steps' packs; None where rows are not packed."""
    if not recipe.train.packing:
        return None
    batching = Batching(recipe.train.micro_batch_size, recipe.data.max_length, packed=True)
    steps = min(SAMPLED_STEPS, -(-rows // recipe.train.batch_size))
    drawn = [[data.train[i] for i in order.step_rows(step, rows)] for step in range(steps)]
    positions = sum(batching.positions(batch) for step in drawn for batch in batching.split(step))
    return sum(len(row) for step in drawn for row in step) / positions


def _watch(emit: Emit) -> Watch:
    meters: dict[str, Meter] = {}
    seen: dict[str, int] = {}

    def watch(source: Opened, rows: int, read: int) -> None:
        name, total = source.name, source.source.bytes
        if total is None:
            if rows // TOLD_EVERY > seen.get(name, 0):
                emit(Stage(f"encoding {name}, {rows:,} rows"))
            seen[name] = rows // TOLD_EVERY
        elif total >= LARGE:
            meter = meters.setdefault(name, Meter(f"encoding {name}", total, emit))
            meter(max(0, min(read, total) - seen.get(name, 0)))
            seen[name] = read

    return watch
