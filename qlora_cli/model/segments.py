"""Packed rows, each computed exactly as it is alone: the attention function for them.

Knows transformers' attention interface; nothing of how rows are packed. A packed batch is `input_ids` [1, T],
`position_ids` [1, T] that restart with every row, `use_cache=False`, no mask, and the row borders as `cu_seq_lens_q`,
`cu_seq_lens_k`, `max_length_q` and `max_length_k`. Without borders, rows are causal and padded on the right, which
needs no mask. Invariant: what it cannot compute exactly raises `ValueError`; nothing it is handed is ignored.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_cli.model import attention_math
from qlora_cli.model.attention_math import Rule
from qlora_cli.model.native import attention as native

ATTENTION, COMPILED = "qlora_segments", "qlora_compiled"
"""Their names for transformers; the second is for where `native.why_no_attention` says nothing."""
HARMLESS = frozenset({"use_cache", "position_ids", "output_attentions", "cu_seq_lens_k", "max_length_k"})
"""Keywords that models hand down to their attention and that change nothing in it; the borders of keys are those of
queries."""


@dataclass(frozen=True)
class Rows:
    """q [T, H, D], k [T, KV, D], v [T, KV, Dv] of rows laid end to end, and where they begin: int32 [rows + 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    borders: Tensor
    longest: int
    rule: Rule
    dropout: float
    sinks: Tensor | None

    @property
    def lengths(self) -> list[int]:
        """On a GPU, asking for them waits for the device."""
        places = self.borders.tolist()
        if places[-1] != len(self.q):
            raise ValueError(f"the last of cu_seq_lens_q is {places[-1]}, but there are {len(self.q)} positions")
        return [end - start for start, end in pairwise(places) if end > start]


Attend = Callable[..., Tensor]


def _attention(
    attend: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[B, T, H, Dv] for query [B, H, T, D], key [B, KV, T, D] and value [B, KV, T, Dv], as transformers calls it; by
    `attend` where no kernel of torch's is.

    With a mask, or where the module attends both ways, it is transformers' own function for SDPA.
    """
    given = {name: option for name, option in options.items() if option is not None and name not in HARMLESS}
    causal = given.pop("is_causal", getattr(module, "is_causal", True))
    if attention_mask is not None or not causal:
        _refuse_all_but(given, {"scaling", "dropout", "sliding_window", "max_length_q"}, "a mask or two-way attention")
        few = {name: given[name] for name in ("scaling", "dropout") if name in given}
        masked, _ = sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=causal, **few)
        return masked, None
    rows = _rows(query, key, value, given)
    return _pick(rows, attend)(rows).unflatten(0, (query.shape[0], query.shape[2])), None


segments_attention = partial(_attention, attention_math.attend)
compiled_attention = partial(_attention, native.attend)
# without a mask function: a model then passes no mask
AttentionInterface.register(ATTENTION, segments_attention)
AttentionInterface.register(COMPILED, compiled_attention)


def _refuse_all_but(given: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{ATTENTION} does not take {', '.join(unknown)} with {where}")


def _rows(query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Rows:
    known = {"scaling", "dropout", "sliding_window", "softcap", "s_aux", "cu_seq_lens_q", "max_length_q"}
    _refuse_all_but(given, known, "causal rows")
    batch, _, length, width = query.shape
    if key.shape[2] != length:
        raise ValueError(f"{ATTENTION} computes whole rows, without a cache")
    borders = given.get("cu_seq_lens_q")
    if borders is None:
        borders = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=query.device)
    elif batch != 1:
        raise ValueError(f"{ATTENTION} takes packed rows in a batch of one, not {batch}")
    q, k, v = (_autocast(x).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    rule = Rule(given.get("scaling", width**-0.5), given.get("sliding_window"), given.get("softcap"))
    longest = given.get("max_length_q", length)
    return Rows(q, k, v, borders, longest, rule, given.get("dropout", 0.0), given.get("s_aux"))


def _autocast(x: Tensor) -> Tensor:
    """As torch's own attention, `x` in the type of mixed precision where that is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _pick(rows: Rows, attend: Attend) -> Callable[[Rows], Tensor]:
    """On a GPU torch's kernels where they know the rule; on a CPU they are slow. Only they know dropout."""
    plain = rows.rule.softcap is None and rows.sinks is None
    if rows.q.is_cuda and plain and not rows.dropout and _fits_varlen(rows):
        return _varlen
    if rows.dropout or (rows.q.is_cuda and plain and rows.rule.window is None):
        return _row_by_row
    return partial(_blockwise, attend)


def _blockwise(attend: Attend, rows: Rows) -> Tensor:
    with torch.autocast(rows.q.device.type, enabled=False):  # scores are in float32, as written
        return attend(rows.q, rows.k, rows.v, rows.lengths, rows.rule, rows.sinks)


def _row_by_row(rows: Rows) -> Tensor:
    if rows.rule.softcap is not None or rows.rule.window is not None or rows.sinks is not None:
        raise ValueError(f"{ATTENTION} knows no dropout with soft-capping, windows or sinks")
    split = (x.transpose(0, 1).unsqueeze(0).split(rows.lengths, dim=2) for x in (rows.q, rows.k, rows.v))
    options: dict[str, Any] = {"scale": rows.rule.scaling, "enable_gqa": rows.q.shape[1] != rows.k.shape[1]}
    outs = [
        nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=rows.dropout, is_causal=True, **options)
        for q, k, v in zip(*split, strict=True)
    ]
    return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)


