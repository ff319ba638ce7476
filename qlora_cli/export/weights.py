"""A base's weights as training computes with them, read from its files one at a time.

Knows files, names and 4-bit storage. Invariant: `weight(name)` is bit for bit what the loaded model's layer dequantises
to, and every parameter of the model comes from the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import ModelError
from qlora_cli.model.base import is_packed, load_config, meta_model, stored_quantization
from qlora_cli.model.folder import BaseFolder
from qlora_cli.model.lora import linear_shape
from qlora_cli.model.names import parameter_names
from qlora_cli.model.nf4 import (
    Packed,
    four_bit_layers,
    is_transposed,
    quantize,
    stored_constants,
    stored_facts,
    stored_packed,
)
from qlora_cli.model.quantizer import four_bit_skeleton
from qlora_cli.model.source import Source
from qlora_cli.recipe.schema import QuantizationSection


@dataclass(frozen=True)
class Layer:
    """A linear layer whose weight is a tensor of the files."""

    name: str
    module: Any
    four_bit: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return linear_shape(self.module)

    @property
    def transposed(self) -> bool:
        """Whether the files hold it as [in, out]."""
        return is_transposed(self.module)


class BaseWeights:
    """The tensors of a base, and what becomes of each when it is loaded with `section` to compute in `dtype`."""

    def __init__(
        self, folder: BaseFolder, section: QuantizationSection, dtype: torch.dtype, device: torch.device
    ) -> None:
        config = load_config(folder)
        self.source = Source(folder)
        self.is_packed = is_packed(config)
        self.section = stored_quantization(folder, config, section) if self.is_packed else section
        self.dtype, self.device = dtype, device
        self.config, self.model, self.skipped = config, meta_model(_unpacked(config)), list[str]()
        if self.section.type != "none":
            self.model, self.skipped = four_bit_skeleton(self.model, self.section, dtype)
        self.constants = stored_constants(self.source.entries)
        inside = {name for names in self.constants.values() for name in names}
        self.names = [name for name in self.source.entries if name not in inside]
        self._parameters = parameter_names(self.model, self.names)
        self._check()

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The linear layers by the name of their weight in the files."""
        four_bit = four_bit_layers(self.model)
        modules = {
            f"{name}.weight": Layer(name, module, name in four_bit)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        known = self._parameters.parameters
        return {name: modules[known[name]] for name in self.names if known.get(name) in modules}

    def named(self, parameter: str) -> list[str]:
        """The tensors of the files of which each alone becomes `parameter` of the model."""
        return [name for name in self.names if self._parameters.parameters.get(name) == parameter]

    def packed(self, name: str) -> Packed:
        """The 4-bit weight `name`: read, or quantised now."""
        if name in self.constants:
            tensors = {each: self.source.read(each) for each in (name, *self.constants[name])}
            return stored_packed(name, tensors, self.device)
        weight = self.source.read(name).to(self.device, self.dtype)
        return quantize(weight.T if self.layers[name].transposed else weight, self.section)

    def weight(self, name: str) -> Tensor:
        """[out, in] the linear weight `name` that the loaded model multiplies with, in the compute dtype."""
        layer = self.layers[name]
        if layer.four_bit:
            return self.packed(name).dequantize().to(self.dtype)
        return self.original(name).to(self.dtype)

    def original(self, name: str) -> Tensor:
        """[out, in] the linear weight `name` as the files have it."""
        weight = self.source.read(name).to(self.device)
        return weight.T if self.layers[name].transposed else weight

    def elements(self, name: str) -> int:
        """How many weights tensor `name` stands for."""
        layer = self.layers.get(name)
        return layer.shape[0] * layer.shape[1] if layer else self.source.entries[name].elements

    def _check(self) -> None:
        """Raises `ModelError` for parameters that no tensor of the files gives, and for shapes that do not fit."""
        folder = self.source.folder
        problems = [f"{name} is not in the files" for name in self._missing()]
        problems += [f"{layer} is made of several tensors of the files" for layer in self._combined_layers()]
        problems += [text for name in self.layers if (text := self._wrong_shape(name))]
        if problems:
            raise ModelError(
                f"{folder.name}: {len(problems)} of its weights cannot be used, e.g. {'; '.join(problems[:3])}",
                why="every weight that config.json asks for must come from the files, tensor by tensor",
                fix="download or write the model again, or check that config.json belongs to these weights",
            )

    def _missing(self) -> list[str]:
        given = {*self._parameters.parameters.values(), *self._parameters.combined}
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        given |= {one for one, other in tied.items() if other in given} | {b for a, b in tied.items() if a in given}
        return sorted(name for name, _ in self.model.named_parameters() if name not in given)

    def _combined_layers(self) -> list[str]:
        layers = {f"{name}.weight" for name in four_bit_layers(self.model)}
        return sorted(layers & self._parameters.combined)

    def _wrong_shape(self, name: str) -> str:
        layer = self.layers[name]
        if name in self.constants:
            found = tuple(stored_facts(self.constants[name], self.source.read)["shape"])
        else:
            shape = self.source.entries[name].shape
            found = shape[::-1] if layer.transposed else shape
        return "" if found == layer.shape else f"{name} is {found}, the layer wants {layer.shape}"


def _unpacked(config: Any) -> Any:
    """The configuration of the same model in 16 bits."""
    plain = type(config).from_dict(config.to_dict())
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain
