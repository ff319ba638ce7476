"""What must hold of a tensor before it is written.

Knows tensors. Invariant: a check needs no more memory than a few numbers.
"""

from __future__ import annotations

from torch import Tensor


def is_finite(value: Tensor) -> bool:
    """Whether all values are numbers and not infinite; without a mask of them."""
    if not value.is_floating_point() or not value.numel():
        return True
    return all(bool(bound.isfinite()) for bound in value.aminmax())
