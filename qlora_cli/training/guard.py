"""What must stop a run: numbers that are not finite, and memory that does not suffice.

Knows values and exceptions. Invariant: nothing here lets a run go on that should not; no weight is updated with a
loss or gradient that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from qlora_cli.errors import DeviceMemoryError, NonFiniteError

MOST_NAMED = 16
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
"""How torch's CPU allocator, CUDA and cuBLAS say it where torch has no type of its own."""


def check_finite(step: int, loss: float, grad_norm: float, rows: Sequence[str]) -> None:
    """Raises `NonFiniteError` that names the step and its rows. To be called before the optimizer's step."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    named = ", ".join(rows[:MOST_NAMED]) + (f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else "")
    raise NonFiniteError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}",
        why=f"no weight was updated with it; the step's rows were {named}",
        fix="look at those rows; else lower train.lr, add a warm-up, or set quantization.compute_dtype to float32",
    )


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
