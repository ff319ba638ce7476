"""Folds an adapter into its base, tensor by tensor.

Knows tensors and files. Invariant: each weight is summed in float32 and rounded once, every tensor of the adapter is
used, and what rounding left of the delta is measured on the values that were written.

Dequantising first and rounding last matters: an NF4 weight re-quantised after the sum mostly keeps its codes, and the
16-bit weights that were quantised are not those that the adapter was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qlora_cli.errors import ModelError, Problem
from qlora_cli.export.checks import is_finite
from qlora_cli.export.companions import copy_companions, write_config
from qlora_cli.export.tokens import NewRows
from qlora_cli.export.weights import BaseWeights
from qlora_cli.model.adapter import PREFIX, learned_something, mismatches
from qlora_cli.model.lora import scaling_of, target_layers
from qlora_cli.model.nf4 import Packed, quantize, stored_names
from qlora_cli.model.quantizer import stored_config
from qlora_cli.model.writer import SHARD_BYTES, Writer
from qlora_cli.recipe.schema import LoraSection

Kind = Literal["dequantized", "original", "requantized"]
PIECE = 1 << 18
"""About how many elements of a weight are summed or cast at once: what is computed of them stays small and in cache."""


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one layer: `scaling` * B [out, r] A [r, in], float32."""

    a: Tensor
    b: Tensor
    scaling: float

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, in]."""
        return (self.b[start:stop] @ self.a) * self.scaling


@dataclass
class Survival:
    """Sums over the deltas written: with d the wanted and c the actual change, c.d, d.d and |c - d|^2."""

    product: float = 0.0
    wanted: float = 0.0
    missed: float = 0.0

    def add(self, delta: Tensor, change: Tensor) -> None:
        """Counts rows of one weight, float32."""
        wanted, change = delta.reshape(-1), change.reshape(-1)
        missed = change - wanted
        self.product += float(wanted @ change)
        self.wanted += float(wanted @ wanted)
        self.missed += float(missed @ missed)

    @property
    def share(self) -> float:
        """How much of the delta is in the weights: 1 all of it, 0 nothing; its projection on itself."""
        return self.product / self.wanted if self.wanted else 1.0

    @property
    def error(self) -> float:
        """Relative error of the change, |c - d| / |d|."""
        return float((self.missed / self.wanted) ** 0.5) if self.wanted else 0.0


def deltas(weights: BaseWeights, tensors: Mapping[str, Tensor], lora: LoraSection, where: Path) -> dict[str, Delta]:
    """The adapter's deltas by the name of the weight in the base's files. Raises `ModelError` naming every tensor that
    lacks, fits no layer, or has another shape."""
    files = {layer.name: name for name, layer in weights.layers.items()}
    layers = {name: weights.layers[files[name]] for name in target_layers(weights.model, lora.targets) if name in files}
    expected = {f"{PREFIX}{name}.lora_A.weight": (lora.r, layer.shape[1]) for name, layer in layers.items()}
    expected |= {f"{PREFIX}{name}.lora_B.weight": (layer.shape[0], lora.r) for name, layer in layers.items()}
    problems = mismatches(expected, tensors)
    if problems:
        raise ModelError.of([Problem(text, where=str(where)) for text in problems])
    if not learned_something(tensors):
        raise ModelError("the adapter has learned nothing: every B is zero", where=str(where))
    scaling = scaling_of(lora)
    return {
        files[name]: Delta(
            tensors[f"{PREFIX}{name}.lora_A.weight"].float().to(weights.device),
            tensors[f"{PREFIX}{name}.lora_B.weight"].float().to(weights.device),
            scaling,
        )
        for name in layers
    }


class Merger:
    """Writes one merged model."""

    def __init__(
        self,
        weights: BaseWeights,
        added: Mapping[str, Delta],
        kind: Kind,
        dtype: torch.dtype,
        rows: Mapping[str, NewRows] | None = None,
    ) -> None:
        self._weights, self._deltas, self._kind, self._rows = weights, added, kind, rows or {}
        self._dtype = weights.dtype if kind == "requantized" else dtype
        self.survival = Survival()

    def write(self, folder: Path, advance: Callable[[int], None], shard_bytes: int = SHARD_BYTES) -> int:
        """Writes weights, config and the base's companions into `folder`; tells `advance` the bytes read. Returns the
        bytes of all tensors."""
        weights, name = self._weights, str(self._dtype).removeprefix("torch.")
        names = [*weights.source.entries, *(part for each in self._requantized() for part in stored_names(each))]
        with Writer(folder, names, shard_bytes) as writer:
            for tensor in weights.names:
                self._write(writer, tensor)
                advance(weights.source.entries[tensor].bytes)
            total = writer.finish()
        quantization = stored_config(weights.section, self._dtype, weights.skipped)
        copy_companions(weights.source.folder.path, folder)
        stored = quantization if self._kind == "requantized" else None
        grown = next((rows.size for rows in self._rows.values()), None)
        write_config(weights.source.folder.path, folder, name, stored, grown)
        return total

    def _requantized(self) -> list[str]:
        layers = self._weights.layers if self._kind == "requantized" else {}
        return [name for name, layer in layers.items() if layer.four_bit]

    def _write(self, writer: Writer, name: str) -> None:
        layer, delta = self._weights.layers.get(name), self._deltas.get(name)
        if name in self._rows:
            rows = self._rows[name]
            values = self._finite(rows.values.to(self._weights.dtype).to(self._dtype), name)
            shape = (rows.size, *self._weights.source.entries[name].shape[1:])
            writer.add_pieces(name, self._type_of(name), shape, rows.among(self._cast(name), values))
        elif self._kind == "requantized" and layer is not None and layer.four_bit:
            for part, tensor in self._packed(name, delta).tensors(name).items():
                writer.add(part, tensor)
        elif layer is not None and (delta is not None or (layer.four_bit and self._kind != "original")):
            self._write_sum(writer, name, delta)
        else:
            writer.add_pieces(name, self._type_of(name), self._weights.source.entries[name].shape, self._cast(name))

    def _type_of(self, name: str) -> torch.dtype:
        stored = self._weights.source.entries[name].dtype
        return self._dtype if stored.is_floating_point else stored

    def _cast(self, name: str) -> Iterator[Tensor]:
        """A tensor that no delta is added to, by way of the type that the model computed it in."""
        for piece in self._weights.source.pieces(name, 16 * PIECE):
            if not piece.is_floating_point():
                yield piece
            else:
                seen = piece if self._kind == "original" else piece.to(self._weights.dtype)
                yield self._finite(seen.to(self._dtype), name)

    def _write_sum(self, writer: Writer, name: str, delta: Delta | None) -> None:
        layer = self._weights.layers[name]
        start = self._weights.original(name) if self._kind == "original" else self._weights.weight(name)
        if layer.transposed:
            whole = torch.cat(list(self._summed(name, start, delta)))
            writer.add(name, whole.T.contiguous())
        else:
            writer.add_pieces(name, self._dtype, layer.shape, self._summed(name, start, delta))

    def _summed(self, name: str, start: Tensor, delta: Delta | None) -> Iterator[Tensor]:
        """Rows of the merged weight."""
        rows = max(1, PIECE // start.shape[1])
        for first in range(0, len(start), rows):
            before = start[first : first + rows].float()
            if delta is None:
                yield self._finite(before.to(self._dtype), name)
                continue
            added = delta.rows(first, first + len(before))
            after = self._finite((before + added).to(self._dtype), name)
            self.survival.add(added, after.float() - before)
            yield after

    def _packed(self, name: str, delta: Delta | None) -> Packed:
        """The weight in 4 bits again. Without a delta its codes stay: quantising is not idempotent."""
        packed = self._weights.packed(name)
        if delta is None:
            return packed
        before = packed.dequantize().to(self._weights.dtype)
        added = delta.rows(0, len(before))
        again = quantize((before.float() + added).to(self._dtype), self._weights.section)
        self.survival.add(added, again.dequantize().float() - before.float())
        return again

    def _finite(self, value: Tensor, name: str) -> Tensor:
        if not is_finite(value):
            kind = str(self._dtype).removeprefix("torch.")
            raise ModelError(
                f"{name} has values that are not finite in {kind}",
                why="float16 ends at 65,504" if self._dtype == torch.float16 else "the base or the adapter holds them",
                fix="merge with --dtype bf16" if self._dtype == torch.float16 else "check base and adapter",
            )
        return value


def merged_bytes(weights: BaseWeights, kind: Kind, dtype: torch.dtype) -> int:
    """About how many bytes the merged model takes on disk."""
    if kind == "requantized":
        small = sum(weights.elements(n) for n, layer in weights.layers.items() if layer.four_bit)
        rest = sum(weights.elements(n) for n in weights.names) - small
        return small * 6 // 10 + rest * weights.dtype.itemsize
    return sum(weights.elements(name) for name in weights.names) * dtype.itemsize
