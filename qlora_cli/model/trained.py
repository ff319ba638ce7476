"""What a run trains: an adapter beside a frozen base, or every weight.

Knows models and how each kind is saved. Invariant: both kinds are written under a temporary name, read back, compared
and renamed; a caller cannot tell them apart but by `kind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_cli.errors import ModelError
from qlora_cli.files import disk_errors, staged_folder, write_manifest
from qlora_cli.model.adapter import (
    adapter_config,
    adapter_parameters,
    adapter_tensors,
    load_into,
    read_adapter,
    save_adapter,
)
from qlora_cli.model.lora import LoraLinear, attach, stored_in
from qlora_cli.model.tokens import add_rows, widen
from qlora_cli.recipe.schema import LoraSection

Beside = Callable[[Path], None]


class Trained(Protocol):
    """The trainable part of a model."""

    kind: str
    """Name of its folder in the run directory: `adapter` or `model`."""

    def named(self) -> Mapping[str, torch.nn.Parameter]:
        """Every trained parameter by its name in a saved folder, always in the same order."""

    def adapters(self) -> Sequence[LoraLinear]:
        """The adapted layers, where there are any."""

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the trained values on the CPU."""

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Puts a snapshot's values back."""

    def save(self, final: Path, beside: Beside, result: bool = True) -> None:
        """Writes the folder `final`, with whatever `beside` adds, verified against the values in memory. A run's
        `result` must have learned something, and takes the place of one that is already there."""

    def load(self, folder: Path) -> None:
        """Puts back what `save` wrote. Raises `ModelError` where it does not fit."""


class TrainedAdapter:
    """LoRA layers of a frozen base, and the embeddings of `new_tokens`."""

    kind = "adapter"

    def __init__(
        self,
        model: Any,
        lora: LoraSection,
        base: str,
        dtype: torch.dtype,
        seed: int,
        new_tokens: Sequence[int] = (),
    ) -> None:
        self._model, self._lora, self._base = model, lora, base
        self.layers = attach(model, lora, dtype, seed)
        self.rows = add_rows(model, new_tokens, stored_in(lora, dtype))

    def named(self) -> Mapping[str, torch.nn.Parameter]:
        """See `Trained`."""
        return adapter_parameters(self.layers, self.rows)

    def adapters(self) -> Sequence[LoraLinear]:
        """See `Trained`."""
        return list(self.layers.values())

    def snapshot(self) -> dict[str, Tensor]:
        """See `Trained`."""
        return adapter_tensors(self.layers, self.rows)

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """See `Trained`."""
        load_into(self.layers, values, Path("memory"), self.rows)

    def save(self, final: Path, beside: Beside, result: bool = True) -> None:
        """See `Trained`."""
        config = adapter_config(self._model, self.layers, self._lora, self._base, self.rows)
        save_adapter(final, self.snapshot(), config, beside, result)

    def load(self, folder: Path) -> None:
        """See `Trained`."""
        load_into(self.layers, read_adapter(folder)[1], folder, self.rows)


class TrainedModel:
    """Every weight of a model (full fine-tuning), which gets rows for `new_tokens`."""

    kind = "model"

    def __init__(self, model: Any, new_tokens: Sequence[int] = ()) -> None:
        self._model = model
        widen(model, new_tokens)
        self._before = self._sums()
        model.requires_grad_(True)

    def _sums(self) -> list[float]:
        return [float(p.detach().double().sum()) for p in self._model.parameters()]

    def named(self) -> Mapping[str, torch.nn.Parameter]:
        """See `Trained`."""
        return dict(self._model.named_parameters())

    def adapters(self) -> Sequence[LoraLinear]:
        """See `Trained`."""
        return ()

    def snapshot(self) -> dict[str, Tensor]:
        """See `Trained`."""
        return {name: p.detach().cpu().clone() for name, p in self._model.named_parameters()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """See `Trained`."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(values[name])

    def save(self, final: Path, beside: Beside, result: bool = True) -> None:
        """See `Trained`."""
        with staged_folder(final, replace=result) as folder:
            with disk_errors(folder):
                self._model.save_pretrained(folder)
            beside(folder)
            self._verify(folder)
            if result and self._sums() == self._before:
                raise ModelError(
                    "the model has learned nothing: no weight changed", fix="check that train.lr is as you meant"
                )
            write_manifest(folder)

    def load(self, folder: Path) -> None:
        """See `Trained`."""
        self.restore(self._read(folder))

    def _read(self, folder: Path) -> dict[str, Tensor]:
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=self._model.dtype, use_safetensors=True)
        return dict(read.named_parameters())

    def _verify(self, folder: Path) -> None:
        expected, found = self.snapshot(), self._read(folder)
        wrong = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
        if wrong or not all(bool(value.isfinite().all()) for value in expected.values()):
            raise ModelError(
                f"the model read back from {folder} differs from the one trained, or is not finite",
                why=f"{len(wrong)} of {len(expected)} tensors differ",
                fix="check the disk and save again",
            )
