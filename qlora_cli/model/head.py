"""A language model's head, and the loss over its logits with the gradient, some rows at a time.

Knows a linear layer and what configurations say is done to its output; nothing of what comes before it. Invariant: no
more logits exist at once than those of one chunk, and the gradient is formed with them, so that nothing as wide as the
vocabulary waits for the backward pass.

For hidden states h, a head (W, b), a scale s and a soft cap c:

    u = s (W h + b)     z = c tanh(u / c), or u without a cap     loss = logsumexp(z) - z[label]
    dz = softmax(z) - onehot(label)     du = dz (1 - tanh(u / c)^2)     dh = s W^T du

Of W some rows R may be trained (`tokens.py`); they stand in W where it is multiplied with, and dR = s du^T h there.

z is computed in the type that the model computes in, all else in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.model.loss import ROUND_TO
from qlora_cli.model.tokens import TokenRows, rows_of

SCALES = {
    "logit_scale": 1,  # Cohere
    "logits_scaling": -1,  # Granite
    "lm_head_multiplier": 1,  # Falcon-H1
}
"""What a configuration calls the number that logits are multiplied with (1) or divided by (-1)."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What Gemma, RecurrentGemma and xLSTM call the bound of their logits."""
CHUNKS = {"cpu": (2**25, 256), "cuda": (2**27, 1024)}
"""Bytes of logits in float32, and rows, that a chunk should not exceed: it is multiplied at once."""
ROWS_AT_ONCE = {"cpu": 16}
"""Of a chunk, in float32: so few that they stay in a CPU's cache from their softmax to their gradient."""
FEWEST_ROWS = 128
"""With fewer, reading the weight costs more than multiplying with it."""


@dataclass(frozen=True)
class Head:
    """[rows, hidden] -> [rows, vocabulary]: a frozen linear layer, a factor for its output, a soft cap, and trained
    rows of the layer's weight."""

    layer: nn.Linear
    scale: float = 1.0
    cap: float | None = None
    rows: TokenRows | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a causal language model whose `unfit` is None."""
        config = model.config.get_text_config()
        scale = 1.0
        for name, power in SCALES.items():
            scale *= (_number(config, name) or 1.0) ** power
        caps = [cap for name in CAPS if (cap := _number(config, name))]
        return cls(model.get_output_embeddings(), scale, caps[0] if caps else None, rows_of(model))

    def dtype(self) -> torch.dtype:
        """The type in which the model would multiply here."""
        kind = self.layer.weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.layer.weight.dtype


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows of logits to hold at once on this type of device: a multiple of `ROUND_TO`."""
    most_bytes, most_rows = CHUNKS.get(device, CHUNKS["cpu"])
    affordable = most_bytes // (4 * vocabulary) // ROUND_TO * ROUND_TO
    return min(most_rows, max(FEWEST_ROWS, affordable))


def chunk_bytes(rows: int, vocabulary: int, itemsize: int, capped: bool, device: str) -> int:
    """What a chunk of `rows` takes, where the model computes in a type of `itemsize` bytes."""
    at_once = min(rows, ROWS_AT_ONCE.get(device, rows))
    return vocabulary * (rows * itemsize + at_once * (8 if capped else 4))


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None


def unfit(head: Any) -> str | None:
    """Why a model with this output layer cannot have its loss computed here; None if it can."""
    if head is None:
        return "it has no head of its own"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"its head is no plain linear layer but {type(head).__name__}"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "its head is trained"
    return None


def head_loss(head: Head, hidden: Tensor, labels: Tensor, rows: int) -> Tensor:
    """Scalar float32: the cross-entropy of `labels` [N], predicted from `hidden` [N, hidden], summed; `rows` of them at
    a time."""
    if not len(labels):
        return hidden.float().sum()  # zero, and still a function of `hidden`
    trained, recording = head.rows.of_head if head.rows else None, torch.is_grad_enabled()
    read = [each if each is None or recording else each.detach() for each in (hidden.to(head.dtype()), trained)]
    found: Tensor = _HeadLoss.apply(head, *read, labels, rows)
    return found


@torch.no_grad()
def head_losses(head: Head, hidden: Tensor, labels: Tensor, rows: int) -> Tensor:
    """[N] float32: the cross-entropy of each of `labels`, as `head_loss` sums them up."""
    return _losses_and_slopes(head, hidden.to(head.dtype()), labels, rows, False)[0]


