"""What a foreign program changes in this one while it runs, put back when it ends.

Knows streams, environment, warnings, loggers, random states and models; nothing of what runs. Invariant: afterwards all
of these are as they were, however it ended, and nothing of what it printed was shown.
"""

from __future__ import annotations

import io
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import torch

from qlora_cli.model.nf4 import keep_packed_format
from qlora_cli.model.segments import usual_attention
from qlora_cli.model.trial import in_mode


class Hushed:
    """Within it, nothing that is printed is seen: neither what libraries say nor their progress bars."""

    def __init__(self) -> None:
        nowhere = _Nowhere()
        self._streams = (redirect_stdout(nowhere), redirect_stderr(nowhere))

    def __enter__(self) -> Hushed:
        for stream in self._streams:
            stream.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for stream in reversed(self._streams):
            stream.__exit__(None, None, None)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Within it, what is printed is seen after all: for this program's own progress."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class _Nowhere(io.TextIOBase):
    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


class Remarks(logging.Handler):
    """Collects the warnings of a library, each place in its code once, with how often it spoke."""

    def __init__(self, library: str) -> None:
        super().__init__(logging.WARNING)
        self._logger, self._said = logging.getLogger(library), dict[tuple[str, int], tuple[str, int]]()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        place = record.pathname, record.lineno
        text, count = self._said.get(place, (" ".join(record.getMessage().split()), 0))
        self._said[place] = text, count + 1

    def texts(self) -> tuple[str, ...]:
        """In the order in which they were first said."""
        return tuple(text if count == 1 else f"{text} ({count:,} times alike)" for text, count in self._said.values())

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Within it, the library's log comes here and goes nowhere else."""
        logger = self._logger
        before = logger.handlers, logger.level, logger.propagate
        logger.handlers, logger.propagate = [self], False
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.handlers, level, logger.propagate = before
            logger.setLevel(level)


@contextmanager
def same_surroundings(**environment: str) -> Iterator[None]:
    """Environment (within it, with `environment`) and filters of warnings stay as they are."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it, torch, numpy and `random` begin with `seed`; afterwards they go on where they were."""
    plain, drawn = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(drawn)


@contextmanager
def only_read(model: Any, check: Callable[[Any], None]) -> Iterator[None]:
    """Within it, the model evaluates, with a cache if asked to, and `check` sees each output. Modes of all its layers,
    its attention and its weights stay as they are: none is repacked, and none tied that was not."""
    keep_packed_format(model)
    with ExitStack() as stack:
        stack.enter_context(in_mode(model, training=False))
        stack.enter_context(usual_attention(model))
        handle = model.register_forward_hook(lambda _module, _inputs, output: check(output))
        stack.callback(handle.remove)
        model.tie_weights = lambda *_args, **_options: None
        stack.callback(model.__dict__.pop, "tie_weights")
        yield
