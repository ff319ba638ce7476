"""What quantising did to a model's layers.

Knows weights and their packed form. Invariant: errors are between the values of the files and those that the 4-bit
layer multiplies with, both in float32, and are added up as squares, so that a total over layers is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qlora_cli.model.chunks import by_chunks
from qlora_cli.model.nf4 import Packed

FAR, MAD_TO_DEVIATION, LEAST_FACTOR = 5.0, 1.4826, 1.25
"""An outlier's error is more than FAR robust deviations above the median (the median absolute deviation times 1.4826
is the standard deviation of normal values), and at least LEAST_FACTOR medians."""


@dataclass(frozen=True)
class LayerDamage:
    """One layer: sums of squares of its weights and of their errors, the largest error, and what it takes to store."""

    name: str
    shape: tuple[int, ...]
    stored_bytes: int
    squares: float
    missed: float
    largest: float

    @property
    def parameters(self) -> int:
        """Weights in the layer."""
        return math.prod(self.shape)

    @property
    def error(self) -> float:
        """|W - Q| / |W|, Frobenius norms; 0 for a layer of zeros."""
        return math.sqrt(self.missed / self.squares) if self.squares else 0.0

    @property
    def bits(self) -> float:
        """Bits per weight, constants included."""
        return 8 * self.stored_bytes / self.parameters

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "layer": self.name,
            "shape": list(self.shape),
            "relative_error": self.error,
            "max_error": self.largest,
            "bits_per_parameter": self.bits,
        }


@dataclass(frozen=True)
class Damage:
    """All 4-bit layers of a model."""

    layers: tuple[LayerDamage, ...]

    @property
    def parameters(self) -> int:
        """Weights in 4 bits."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        """What they take."""
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def error(self) -> float:
        """|W - Q| / |W| over all layers together."""
        squares = sum(layer.squares for layer in self.layers)
        return math.sqrt(sum(layer.missed for layer in self.layers) / squares) if squares else 0.0

    @property
    def largest(self) -> float:
        """The largest error of any weight."""
        return max(layer.largest for layer in self.layers)

    @property
    def bits(self) -> float:
        """Bits per weight, constants included."""
        return 8 * self.stored_bytes / self.parameters

    @cached_property
    def limit(self) -> float:
        """The relative error above which a layer is an outlier."""
        errors = [layer.error for layer in self.layers]
        middle = median(errors)
        deviation = MAD_TO_DEVIATION * median(abs(error - middle) for error in errors)
        return max(middle + FAR * deviation, LEAST_FACTOR * middle)

    def worst(self, count: int = 10) -> Sequence[LayerDamage]:
        """The layers with the largest relative errors, the worst first."""
        return sorted(self.layers, key=lambda layer: (-layer.error, layer.name))[:count]

    def outliers(self) -> list[str]:
        """Names of the layers whose error lies far above that of the others, the worst first."""
        return [layer.name for layer in self.worst(len(self.layers)) if layer.error > self.limit]

    def as_json(self) -> dict[str, Any]:
        """Plain values, every layer in the order of the files."""
        return {
            "parameters": self.parameters,
            "bytes": self.stored_bytes,
            "bits_per_parameter": self.bits,
            "relative_error": self.error,
            "max_error": self.largest,
            "outlier_limit": self.limit,
            "outliers": self.outliers(),
            "layers": [layer.as_json() for layer in self.layers],
        }


def layer_damage(name: str, original: Tensor, packed: Packed) -> LayerDamage:
    """The damage to `original` [out, in], now `packed`."""
    parts = by_chunks(_compare, original.reshape(-1), packed.dequantize().reshape(-1))
    squares, missed, largest = zip(*parts, strict=True)
    return LayerDamage(name, tuple(original.shape), packed.bytes, sum(squares), sum(missed), max(largest))


def _compare(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Sums of the squares of `before` and of the errors of `after`, and the largest error."""
    wanted = before.float()
    missed = wanted - after
    squares = [float(torch.linalg.vector_norm(each, dtype=torch.float64)) ** 2 for each in (wanted, missed)]
    return squares[0], squares[1], float(missed.abs().max())
