"""Causal attention over rows laid end to end, each alone, forward and backward.

Knows tensors; nothing of models. Invariant: a row's result and gradients are what it has alone, for no product ever
spans two rows. The forward pass is torch's kernel where that knows the rule. The backward pass is ours, for torch's is
slow on a CPU: scores are computed for a block of queries at a time, so most of what lies above the diagonal is skipped,
and all query heads that share a key head are one product; so is the forward pass under other rules. Scores are summed
and exponentiated in float32, as flash attention does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUERIES = 128
"""Queries of a block; at 64 and 256 the same rows took 10% longer."""
ROUND_TO = 64
"""Rows are padded to a multiple of this, so that few shapes occur: each keeps a compiled kernel in memory, and torch's
own attention never lets go of one."""
KEPT_KEYS = 512
"""Where the forward pass is ours, probabilities over at most so many keys are kept for the backward pass, others are
computed again: speed for short rows, memory that grows linearly for long ones."""


@dataclass(frozen=True)
class Rule:
    """How scores are made: `scaling` q.k, `softcap` tanh(./softcap), keys at most `window` - 1 positions back."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Block:
    """Queries [first, last) of a padded row and the keys [start, last) that any of them sees."""

    first: int
    last: int
    start: int


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], rule: Rule, sinks: Tensor | None = None) -> Tensor:
    """[T, H, Dv] for q [T, H, D], k [T, KV, D], v [T, KV, Dv] of rows of these `lengths`, which sum to T.

    `sinks` [H]: logits of a key without a value, one for each head, that every query also sees.
    """
    assert sum(lengths) == len(q) and q.shape[1] % k.shape[1] == 0
    result: Tensor = _Attend.apply(q, k, v, sinks, (tuple(lengths), rule))
    return result


def torch_knows(rule: Rule, longest: int) -> bool:
    """Whether torch's own kernel has this rule for rows of at most `longest` tokens."""
    return rule.softcap is None and (rule.window is None or longest <= rule.window)