class _HeadLoss(torch.autograd.Function):
    """The sum; its gradients with respect to `hidden` and trained rows are all that is saved."""

    @staticmethod
    def forward(ctx: Any, head: Head, hidden: Tensor, trained: Tensor | None, labels: Tensor, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        losses, *slopes = _losses_and_slopes(head, hidden, labels, rows, wanted)
        ctx.save_for_backward(*slopes)
        ctx.dtype = None if trained is None else trained.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        slope, trained = ctx.saved_tensors
        return None, slope * grad, None if trained is None else (trained * grad).to(ctx.dtype), None, None


def _losses_and_slopes(
    head: Head, hidden: Tensor, labels: Tensor, rows: int, wanted: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses [N], and if `wanted` the gradients of their sum [N, hidden] and, float32, of trained rows. Rows of
    zeros make the last chunk a multiple of `ROUND_TO`; what comes of them is cut off again."""
    count = len(labels)
    missing = -count % ROUND_TO
    hidden, labels = nn.functional.pad(hidden, (0, 0, 0, missing)), nn.functional.pad(labels, (0, missing))
    chunks = _Chunks(head, hidden, min(rows, len(labels)), wanted)
    losses = [chunks.losses(part, labels[part]) for part in chunks.parts(len(labels))]
    return torch.cat(losses)[:count], None if chunks.slope is None else chunks.slope[:count], chunks.trained_slope


class _Chunks:
    """Buffers, used for one chunk after the other: memory that is new each time costs as much as a pass over it."""

    def __init__(self, head: Head, hidden: Tensor, rows: int, wanted: bool) -> None:
        self._head, self._hidden, self._rows = head, hidden, rows
        self._weight = head.layer.weight.detach().to(hidden.dtype)
        self._bias = None if head.layer.bias is None else head.layer.bias.detach().to(hidden.dtype)
        self._product = hidden.new_empty(rows, len(self._weight))
        at_once = min(rows, ROWS_AT_ONCE.get(hidden.device.type, rows))
        self._logits = torch.empty_like(self._product[:at_once], dtype=torch.float32)
        self.slope = torch.empty_like(hidden) if wanted else None
        self._ids = head.rows.ids if head.rows else None
        self._trained = head.rows.of_head.detach().to(hidden.dtype) if head.rows else None
        trained = self._trained if wanted else None
        self.trained_slope = None if trained is None else torch.zeros_like(trained, dtype=torch.float32)

    def parts(self, count: int) -> list[slice]:
        """Each chunk's rows."""
        return [slice(start, min(start + self._rows, count)) for start in range(0, count, self._rows)]

    def losses(self, part: slice, labels: Tensor) -> Tensor:
        """[rows of the chunk] float32; where they are wanted, their gradients go into `slope`."""
        product = self._product[: len(labels)]
        self._multiply(self._hidden[part], product)
        pieces = zip(product.split(len(self._logits)), labels.split(len(self._logits)), strict=True)
        found = torch.cat([self._losses(*piece) for piece in pieces])
        if self.slope is not None:
            self._slopes(product, self._hidden[part], self.slope[part])
        return found

    def _slopes(self, product: Tensor, hidden: Tensor, slope: Tensor) -> None:
        """Gradients of a chunk, from those with respect to `product`."""
        trained, total, scale = self._trained, self.trained_slope, self._head.scale
        if trained is None or total is None or self._ids is None:
            torch.mm(product, self._weight, out=slope)
        else:
            new = product.index_select(1, self._ids)
            torch.mm(product.index_fill_(1, self._ids, 0), self._weight, out=slope)
            slope.addmm_(new, trained)
            total.addmm_(new.T.float(), hidden.float(), alpha=scale)
        slope.mul_(scale)

    def _losses(self, product: Tensor, labels: Tensor) -> Tensor:
        """Losses of a few rows, whose gradients with respect to `product` are written over it."""
        logits, labels = self._logits[: len(labels)], labels.unsqueeze(1)
        bend = self._shape(product)
        torch.log_softmax(logits.copy_(product), -1, out=logits)
        found = logits.gather(1, labels)
        if self.slope is not None:
            logits.exp_().scatter_(1, labels, found.expm1())  # softmax, less one at the label
            product.copy_(logits if bend is None else logits.mul_(bend))
        return -found.squeeze(1)

    def _multiply(self, hidden: Tensor, out: Tensor) -> None:
        if self._bias is None:
            torch.mm(hidden, self._weight.T, out=out)
        else:
            torch.addmm(self._bias, hidden, self._weight.T, out=out)
        if self._trained is not None and self._ids is not None:
            out.index_copy_(1, self._ids, hidden @ self._trained.T)

    def _shape(self, product: Tensor) -> Tensor | None:
        """Scales and caps `product` in place, step by step as models do, in their type: a cap of 30 in bfloat16 moves
        logits by up to 0.1, which would else be a difference to the model's own loss. Returns the cap's derivative in
        float32 if it will be needed."""
        scale, cap = self._head.scale, self._head.cap
        if scale != 1:
            product.mul_(scale)
        if cap is None:
            return None
        product.div_(cap).tanh_()
        bend = None if self.slope is None else product.to(torch.float32, copy=True).square_().neg_().add_(1)
        product.mul_(cap)
        return bend
