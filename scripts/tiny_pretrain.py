"""Pretrains a tiny Llama on packed chats, and measures how well it answers from what it has just read.

A model this small would need many thousand steps before it finds out that it can copy from its context. Here three
layers are shown how for the first part of the training: a guide loss rewards a few heads for attending where copying
needs them to. The guide fades to nothing, so the rest of the training is plain next-token prediction.

Invariant: the result depends on the plan and on the rows, never on the clock; the same machine gives the same bits.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

PAD_ID, BEGIN_ID, END_ID, ASSISTANT_ID = 0, 1, 2, 5
HEAD_SIZE = 64
THREADS = 2
"""Sums are split by thread, so another number of threads would give other last bits."""
GUIDED_SHARE = 0.6
"""The share of the steps after which the guide has faded."""


@dataclass(frozen=True)
class Plan:
    """All that decides what base comes out of given rows."""

    hidden: int = 256
    layers: int = 4
    vocab: int = 1024
    length: int = 128
    batch: int = 16
    steps: int = 1600
    muon_rate: float = 2e-3
    adam_rate: float = 3e-3
    prompt_weight: float = 0.1
    guide_weight: float = 0.3
    seed: int = 0


@dataclass(frozen=True)
class Quality:
    """On held-out chats: the share of answers predicted without a slip, and the mean loss of their tokens."""

    accuracy: float
    loss: float


def build_model(plan: Plan, vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(plan.seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=plan.hidden,
        intermediate_size=plan.hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.hidden // HEAD_SIZE,
        num_key_value_heads=plan.hidden // HEAD_SIZE,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        attn_implementation="eager",  # shows the guide its attention, and is the fastest on a CPU at these lengths
    )
    return LlamaForCausalLM(config)


def pack(chats: list[list[int]], length: int) -> Tensor:
    """Padded rows of `length`, filled chat by chat. What a chat has beyond `length` is cut."""
    rows: list[list[int]] = [[]]
    for ids in chats:
        if len(rows[-1]) + len(ids) > length and rows[-1]:
            rows.append([])
        rows[-1] += ids[:length]
    return torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])


def answer_mask(rows: Tensor) -> Tensor:
    """True at the tokens of the assistant's turns, their end-of-turn included."""
    mask = torch.zeros_like(rows, dtype=torch.bool)
    inside = torch.zeros(len(rows), dtype=torch.bool)
    for column in range(rows.shape[1]):
        mask[:, column] = inside
        token = rows[:, column]
        inside = (token == ASSISTANT_ID) | (inside & (token != END_ID))
    return mask


def missed_attention(attention: Tensor, wanted: Tensor) -> Tensor:
    """How little the heads attend to the wanted positions, over the positions that want any."""
    found = (attention.float() * wanted[:, None]).sum(-1)
    return -(found + 1e-4).log().masked_select(wanted.any(-1)[:, None].expand_as(found)).mean()


def guide_loss(rows: Tensor, answers: Tensor, attentions: tuple[Tensor, ...]) -> Tensor:
    """Layer 0 looks one and two tokens back; layer 1 continues an earlier occurrence; layer 2 finds the answer."""
    current, following = rows[:, :-1], rows[:, 1:]
    batch, width = current.shape
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    before = torch.cat([torch.full((batch, 1), -1), current[:, :-1]], dim=1)
    source = (following[:, :, None] == current[:, None, :]) & earlier & (following > BEGIN_ID)[:, :, None]
    continued = source & (before[:, None, :] == current[:, :, None])
    one, two = (torch.eye(width, dtype=torch.bool).roll(back, 0).tril(-1).expand(batch, -1, -1) for back in (1, 2))
    return (
        missed_attention(attentions[0][:, :1], one)
        + missed_attention(attentions[0][:, 1:2], two)
        + 2 * missed_attention(attentions[1][:, :2], continued)
        + 2 * missed_attention(attentions[2][:, :2], source & answers[:, 1:, None])
    )


def training_loss(model: LlamaForCausalLM, rows: Tensor, plan: Plan, guide_weight: float) -> Tensor:
    """Next-token loss that counts the prompts little, because half of what they say is random, plus the guide."""
    following, answers = rows[:, 1:], answer_mask(rows)
    real = following != PAD_ID
    with torch.autocast("cpu", torch.bfloat16):
        output = model.model(input_ids=rows[:, :-1], use_cache=False, output_attentions=guide_weight > 0)
        logits = model.lm_head(output.last_hidden_state[real])
    weights = torch.where(answers[:, 1:], 1.0, plan.prompt_weight)[real]
    loss = (cross_entropy(logits.float(), following[real], reduction="none") * weights).sum() / weights.sum()
    return loss + guide_weight * guide_loss(rows, answers, output.attentions) if guide_weight > 0 else loss


def build_optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=plan.muon_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, plan: Plan) -> float:
    """Rises over 50 steps, stays at one, and falls to zero over the last 60 percent."""
    return min(1.0, (step + 1) / 50, (plan.steps - step) / max(1.0, 0.6 * plan.steps))


def pretrain(model: LlamaForCausalLM, rows: Tensor, plan: Plan) -> None:
    """Trains in place for `plan.steps` steps. It goes through the rows in a shuffled order, again if need be."""
    torch.set_num_threads(THREADS)
    order = random.Random(plan.seed).sample(range(len(rows)), len(rows))
    optimizers = build_optimizers(model, plan)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate_factor(step, plan)) for o in optimizers]
    started = time.monotonic()
    for step in range(plan.steps):
        picked = [order[i % len(order)] for i in range(step * plan.batch, (step + 1) * plan.batch)]
        guide_weight = plan.guide_weight * (1 - step / (GUIDED_SHARE * plan.steps))
        loss = training_loss(model, rows[picked], plan, guide_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{plan.steps}  loss {loss.item():.3f}  {seconds:.0f} s", file=sys.stderr, flush=True)


@torch.no_grad()
def measure(model: LlamaForCausalLM, chats: list[list[int]]) -> Quality:
    """Predicts every answer token from the true tokens before it. An answer counts if all of it is right."""
    rows = pack_singly(chats)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.cat([model(input_ids=part[:, :-1], use_cache=False).logits.float() for part in rows.split(50)])
    following, answers = rows[:, 1:], answer_mask(rows)[:, 1:]
    loss = cross_entropy(logits[answers], following[answers]).item()
    wrong = ((logits.argmax(-1) != following) & answers).long().cumsum(1)
    ends = answers & (following == END_ID)
    totals = [[0, *row[end].tolist()] for row, end in zip(wrong, ends, strict=True)]
    right = [after == before for row in totals for before, after in pairwise(row)]
    return Quality(accuracy=sum(right) / len(right), loss=loss)


def pack_singly(chats: list[list[int]]) -> Tensor:
    """One padded row per chat."""
    width = max(map(len, chats))
    return torch.tensor([ids + [PAD_ID] * (width - len(ids)) for ids in chats])
