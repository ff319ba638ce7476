"""The choice of the next token.

Knows the logits of one position and the ids before it; nothing of models. Invariant: the distribution is that of
transformers' processors in their order: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import ModelError, NonFiniteError

LEAST = torch.finfo(torch.float32).tiny
"""What float32 can divide by."""


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded: its limit in tokens, and how each token is chosen."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 takes the likeliest token; then only the repetition penalty matters of what follows."""
    top_p: float = 1.0
    """Keeps the likeliest tokens that together have this probability; 1 keeps all."""
    top_k: int = 0
    """Keeps the k likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keeps tokens that are at least this times as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides (or multiplies, below 0) the logits of tokens that were there before; 1 leaves them."""
    seed: int = 0


def model_decoding(model: Any, max_new_tokens: int = 512) -> Decoding:
    """What the model's own generation_config.json asks for; a value that it does not name is off."""
    config = model.generation_config
    penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
    if not isinstance(config.do_sample, bool | None):
        raise ModelError(
            f"the model's generation_config.json: do_sample is {config.do_sample!r}, not true or false",
            fix="correct it there",
        )
    if not config.do_sample:
        return Decoding(max_new_tokens, repetition_penalty=penalty)
    return Decoding(
        max_new_tokens,
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=0 if config.top_k is None else config.top_k,
        min_p=0.0 if config.min_p is None else config.min_p,
        repetition_penalty=penalty,
    )


def choose(logits: Tensor, seen: Sequence[int], decoding: Decoding, generator: torch.Generator) -> int:
    """The next token, from logits [V] in float32 and all ids before it (prompt and answer)."""
    logits = penalised(logits, seen, decoding.repetition_penalty)
    if decoding.temperature == 0:
        return int(logits.argmax())
    probabilities, ids = distribution(logits, decoding)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return int(drawn if ids is None else ids[drawn])


def check_logits(logits: Tensor) -> None:
    """Raises `NonFiniteError` where logits [..., V] hold NaN or infinity; -inf may rule out tokens, but not all."""
    if not bool(logits.amax(-1).isfinite().all()):
        raise NonFiniteError(
            "the model's logits are not finite numbers",
            why="a token drawn from them would be noise",
            fix="check the weights (`qlora eval` measures them); if they are good, compute in a wider type: "
            "quantization.compute_dtype bfloat16 or float32",
        )


def penalised(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """[V] with the logits of what was seen divided by `penalty`, or multiplied where they are below 0 (Keskar et al.
    2019, arXiv:1909.05858, section 4.1)."""
    if penalty == 1:
        return logits
    ids = torch.tensor(sorted(set(seen)), dtype=torch.long, device=logits.device)
    scores = logits[ids]
    return logits.index_copy(0, ids, torch.where(scores < 0, scores * penalty, scores / penalty))


def distribution(logits: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor | None]:
    """(weights, ids): with what probability each token is drawn, up to a common factor. `ids` are the tokens that the
    weights belong to; None stands for the whole vocabulary."""
    scores, ids = (logits - logits.max()) / min(max(decoding.temperature, LEAST), 1 / LEAST), None
    if 0 < decoding.top_k < len(scores):
        ids = (scores >= scores.topk(decoding.top_k).values[-1]).nonzero().flatten()
        scores = scores[ids]
    probabilities = scores.softmax(-1)
    if decoding.top_p < 1:
        probabilities[_outside_nucleus(probabilities, decoding.top_p)] = 0
    if decoding.min_p > 0:
        probabilities[probabilities < decoding.min_p * probabilities.max()] = 0
    return probabilities, ids


def _outside_nucleus(probabilities: Tensor, mass: float) -> Tensor:
    """[n] bool: tokens that weigh, with all that are less likely, at most 1 - mass (Holtzman et al. 2020,
    arXiv:1904.09751). Those below (1 - mass) / n do so together, which leaves few to sort of a large vocabulary."""
    likely = (probabilities > (1 - mass) / len(probabilities)).nonzero().flatten()
    ascending, order = probabilities[likely].sort()
    unlikely = 1 - ascending.sum()
    inside = ascending.cumsum(0) + unlikely > 1 - mass
    outside = torch.ones_like(probabilities, dtype=torch.bool)
    outside[likely[order[inside]]] = False
    outside[probabilities.argmax()] = False
    return outside
