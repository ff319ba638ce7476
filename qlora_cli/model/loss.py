"""The training loss: cross-entropy summed over target tokens, computed by the model's own forward.

Knows a model's forward and nothing of recipes. Invariant: a *sum* with its count, never a mean, so that whoever adds
micro-batches, steps or devices together can divide once by the number of tokens in all of them. `chunked.py` computes
the same with less memory; what is here decides whether it may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

LossSum = Callable[[Mapping[str, Any], Tensor, Tensor], Tensor]
"""(what the model's forward takes by name, targets [B, T], labels [N]) -> the loss summed over targets."""
TargetLosses = LossSum
"""The same, for the loss of each target: [N] float32, in the order of `targets`' True positions, without a gradient."""
ROUND_TO = 64
"""Columns are rounded up to a multiple of this, so that few shapes occur: on a CPU each costs a compiled kernel that
stays in memory, on CUDA a block in the allocator's cache."""


def loss_sum(model: Any, ids: Tensor, attention: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Scalar float32: the cross-entropy of `labels` [N], predicted at the N True positions of `targets` [B, T]."""
    return plain_loss(model, {"input_ids": ids, "attention_mask": attention}, targets, labels)


def target_logits(model: Any, ids: Tensor, attention: Tensor, targets: Tensor) -> Tensor:
    """[N, vocabulary] float32 logits at the N True positions of `targets` [B, T]."""
    return logits_at(model, {"input_ids": ids, "attention_mask": attention}, targets)


def plain_loss(model: Any, inputs: Mapping[str, Any], targets: Tensor, labels: Tensor) -> Tensor:
    """`loss_sum`, for any `inputs` that the model's forward takes by name."""
    return torch.nn.functional.cross_entropy(logits_at(model, inputs, targets), labels, reduction="sum")


@torch.no_grad()
def plain_losses(model: Any, inputs: Mapping[str, Any], targets: Tensor, labels: Tensor) -> Tensor:
    """See `TargetLosses`; by the model's own forward."""
    return torch.nn.functional.cross_entropy(logits_at(model, inputs, targets), labels, reduction="none")


def logits_at(model: Any, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """[N, vocabulary] float32 logits at the N True positions of `targets` [B, T].

    They are computed only at columns that hold a target in any row; the model's own head computes them, so
    soft-capping and logit scales are honoured.
    """
    columns = targets.any(dim=0).nonzero().squeeze(1)
    padded = torch.cat([columns, columns[-1:].expand(-len(columns) % ROUND_TO)])
    output = model(**inputs, logits_to_keep=padded, use_cache=False)
    return kept_targets(output.logits, targets).float()


def kept_targets(values: Tensor, targets: Tensor) -> Tensor:
    """[N, ...] at the N True positions of `targets` [B, T], out of `values` [B, columns, ...] at the columns that
    `logits_at` keeps."""
    columns = targets.any(dim=0).nonzero().squeeze(1)
    return values[:, : len(columns)][targets[:, columns]]
