"""Several adapters over one base, switched without loading anything again.

Knows layers and tensors; nothing of files. Invariant: every adapter's layers hold the very base layers of the model,
so an adapter costs its own bytes; and the model computes as if the one in use had been attached to it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.model.adapter import load_into
from qlora_cli.model.lora import LoraLinear, attach
from qlora_cli.recipe.schema import LoraSection


class Adapters:
    """The adapters of a model, at most one of which is in use."""

    def __init__(self, model: Any, compute_dtype: torch.dtype) -> None:
        """`model` is a bare base: nothing attached to it."""
        self._model, self._dtype = model, compute_dtype
        self._layers: dict[str, Mapping[str, LoraLinear]] = {}
        self.active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """In the order they were added."""
        return tuple(self._layers)

    def add(self, name: str, lora: LoraSection, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Takes an adapter in; the one in use stays so. Raises `ModelError` where the tensors do not fit."""
        assert name not in self._layers, f"two adapters named {name}"
        with self._bare():
            layers = attach(self._model, lora, self._dtype, seed=0)
            self._set({name: layer.base for name, layer in layers.items()})
            load_into(layers, tensors, source)
        self._layers[name] = {name: layer.eval().requires_grad_(False) for name, layer in layers.items()}

    def use(self, name: str | None) -> None:
        """Puts the layers of adapter `name` in place; None leaves the bare base. `KeyError` for an unknown name."""
        wanted: Mapping[str, nn.Module] = self._layers[name] if name is not None else {}
        current = self._layers[self.active] if self.active is not None else {}
        self._set({layer: adapter.base for layer, adapter in current.items() if layer not in wanted} | dict(wanted))
        self.active = name

    def _set(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            self._model.set_submodule(name, layer)

    @contextmanager
    def _bare(self) -> Iterator[None]:
        active = self.active
        self.use(None)
        try:
            yield
        finally:
            self.use(active)
