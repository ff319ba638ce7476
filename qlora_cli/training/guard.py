"""What must stop a run: numbers that are not finite, and memory that does not suffice.

Knows values and exceptions. Invariant: nothing here lets a run go on that should not; no weight is updated with a
loss or gradient that is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from qlora_cli.errors import DeviceMemoryError

MOST_NAMED = 16
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
"""How torch's CPU allocator, CUDA and cuBLAS say it where torch has no type of its own."""


def nonfinite(step: int, loss: float, grad_norm: float, bad: Sequence[str], rows: Sequence[str]) -> str:
    """What is not finite of a step, with the rows whose own loss is `bad`, else all of its rows."""
    named = f"the loss of {_list(bad)} is not finite" if bad else f"its rows, each finite alone, are {_list(rows)}"
    return f"step {step}: loss {loss}, gradient norm {grad_norm}; {named}"


def _list(rows: Sequence[str]) -> str:
    return ", ".join(rows[:MOST_NAMED]) + (f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else "")


@contextmanager
def memory_guard(doing: str) -> Iterator[None]:
    """Turns running out of memory into a `DeviceMemoryError` that says during what, and what would need less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(doing) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise _out_of_memory(doing) from error


def _out_of_memory(doing: str) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"out of memory while {doing}",
        fix="lower train.micro_batch_size or data.max_length, set train.gradient_checkpointing to on or offload, "
        "or lower eval.batch_size (while evaluating) or lora.r; `qlora train RECIPE --dry-run` shows what takes how "
        "much",
    )
