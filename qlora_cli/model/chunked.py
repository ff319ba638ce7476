"""The training loss with the vocabulary projection at target tokens alone, in chunks, and the check that it is right.

Knows which part of a transformers model makes hidden states and which makes logits of them. Invariant: a model whose
own forward gives another loss, or whose loss has another gradient, is never trained on this one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.model.decode import evaluating
from qlora_cli.model.head import Head, chunk_rows, head_loss, head_losses, unfit
from qlora_cli.model.loss import ROUND_TO, kept_targets, plain_loss

TOLERANCE = {torch.float32: 1e-5}
"""Relative difference that rounding explains, by the type of the head; 1e-2 for those of 16 bits."""


class ChunkedLoss:
    """The cross-entropy summed over targets. The model's decoder is called by itself, and its hidden states meet the
    head only where a target is predicted."""

    def __init__(self, model: Any, chunk: int | None = None) -> None:
        """`model` is one for which `why_not` gives None; `chunk` rows of logits exist at once, a multiple of 64."""
        reason = why_not(model)
        assert reason is None, reason
        self.head = Head.of(model)
        weight = self.head.layer.weight
        self.chunk = chunk or chunk_rows(len(weight), weight.device.type)
        assert self.chunk % ROUND_TO == 0, f"chunks of {chunk} rows"
        self._model = model

    def __call__(self, inputs: Mapping[str, Any], targets: Tensor, labels: Tensor) -> Tensor:
        """Scalar float32: the cross-entropy of `labels` [N], predicted at the N True positions of `targets` [B, T].
        `inputs` are what the model's forward takes by name; without a target it is zero, with a gradient of zero."""
        return self.of_hidden(self.hidden(inputs, targets), labels)

    @torch.no_grad()
    def each(self, inputs: Mapping[str, Any], targets: Tensor, labels: Tensor) -> Tensor:
        """[N] float32: the loss of each target, without a gradient."""
        return head_losses(self.head, self.hidden(inputs, targets), labels, self.chunk)

    def hidden(self, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
        """[N, hidden] what the head reads at the True positions."""
        rows = targets.flatten().nonzero().squeeze(1)  # before the decoder: on CUDA it waits for what was started
        states: Tensor = self._model.base_model(**inputs, use_cache=False)[0]
        return states.flatten(0, 1).index_select(0, rows)

    def of_hidden(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The loss of `labels` [N], predicted from `hidden` [N, hidden]."""
        assert len(hidden) == len(labels), f"{len(labels)} labels for {len(hidden)} targets"
        return head_loss(self.head, hidden, labels, self.chunk)


def why_not(model: Any) -> str | None:
    """Why a model cannot use `ChunkedLoss`, in a few words; None if it can, as far as its parts tell. Ask it after
    `attach`, which freezes the head."""
    head, decoder = model.get_output_embeddings(), model.base_model
    reason = unfit(head)
    if reason is None and (decoder is model or any(module is head for module in decoder.modules())):
        return "its decoder is not apart from its head"
    return reason


def chunked_loss(model: Any, inputs: Mapping[str, Any], targets: Tensor, labels: Tensor) -> ChunkedLoss | str:
    """The loss for this model, checked on a small batch; or why the model cannot use it."""
    reason = why_not(model)
    if reason is not None:
        return reason
    loss = ChunkedLoss(model)
    found = difference(model, loss, inputs, targets, labels)
    if not found <= TOLERANCE.get(loss.head.dtype(), 1e-2):
        return f"its own loss differs from the chunked one (by {found:.2g})"
    return loss


def difference(model: Any, loss: ChunkedLoss, inputs: Mapping[str, Any], targets: Tensor, labels: Tensor) -> float:
    """The largest relative difference between `loss` and the model's own loss, of: what the head reads, the loss, and
    its gradients with respect to what the head reads and to rows of it that are trained. Infinite where the model does
    not work that way at all.

    Nothing is dropped out, nothing is added to a gradient, and the random state stays what it was.
    """
    if not _takes(model.base_model, inputs):
        return math.inf
    devices = [targets.device] if targets.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices), torch.enable_grad():
        own = _own(model, loss.head, inputs, targets, labels)
        hidden = loss.hidden(inputs, targets).detach().requires_grad_()
        value = loss.of_hidden(hidden, labels)
        ours = (hidden.detach(), value.detach(), *torch.autograd.grad(value, [hidden, *_trained(loss.head)]))
    if own is None or own[0].shape != hidden.shape:
        return math.inf
    return max(_relative(found, wanted) for found, wanted in zip(ours, own, strict=True))


def _trained(head: Head) -> list[nn.Parameter]:
    """Trained rows of the head, in a list."""
    return [head.rows.of_head] if head.rows and head.rows.of_head.requires_grad else []


def _own(
    model: Any, head: Head, inputs: Mapping[str, Any], targets: Tensor, labels: Tensor
) -> tuple[Tensor, ...] | None:
    """What the head reads at the targets, the loss, and its gradients with respect to the former and to trained rows,
    all by the model's own forward; None if that does not call the head once."""
    read: list[Tensor] = []

    def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        read.append(args[0].detach().requires_grad_())
        return (read[-1], *args[1:])

    handle = head.layer.register_forward_pre_hook(cut)
    try:
        value = plain_loss(model, inputs, targets, labels)
    finally:
        handle.remove()
    if len(read) != 1:
        return None
    slope, *trained = torch.autograd.grad(value, [read[0], *_trained(head)])
    return kept_targets(read[0].detach(), targets), value.detach(), kept_targets(slope, targets), *trained


def _takes(module: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the forward of `module` has a place for all of `inputs`."""
    parameters = inspect.signature(module.forward).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return anything or parameters.keys() >= {*inputs, "use_cache"}


def _relative(found: Tensor, wanted: Tensor) -> float:
    """NaN counts as infinite."""
    gap = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    return gap if math.isfinite(gap) else math.inf
