"""Tensors that are made again in the backward pass rather than kept until then.

Knows tensors. Invariant: what a tensor was made from is kept by whoever saves it for the backward pass, and by nobody
once the tensor itself is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Origin(NamedTuple):
    """`make(*sources)` is the tensor again, bit for bit, [T, width]."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]


def remember(tensor: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """`tensor`, with its origin: cheap to make, from what is kept anyway."""
    tensor.origin = Origin(make, sources)  # type: ignore[attr-defined]
    return tensor


def origin_of(tensor: Tensor) -> Origin:
    """What to save for `tensor`: its origin, or the tensor itself. A view or copy of it has none."""
    found: Origin = getattr(tensor, "origin", None) or Origin(_itself, (tensor,))
    return found


def _itself(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
