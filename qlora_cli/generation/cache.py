"""A key-value cache that grows in place.

Knows transformers' cache layers. Invariant: a layer holds the keys and values that transformers' own would, in tensors
that are views of a larger buffer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 256
"""Positions that a buffer is made larger by than what it must hold."""


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that appends into a buffer, where transformers' copies everything for each token. Cutting back
    shortens the views and leaves the buffer."""

    def __init__(self, layer: DynamicLayer) -> None:
        """Takes over what `layer` holds."""
        super().__init__()
        super().lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = self._buffers = layer.keys, layer.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [batch, heads, new, size]; returns all keys and all values."""
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = _larger(self.keys, end + ROOM), _larger(self.values, end + ROOM)
        keys, values = (buffer[:, :, :end] for buffer in self._buffers)
        keys[:, :, start:], values[:, :, start:] = key_states, value_states
        self.keys, self.values = keys, values
        return keys, values


def _larger(held: Tensor, positions: int) -> Tensor:
    buffer = held.new_empty(*held.shape[:2], positions, held.shape[3])
    buffer[:, :, : held.shape[2]] = held
    return buffer


def grow_in_place(cache: Any) -> Any:
    """The filled cache, with layers that grow in place where transformers' are plain."""
    if isinstance(cache, DynamicCache):
        cache.layers = [
            GrowingLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer
            for layer in cache.layers
        ]
    return cache


def continues(cache: Any, surplus: int) -> bool:
    """Whether several tokens can follow the cache less its last `surplus`. A sliding window has lost what it would need
    to go back; state-space layers take several tokens only from the start."""
    kinds = {type(layer) for layer in cache.layers} if isinstance(cache, DynamicCache) else set()
    usable = {DynamicLayer, GrowingLayer} | (set() if surplus else {DynamicSlidingWindowLayer})
    return bool(kinds) and kinds <= usable
