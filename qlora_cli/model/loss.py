"""The training loss: cross-entropy summed over target tokens.

Knows a model's forward and nothing of recipes. Invariant: a *sum* with its count, never a mean, so that whoever adds
micro-batches, steps or devices together can divide once by the number of tokens in all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUND_TO = 64
"""Columns are rounded up to a multiple of this, so that few shapes occur: on a CPU each costs a compiled kernel that
stays in memory, on CUDA a block in the allocator's cache."""


def loss_sum(model: Any, ids: Tensor, attention: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Scalar float32: the cross-entropy of `labels` [N], predicted at the N True positions of `targets` [B, T]."""
    return torch.nn.functional.cross_entropy(target_logits(model, ids, attention, targets), labels, reduction="sum")


def target_logits(model: Any, ids: Tensor, attention: Tensor, targets: Tensor) -> Tensor:
    """[N, vocabulary] float32 logits at the N True positions of `targets` [B, T].

    They are computed only at columns that hold a target in any row; the model's own head computes them, so
    soft-capping and logit scales are honoured.
    """
    columns = targets.any(dim=0).nonzero().squeeze(1)
    count = len(columns)
    padded = torch.cat([columns, columns[-1:].expand(-count % ROUND_TO)])
    output = model(input_ids=ids, attention_mask=attention, logits_to_keep=padded, use_cache=False)
    return output.logits[:, :count][targets[:, columns]].float()
