"""The memory of a run, planned part by part from its recipe and the model's structure.

Knows what training keeps, and when. Invariant: no weight is read for a plan, and a part that is measured rather than
derived is a constant here with the way it was measured.

    held all the time     the base's weights, adapter, gradients, optimizer, what layers keep for the backward pass
    one after the other   the layer that is computed again, the loss, an evaluation: the largest counts

On a CPU the plan is for the growth of resident memory from just before the base is read, so it has two parts more: what
libraries keep, and the allocator's slack.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_cli.data.batches import WIDTH_MULTIPLE, Batching, Order, round_up
from qlora_cli.data.dataset import TokenData
from qlora_cli.model.attention_math import KEPT_KEYS, QUERIES
from qlora_cli.model.head import chunk_bytes, chunk_rows
from qlora_cli.model.lora import linear_layers, linear_shape
from qlora_cli.model.shortcuts import gate_of
from qlora_cli.process import KERNELS
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.optim import STATE_BYTES

TURNS = ("one layer at work", "loss chunk", "evaluation")
"""Parts that are never in memory together: only the largest shape."""
PROGRAM = "libraries"
SLACK = "allocator slack"
MOST_STEPS, FIRST = 1000, 50
"""Steps looked at for the largest micro-batch, and for how many widths occur."""
STARTED = 55_000_000
"""CPU: code and tables of libraries that the first step brings in (bitsandbytes, oneDNN, OpenMP), and kernels for
the engine's probe. Measured: growth of the heap in use (mallinfo2) and of file pages over `build_engine`."""
KERNEL = 540_000
"""CPU: what oneDNN and torch keep for each shape of a product (of at most `KERNELS`). Measured: heap in use after 200
products of different shapes."""
PER_WIDTH, PER_ROW = 25, 12
"""Shapes of products for each width of a micro-batch (a layer's linear layers and adapters, both ways), and in
attention for each length of a row (blocks of queries)."""
SLACK_SHARES = {False: (3.2, 0.25), True: (1.6, 0.05)}
"""CPU: what glibc's heap holds beyond what is in use, per byte of one layer at work and of what all layers keep: blocks
of other sizes come and go among those that stay; fewer where parts are compiled. Fitted to runs of three sizes and 20
steps (scripts/bench/memory.py)."""


@dataclass(frozen=True)
class Block:
    """A decoder layer, the largest of a model: what it keeps per token for its backward pass (`saved` values in the
    compute dtype), its widest product (`wide` values per token), how many `adapters` it has, and query `heads`, whose
    probabilities are kept in rows longer than `flash_up_to`."""

    saved: int
    wide: int
    adapters: int
    heads: int
    flash_up_to: float


@dataclass(frozen=True)
class Shape:
    """Counts of a model's parameters, from its structure, and its sizes. `largest`: elements of its largest linear
    layer."""

    parameters: int
    four_bit: int
    trainable: int
    adapted_layers: int
    largest: int
    hidden: int
    layers: int
    vocabulary: int
    soft_cap: bool
    block: Block


@dataclass(frozen=True)
class Load:
    """What is computed at once: positions and longest row of the largest micro-batch in training and in evaluation (0:
    there is none), the share of positions that carry loss, and how many widths of micro-batches and of padded rows
    occur in the first steps. `compiled`: what can be compiled for the device is."""

    tokens: int
    longest: int
    eval_tokens: int
    eval_longest: int
    targets: float
    widths: int
    row_widths: int
    compiled: bool = False


