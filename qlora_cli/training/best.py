"""The best evaluation so far, and when to stop waiting for a better one.

Knows numbers only. Invariant: only a strictly lower loss is better, and a loss that is not a number never is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Best:
    """Keeps the lowest held-out loss. `patience` evaluations in a row without a lower one mean stop; None: never."""

    patience: int | None
    loss: float = math.inf
    step: int = 0
    waited: int = 0

    def update(self, step: int, loss: float) -> bool:
        """Takes in an evaluation; returns whether it is the best so far."""
        if loss < self.loss:
            self.loss, self.step, self.waited = loss, step, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience
