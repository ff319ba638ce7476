"""How far two models are apart on the same rows.

Knows models and rows. Invariant: every mean is over target tokens, and both models saw the very same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from qlora_cli.data.batches import WIDTH_MULTIPLE, collate, micro_batches
from qlora_cli.data.encode import Encoded
from qlora_cli.model.lora import without_adapter
from qlora_cli.model.loss import target_logits


@dataclass(frozen=True)
class Divergence:
    """Means per target token, in nats: KL(reference || other), KL(reference || reference without its adapter), the
    losses of both; and the share of tokens where both find the same token likeliest."""

    kl: float
    kl_without_adapter: float
    top1_agreement: float
    reference_loss: float
    other_loss: float
    rows: int
    targets: int


@torch.inference_mode()
def diverge(reference: Any, other: Any, rows: Sequence[Encoded], batch_size: int, device: torch.device) -> Divergence:
    """Compares `other` with `reference`, both on `device` and in evaluation mode."""
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in micro_batches(rows, batch_size):
        sums += _sums(reference, other, batch, device)
    targets = sum(row.targets for row in rows)
    kl, without, agreed, reference_loss, other_loss = (float(value) / targets for value in sums)
    kl, without = max(kl, 0.0), max(without, 0.0)  # never negative but for rounding; a number that is none stays so
    return Divergence(kl, without, agreed, reference_loss, other_loss, len(rows), targets)


def _sums(reference: Any, other: Any, batch: Sequence[Encoded], device: torch.device) -> Tensor:
    """Over the target tokens of `batch`: KL, KL without the adapter, agreements, both losses."""
    moved = collate(batch, WIDTH_MULTIPLE).to(device)
    inputs = (moved.ids, moved.attention, moved.targets)
    wanted = target_logits(reference, *inputs).log_softmax(-1)
    found = target_logits(other, *inputs).log_softmax(-1)
    with without_adapter(reference):
        bare = target_logits(reference, *inputs).log_softmax(-1)
    values = [
        kl_div(found, wanted, reduction="sum", log_target=True),
        kl_div(bare, wanted, reduction="sum", log_target=True),
        (found.argmax(-1) == wanted.argmax(-1)).sum(),
        cross_entropy(wanted, moved.labels, reduction="sum"),
        cross_entropy(found, moved.labels, reduction="sum"),
    ]
    return torch.stack([value.double().cpu() for value in values])