def block_of(skeleton: Any, adapted: Mapping[str, Any]) -> Block:
    """Counts the linear layers of each decoder layer: outputs are kept by what reads them, and inputs by the layers
    that share them."""
    gated = {name for name, module in skeleton.named_modules() if gate_of(module) is not None}
    inside: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, layer in linear_layers(skeleton).items():
        found = re.match(r".*?\.\d+(?=\.)", name)
        inside[found.group() if found else ""][name] = linear_shape(layer)
    text = skeleton.config.get_text_config()
    blocks = [
        Block(
            saved=sum(out for out, _ in shapes.values()) + (_inputs(shapes) if not gated else _made(shapes, gated)),
            wide=max(max(shape) for shape in shapes.values()),
            adapters=sum(name in adapted for name in shapes),
            heads=text.num_attention_heads,
            flash_up_to=_flash_up_to(skeleton, text),
        )
        for shapes in inside.values()
    ]
    return max(blocks, key=lambda block: block.saved)


def _flash_up_to(skeleton: Any, text: Any) -> float:
    """The longest row for which torch knows the attention of all layers: where it does, nothing is kept."""
    sinks = any(name.endswith(".sinks") for name, _ in skeleton.named_parameters())
    if sinks or getattr(text, "attn_logit_softcapping", None):
        return 0
    window = getattr(text, "sliding_window", None)
    return math.inf if window is None else window