def _find_varlen() -> Callable[..., Any] | None:
    """torch's kernel for rows of different lengths, from the version on that has the parameters needed."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    needed = {"scale", "window_size", "enable_gqa"}
    return varlen_attn if needed <= set(inspect.signature(varlen_attn).parameters) else None


VARLEN = _find_varlen()


def _fits_varlen(rows: Rows) -> bool:
    width = rows.q.shape[-1]
    fits = rows.q.dtype in {torch.float16, torch.bfloat16} and width <= 256 and width % 8 == 0
    same = rows.v.shape[-1] == width
    return VARLEN is not None and fits and same and torch.cuda.get_device_capability(rows.q.device) >= (8, 0)


def _varlen(rows: Rows) -> Tensor:
    assert VARLEN is not None
    back = -1 if rows.rule.window is None else rows.rule.window - 1  # the query itself is one of its window
    ends, longest = (rows.borders, rows.borders), (rows.longest, rows.longest)
    options = {"scale": rows.rule.scaling, "window_size": (back, 0), "enable_gqa": True}
    out: Tensor = VARLEN(rows.q, rows.k, rows.v, *ends, *longest, **options)
    return out


_USUAL: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""By the decoder, the attention that it had before another one was set for good."""


def set_attention(model: Any, attention: str) -> None:
    """Has the text decoder use this attention from now on, but within `usual_attention`."""
    decoder = model.get_decoder()
    _USUAL.setdefault(decoder, decoder.config._attn_implementation)
    decoder.set_attn_implementation(attention)


def keep_soft_cap(model: Any) -> None:
    """Has a model whose attention scores are capped use transformers' plain attention in place of SDPA, which older
    versions of transformers choose for Gemma 2 although it leaves the cap out, without a word."""
    decoder = model.get_decoder()
    if decoder.config._attn_implementation == "sdpa" and getattr(decoder.config, "attn_logit_softcapping", None):
        decoder.set_attn_implementation("eager")


@contextmanager
def usual_attention(model: Any) -> Iterator[None]:
    """Within it, the text decoder has the attention that it was loaded with, which knows caches and padding at the
    left."""
    usual = _USUAL.get(model.get_decoder()) if _USUAL else None
    with using_attention(model, usual) if usual else nullcontext():
        yield


@contextmanager
def using_attention(model: Any, attention: str) -> Iterator[None]:
    """Within it, the text decoder uses this attention; a vision tower keeps its own. `ValueError` where it cannot."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    if not decoder._can_set_attn_implementation():
        raise ValueError(f"{type(decoder).__name__} has an attention of its own")
    decoder.set_attn_implementation(attention)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