def flash(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scaling: float) -> tuple[Tensor, Tensor]:
    """(out, [H, T] log of the sum of exponentials): each row by torch's kernel for CPUs, which
    `scaled_dot_product_attention` calls: that would keep what its own backward pass needs. What pads a row comes after
    all that its tokens see."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logs = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=_accumulator(q.dtype))
    for row in _rows(lengths):
        heads = (_heads_first(x[row], x.shape[1])[None] for x in (q, k, v))
        found, sums = kernel(*heads, 0.0, True, scale=scaling)
        length = row.stop - row.start
        out[row], logs[:, row] = found[0, :, :length].transpose(0, 1), sums[0, :, :length]
    return out, logs


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: tuple[Any, Rule]) -> Tensor:
        lengths, rule = how
        ctx.lengths, ctx.rule = lengths, rule
        if torch_knows(rule, max(lengths)) and sinks is None and q.shape[2] == v.shape[2] and q.device.type == "cpu":
            ctx.save_for_backward(q, k, v, sinks)
            return flash(q, k, v, lengths, rule.scaling)[0]
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        kept: list[Tensor | None] = []
        with _exact_products(q):
            for row in _rows(lengths):
                queries, keys, values = (_heads_first(x[row], k.shape[1]) for x in (q, k, v))
                desk = _Desk(keys, queries.shape[1] // keys.shape[1])
                for block in _blocks(keys.shape[1], rule.window):
                    p = _probabilities(_part(queries, block, keys), desk, block, rule, sinks)
                    kept.append(p if block.last - block.start <= KEPT_KEYS else None)
                    _write(out[row], p @ values[:, block.start : block.last], block)
        ctx.save_for_backward(q, k, v, sinks, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, *kept = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=_accumulator(sinks.dtype))
        remaining = iter(kept)
        with _exact_products(q):
            for row in _rows(ctx.lengths):
                inputs = tuple(_heads_first(x[row], k.shape[1]) for x in (q, k, v, grads[0]))
                dkeys, dvalues = _backward_row(inputs, (dq[row], dsinks), remaining, ctx.rule, sinks)
                whole = Block(0, dkeys.shape[1], 0)
                _write(dk[row], dkeys.mul_(ctx.rule.scaling), whole)
                _write(dv[row], dvalues, whole)
        return dq, dk, dv, None if dsinks is None else dsinks.to(sinks.dtype), None


def _backward_row(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, Tensor | None],
    kept: Iterator[Tensor | None],
    rule: Rule,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of a row's keys (but for the scaling) and values; those of queries and sinks go into `outputs`."""
    queries, keys, values, grads = inputs
    desk = _Desk(keys, queries.shape[1] // keys.shape[1])
    dkeys, dvalues = torch.zeros_like(desk.keys), torch.zeros_like(values, dtype=desk.keys.dtype)
    for block in _blocks(keys.shape[1], rule.window):
        seen = slice(block.start, block.last)
        part, grad = _part(queries, block, keys), _part(grads, block, keys)
        p = next(kept, None)
        p = _probabilities(part, desk, block, rule, sinks) if p is None else p
        dp = grad @ values[:, seen].mT
        # softmax backward: p * (dp - sum(p * dp)); a sink only makes the p of a query sum to less than one
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        if outputs[1] is not None:
            _add_sinks(outputs[1], p, dp)
        if rule.softcap is not None:
            bent = desk.scores(part, block, rule.scaling / rule.softcap).tanh_()
            ds = ds.mul_(1 - bent.square_())
        dvalues[:, seen] += p.mT @ grad
        dkeys[:, seen] += ds.mT @ part
        _write(outputs[0], (ds @ keys[:, seen]).mul_(rule.scaling), block)
    return dkeys, dvalues


def _add_sinks(dsinks: Tensor, p: Tensor, dp: Tensor) -> None:
    """The sink is a key whose value is 0: its dp is 0, its p what the others leave."""
    wide = p.to(dsinks.dtype)
    rows = -(1 - wide.sum(-1)) * (wide * dp).sum(-1)
    groups = dsinks.numel() // p.shape[0]
    dsinks += rows.unflatten(1, (-1, groups)).sum(1).flatten()


def _rows(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _blocks(length: int, window: int | None) -> Iterator[Block]:
    for first in range(0, length, QUERIES):
        start = 0 if window is None else max(0, first - window + 1) // ROUND_TO * ROUND_TO
        yield Block(first, min(first + QUERIES, length), start)


def _heads_first(x: Tensor, key_heads: int) -> Tensor:
    """[L, H, D] -> [KV, P G, D]: for each key head its G query heads, position by position, P the padded length."""
    heads = x.unflatten(1, (key_heads, -1)).permute(1, 0, 2, 3)
    padded = torch.nn.functional.pad(heads, (0, 0, 0, 0, 0, -len(x) % ROUND_TO))
    return padded.contiguous().flatten(1, 2)


def _part(queries: Tensor, block: Block, keys: Tensor) -> Tensor:
    groups = queries.shape[1] // keys.shape[1]
    return queries[:, block.first * groups : block.last * groups]


def _write(target: Tensor, values: Tensor, block: Block) -> None:
    """Values [KV, b G, D] of a block into `target` [L, H, D], but for padding."""
    heads = values.unflatten(1, (block.last - block.first, -1)).permute(1, 0, 2, 3)
    into = target[block.first : block.last].unflatten(1, (heads.shape[1], -1))
    into.copy_(heads[: len(into)])


class _Desk:
    """A row's keys in the type of scores, and where the scores of one block after the other are written: memory that
    is new each time costs as much as a pass over it."""

    def __init__(self, keys: Tensor, groups: int) -> None:
        self.keys = _wide(keys)
        most = keys.shape[0] * min(QUERIES, keys.shape[1]) * groups * keys.shape[1]
        self._place = self.keys.new_empty(most)
        self.later = self.keys.new_full((QUERIES, QUERIES), float("-inf")).triu_(1).unsqueeze(1)

    def scores(self, part: Tensor, block: Block, factor: float) -> Tensor:
        """[KV, b G, n] the products of a block's queries and keys times `factor`; valid until the next call."""
        keys = self.keys[:, block.start : block.last].mT
        out = self._place[: part.shape[0] * part.shape[1] * keys.shape[2]].view(*part.shape[:2], -1)
        return torch.baddbmm(out, _wide(part), keys, beta=0, alpha=factor, out=out)

    def hide(self, scores: Tensor, block: Block, window: int | None) -> None:
        """-inf where the key [.., n] comes after the query [:, b] or `window` or more positions before it."""
        if window is None:
            count = block.last - block.first
            scores[..., block.first - block.start :] += self.later[:count, :, :count]
            return
        queries = torch.arange(block.first, block.last, device=scores.device)[:, None, None]
        keys = torch.arange(block.start, block.last, device=scores.device)
        scores.masked_fill_((keys > queries) | (keys <= queries - window), float("-inf"))


def _probabilities(part: Tensor, desk: _Desk, block: Block, rule: Rule, sinks: Tensor | None) -> Tensor:
    """[KV, b G, n] in the type of `part`. Padded keys come last, so the causal mask hides them from true queries."""
    if rule.softcap is None:
        scores = desk.scores(part, block, rule.scaling)
    else:
        scores = desk.scores(part, block, rule.scaling / rule.softcap).tanh_().mul_(rule.softcap)
    by_query = scores.unflatten(1, (block.last - block.first, -1))
    desk.hide(by_query, block, rule.window)
    if sinks is None:
        return torch.softmax(scores, -1, out=scores).to(part.dtype, copy=True)
    column = sinks.to(scores.dtype).view(len(scores), 1, -1, 1).expand(*by_query.shape[:3], 1)
    return torch.softmax(torch.cat([by_query, column], -1), -1)[..., :-1].flatten(1, 2).to(part.dtype).contiguous()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_accumulator(x.dtype))


@contextmanager
def _exact_products(x: Tensor) -> Iterator[None]:
    """Float32 products of widened bfloat16 on a CPU's bfloat16 units: nothing is lost, for the factors are bfloat16."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if x.dtype is torch.bfloat16 and x.device.type == "cpu":
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