def _inputs(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Values per token of all distinct inputs. In attention and in an MLP the last layer reads what the others made;
    the others read the same."""
    parents: dict[str, list[int]] = defaultdict(list)
    for name, (_, in_) in shapes.items():
        parents[name.rpartition(".")[0]].append(in_)
    return sum(sum(set(each)) * (2 if len(each) > 1 and len(set(each)) == 1 else 1) for each in parents.values())


def _made(shapes: Mapping[str, tuple[int, int]], gated: Collection[str]) -> int:
    """The same where norms and gated products are made again: of each other parent, what its last layer reads."""
    last = {name.rpartition(".")[0]: in_ for name, (_, in_) in shapes.items()}
    return sum(in_ for parent, in_ in last.items() if parent not in gated)


def load_of(recipe: Recipe, data: TokenData, order: Order, steps: int, rows: int) -> Load:
    """Bounds that are quick to find, and within a few percent of the true micro-batches."""
    train = Batching(recipe.train.micro_batch_size, recipe.data.max_length, recipe.train.packing)
    places = [order.step_rows(step, rows) for step in range(min(steps, MOST_STEPS))]
    lengths, targets, held = data.train.lengths, data.train.targets, data.held_out.lengths.tolist()
    every = [row for step in places for row in step]
    drawn = [[data.train[i] for i in step] for step in places[:FIRST]]
    return Load(
        tokens=max(train.bound(lengths[step].tolist()) for step in places),
        longest=int(lengths[every].max()),
        eval_tokens=replace(train, rows=recipe.eval.batch_size).bound(held) if held else 0,
        eval_longest=max(held, default=0),
        targets=float(targets[every].sum() / lengths[every].sum()),
        widths=len({train.positions(batch) for step in drawn for batch in train.split(step)}),
        row_widths=len({round_up(len(row), WIDTH_MULTIPLE) for step in drawn for row in step}),
    )


def plan_memory(recipe: Recipe, shape: Shape, load: Load, dtype: torch.dtype, device: str) -> dict[str, int]:
    """Bytes by part. `dtype` is what the model computes in. See `total`."""
    held = {**_weights(recipe, shape, dtype), **_trained(recipe, shape, dtype, device)}
    needed = {**held, **_activations(recipe, shape, load, dtype, device)}
    if device == "cpu":
        in_attention = 0 if load.compiled else PER_ROW * load.row_widths
        needed[PROGRAM] = STARTED + KERNEL * min(KERNELS, PER_WIDTH * load.widths + in_attention)
        at_work = _at_work(recipe, shape, load, dtype.itemsize, device)
        working, keeping = SLACK_SHARES[load.compiled]
        needed[SLACK] = round(working * at_work + keeping * needed["layer inputs"])
    return needed


def total(parts: Mapping[str, int]) -> int:
    """The peak: all parts, but only the largest of those that take turns."""
    return sum(count for name, count in parts.items() if name not in TURNS) + max(parts[name] for name in TURNS)


def _weights(recipe: Recipe, shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """4-bit: half a byte a weight, and per block one float32 constant, or with double quantization one byte and 1/256
    float32 (Dettmers et al. 2023, arXiv:2305.14314, section 3)."""
    quant = recipe.quantization
    per_constant = 1 + 4 / 256 if quant.double_quant else 4
    other = 0 if recipe.lora is None else (shape.parameters - shape.four_bit) * dtype.itemsize
    return {
        "4-bit weights": shape.four_bit // 2,
        "quantization constants": round(shape.four_bit / quant.blocksize * per_constant),
        "other weights": other,
    }


def _trained(recipe: Recipe, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, int]:
    paged = device == "cuda" and recipe.train.optimizer.startswith(
        "paged_"
    )  # it makes way, and torch does not count it
    stored = dtype.itemsize if recipe.lora and recipe.lora.dtype == "compute" else 4
    mixed = recipe.lora is None and dtype != torch.float32
    copies = {"16-bit copies": shape.parameters * dtype.itemsize} if mixed else {}  # autocast keeps them for a pass
    return {
        "trained weights": shape.trainable * stored,
        "gradients": shape.trainable * stored,
        "optimizer": round(shape.trainable * (0 if paged else STATE_BYTES[recipe.train.optimizer])),
        **copies,
    }


def _activations(recipe: Recipe, shape: Shape, load: Load, dtype: torch.dtype, device: str) -> dict[str, int]:
    width, mode = dtype.itemsize, recipe.train.gradient_checkpointing
    inputs = load.tokens * shape.hidden * width * (shape.layers + 1)
    kept = _kept(recipe, shape.block, load.tokens, load.longest, width, device)
    at_work = _at_work(recipe, shape, load, width, device)
    saved = {
        "auto": inputs,
        "on": inputs,
        "offload": 2 * load.tokens * shape.hidden * width,
        "off": kept * shape.layers,
    }[mode]
    evaluated = load.eval_tokens * (3 * shape.block.wide + _scores(shape.block, load.eval_longest, device))
    return {
        "layer inputs": saved,
        "one layer at work": at_work if mode != "off" else at_work - kept,
        "loss chunk": _loss(shape, load.tokens, load.targets, width, device),
        "evaluation": (evaluated + 2 * shape.largest) * width if load.eval_tokens else 0,
    }


def _at_work(recipe: Recipe, shape: Shape, load: Load, width: int, device: str) -> int:
    """What one layer keeps, and what comes and goes while it computes."""
    kept = _kept(recipe, shape.block, load.tokens, load.longest, width, device)
    return kept + load.tokens * shape.block.wide * 4 * width + 2 * shape.largest * width


def _kept(recipe: Recipe, block: Block, tokens: int, longest: int, width: int, device: str) -> int:
    """What one layer keeps: its tensors, each adapter's product, and attention's probabilities."""
    ranks = recipe.lora.r * block.adapters if recipe.lora else 0
    return tokens * (block.saved + ranks + _scores(block, longest, device)) * width


def _scores(block: Block, longest: int, device: str) -> int:
    """Probabilities that attention keeps per token on a CPU where torch does not know it: of the keys that blocks of
    queries see, which are all before them, where those are few enough."""
    if device != "cpu" or longest <= block.flash_up_to:
        return 0
    few = min(longest, KEPT_KEYS)
    return block.heads * round((few + QUERIES) / 2 * few / max(longest, 1))


def _loss(shape: Shape, tokens: int, targets: float, width: int, device: str) -> int:
    """Buffers of `head._Chunks`, and hidden states at targets with their gradient."""
    found = round(tokens * targets)
    rows = min(chunk_rows(shape.vocabulary, device), found + 64)
    logits = chunk_bytes(rows, shape.vocabulary, width, shape.soft_cap, device)
    return logits + 3 * found * shape.hidden * width
