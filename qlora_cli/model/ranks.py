"""The processes of a run, one per device, through accelerate.

Knows devices and sums; nothing of models or data. Invariant: with one process every method is the identity, so that
no caller asks how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


@contextmanager
def clean_stdout() -> Iterator[None]:
    """Within it, what is written to stdout goes to stderr: in torch 2.10, Gloo says there that it is connected, among
    the results."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class Ranks:
    """This process among all of the run. `mixed` is the autocast dtype for full fine-tuning, or None."""

    def __init__(self, device: torch.device, mixed: torch.dtype | None = None) -> None:
        with clean_stdout():
            self._accelerator = Accelerator(cpu=device.type == "cpu")
        self._mixed = mixed
        self.device: torch.device = device
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def mine(self, items: Sequence[Any]) -> list[tuple[int, Any]]:
        """This process' share of `items`, each with its position among all."""
        return [(i, item) for i, item in enumerate(items) if i % self.count == self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all processes."""
        if self.count == 1:
            return values
        summed: Tensor = self._accelerator.reduce(values.to(self.device), reduction="sum")
        return summed

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.count == 1 else bool(self.sum(torch.tensor(float(flag))))

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its sum over all processes; one that a process lacks counts as zero there."""
        if self.count == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = self.sum(torch.cat([gradient.reshape(-1).float() for gradient in gradients]))
        for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision where it was asked for. (accelerate's own is one setting for the life of the process.)"""
        return torch.autocast(self.device.type, self._mixed) if self._mixed else nullcontext()

    def wait(self) -> None:
        """Returns when every process has come here."""
        self._accelerator.wait_for_everyone()
