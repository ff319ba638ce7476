"""Trying something on a model that must not notice.

Knows modules and what models raise. Invariant: every module is in its own mode afterwards, whatever happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

DECLINED = (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError)
"""What models raise that do not take another attention, row borders or positions."""


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode, for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def in_words(error: Exception) -> str:
    """Its type and first line, in at most 120 letters."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:120]
