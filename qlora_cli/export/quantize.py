"""Turns a 16-bit base into a 4-bit one, tensor by tensor.

Knows tensors and files. Invariant: what is written is what bitsandbytes makes of the same weights on loading, and the
damage is measured on those very values; about one tensor is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_cli.errors import ModelError
from qlora_cli.export.checks import is_finite
from qlora_cli.export.companions import copy_companions, write_config
from qlora_cli.export.damage import Damage, LayerDamage, layer_damage
from qlora_cli.export.digest import PIECE_BYTES, DigestWriter
from qlora_cli.export.weights import BaseWeights
from qlora_cli.model.nf4 import Packed, quantize, stored_names
from qlora_cli.model.quantizer import stored_config
from qlora_cli.recipe.schema import QuantizationSection

HEADER_BYTES, STATE_BYTES, NESTED_BYTES = 200, 1024, 1500
"""About what a tensor takes in a file's header, and a layer for its tables and state; more with double quantization."""


Advance = Callable[[int], None]


class Quantizer:
    """Quantises the layers of a base in each of `variants`, which leave the same layers out. `cast` is the type of all
    other tensors, None for that of the files."""

    def __init__(
        self, weights: BaseWeights, variants: Mapping[str, QuantizationSection], cast: torch.dtype | None
    ) -> None:
        self._weights, self._variants, self._cast = weights, variants, cast
        self._found: dict[str, list[LayerDamage]] = {name: [] for name in variants}
        self.layers = [name for name, layer in weights.layers.items() if layer.four_bit]

    @property
    def damage(self) -> dict[str, Damage]:
        """What each variant did to the layers that were quantised so far."""
        return {name: Damage(tuple(layers)) for name, layers in self._found.items()}

    def measure(self, advance: Advance) -> None:
        """Quantises every layer and writes nothing; tells `advance` the bytes read."""
        for name in self.layers:
            self._packed(name)
            advance(self._weights.source.entries[name].bytes)

    def write(
        self, folder: Path, chosen: str, compute: torch.dtype, advance: Advance, shard_bytes: int
    ) -> dict[str, str]:
        """Writes weights in the variant `chosen`, config and the base's companions into `folder`; tells `advance` the
        bytes read. Returns the digest of every tensor."""
        weights, layers = self._weights, set(self.layers)
        names = [part for name in weights.names for part in (stored_names(name) if name in layers else [name])]
        with DigestWriter(folder, names, shard_bytes) as writer:
            for name in weights.names:
                if name in layers:
                    for part, tensor in self._packed(name)[chosen].tensors(name).items():
                        writer.add(part, tensor)
                else:
                    entry = weights.source.entries[name]
                    writer.add_pieces(name, self._type_of(entry.dtype), entry.shape, self._others(name))
                advance(weights.source.entries[name].bytes)
            writer.finish()
        self._write_companions(folder, self._variants[chosen], compute)
        return writer.digests

    def other_bytes(self) -> int:
        """What the tensors that are not in 4 bits take."""
        entries = {name: self._weights.source.entries[name] for name in self._weights.names}
        layers = set(self.layers)
        return sum(e.elements * self._type_of(e.dtype).itemsize for name, e in entries.items() if name not in layers)

    def estimate(self, chosen: str) -> int:
        """About how many bytes `write` writes."""
        section = self._variants[chosen]
        elements = sum(self._weights.elements(name) for name in self.layers)
        constant = 1 + 4 / 256 if section.double_quant else 4
        four_bit = elements * (0.5 + constant / section.blocksize)
        tables = len(self.layers) * (STATE_BYTES + NESTED_BYTES * section.double_quant)
        return round(four_bit) + tables + len(self._weights.names) * HEADER_BYTES + self.other_bytes()

    def _packed(self, name: str) -> dict[str, Packed]:
        """The weight in every variant, its damage noted."""
        weights, layer = self._weights, self._weights.layers[name].name
        original = weights.original(name)
        cast = original.to(weights.dtype)
        packed = {variant: quantize(cast, section) for variant, section in self._variants.items()}
        for variant, each in packed.items():
            damage = layer_damage(layer, original, each)
            if not math.isfinite(damage.squares + damage.missed):
                raise _not_finite(name, cast.dtype if math.isfinite(damage.squares) else original.dtype)
            self._found[variant].append(damage)
        return packed

    def _type_of(self, stored: torch.dtype) -> torch.dtype:
        return self._cast if self._cast is not None and stored.is_floating_point else stored

    def _others(self, name: str) -> Iterator[Tensor]:
        for piece in self._weights.source.pieces(name, PIECE_BYTES):
            cast = piece.to(self._type_of(piece.dtype))
            for each in (piece, cast) if cast is not piece else (piece,):
                if not is_finite(each):
                    raise _not_finite(name, each.dtype)
            yield cast

    def _write_companions(self, folder: Path, section: QuantizationSection, compute: torch.dtype) -> None:
        weights = self._weights
        copy_companions(weights.source.folder.path, folder)
        stored = stored_config(section, compute, sorted(weights.skipped))
        write_config(weights.source.folder.path, folder, str(weights.dtype).removeprefix("torch."), stored)


def layers_left_out(weights: BaseWeights, skip: str) -> list[str]:
    """The 4-bit layers of `weights` that a name of `skip_modules` would leave out, as transformers matches them: from
    the start, as a regular expression, or at the end."""
    names = [layer.name for layer in weights.layers.values() if layer.four_bit]
    return [name for name in names if not should_convert_module(name, [skip])]


def _not_finite(name: str, dtype: torch.dtype) -> ModelError:
    kind, half = str(dtype).removeprefix("torch."), dtype == torch.float16
    return ModelError(
        f"{name} has values that are not finite in {kind}",
        why="float16 ends at 65,504" if half else "a block of 4-bit weights with such a value would be lost",
        fix="quantise with --dtype bf16" if half else "download or write the model again",
    )
