"""The plan of a run: what is trained, for how long, and an estimate of memory and disk, part by part.

Knows the recipe, the model's structure without weights, and the data's lengths. Invariant: counts are exact; bytes are
estimates and are called that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qlora_cli.data.batches import Order
from qlora_cli.data.dataset import TokenData
from qlora_cli.errors import RecipeError
from qlora_cli.model.lora import adapter_parameters, linear_shape, target_layers
from qlora_cli.model.nf4 import four_bit_layers
from qlora_cli.model.quantizer import four_bit_skeleton
from qlora_cli.recipe.schema import QuantizationSection, Recipe
from qlora_cli.training.optim import STATE_BYTES
from qlora_cli.workflows.events import size


@dataclass(frozen=True)
class Shape:
    """Counts of a model's parameters, from its structure."""

    parameters: int
    four_bit: int
    trainable: int
    adapted_layers: int
    hidden: int
    layers: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Plan:
    """What a run will do. Bytes are estimates by part."""

    shape: Shape
    steps: int
    rows: int
    tokens: int
    memory: dict[str, int]
    disk: dict[str, int]

    @property
    def memory_bytes(self) -> int:
        """Estimated peak, all parts together."""
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        """Estimated size of the run directory."""
        return sum(self.disk.values())

    def line(self) -> str:
        """One line of text."""
        trained = f"{self.shape.trainable:,} trainable parameters"
        work = f"{self.steps:,} steps over {self.rows:,} rows, about {self.tokens:,} tokens"
        return f"{work}; {trained}; about {size(self.memory_bytes)} of memory"

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the totals."""
        return {**asdict(self), "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}


def shape_of(skeleton: Any, recipe: Recipe) -> Shape:
    """Exact counts; every target of the adapter is found here, before any weight is read. Changes the skeleton."""
    chosen: Mapping[str, nn.Module] = target_layers(skeleton, recipe.lora.targets) if recipe.lora else {}
    parameters = sum(p.numel() for p in skeleton.parameters())
    text = skeleton.config.get_text_config()
    four_bit = four_bit_shapes(skeleton, recipe.quantization)
    return Shape(
        parameters=parameters,
        four_bit=sum(out * in_ for out, in_ in four_bit.values()),
        trainable=adapter_parameters(chosen, recipe.lora.r) if recipe.lora else parameters,
        adapted_layers=len(chosen),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,  # GPT-2 has no such key
        vocabulary=text.vocab_size,
    )


def four_bit_shapes(skeleton: Any, section: QuantizationSection) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that `section` puts in 4 bits. Changes the skeleton."""
    if section.type == "none":
        return {}
    layers = four_bit_layers(four_bit_skeleton(skeleton, section, torch.bfloat16)[0])
    return {name: linear_shape(layer) for name, layer in layers.items()}


def check_length(recipe: Recipe, config: Any, where: str) -> None:
    """Raises `RecipeError` when rows may be longer than the model's trained positions."""
    positions = getattr(
        config.get_text_config(), "max_position_embeddings", None
    )  # absent where positions are relative
    if positions is not None and recipe.data.max_length > positions:
        raise RecipeError(
            f"data.max_length is {recipe.data.max_length}, "
            f"but {recipe.model.base} was trained for {positions} positions",
            why="tokens past that position have no trained embedding, so the loss would mislead",
            fix=f"set data.max_length to {positions} or less, e.g. --set data.max_length={positions}",
            where=where,
        )


def steps_and_rows(recipe: Recipe, order: Order) -> tuple[int, int]:
    """(optimizer steps, rows drawn in all of them)."""
    train = recipe.train
    if train.steps is not None:
        return train.steps, train.steps * train.batch_size
    assert train.epochs is not None, "a rule of the recipe asks for exactly one of steps and epochs"
    return order.steps_for(train.epochs), max(1, round(train.epochs * len(order.lengths)))


def order_of(recipe: Recipe, data: TokenData) -> Order:
    """The order in which the recipe draws its rows."""
    lengths = tuple(len(row) for row in data.train)
    return Order(lengths, recipe.train.batch_size, recipe.train.seed, recipe.train.group_by_length)


def make_plan(recipe: Recipe, shape: Shape, data: TokenData, dtype: torch.dtype) -> Plan:
    """The plan; see `_memory` for the estimate."""
    order = order_of(recipe, data)
    steps, rows = steps_and_rows(recipe, order)
    mean = sum(order.lengths) / len(order.lengths)
    longest = max(order.lengths)
    saved = shape.trainable * (dtype.itemsize if recipe.lora and recipe.lora.dtype == "compute" else 4)
    checkpoints = recipe.save.keep_last if recipe.save.every else 0
    disk = {"result": saved + 8_000_000, "checkpoints": saved * checkpoints}
    return Plan(shape, steps, rows, round(rows * mean), _memory(recipe, shape, longest, dtype), disk)


def _memory(recipe: Recipe, shape: Shape, longest: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by part. 4-bit: half a byte a weight, and per block one float32 constant, or with double quantization one
    byte and 1/256 float32 (Dettmers et al. 2023, arXiv:2305.14314, section 3). Activations: the inputs of every layer
    when they are recomputed, plus what one layer keeps (all layers, when nothing is recomputed)."""
    quant, train, width = recipe.quantization, recipe.train, dtype.itemsize
    per_constant = 1 + 4 / 256 if quant.double_quant else 4
    stored = width if recipe.lora and recipe.lora.dtype == "compute" else 4
    other = 0 if recipe.lora is None else (shape.parameters - shape.four_bit) * width
    evaluated = recipe.eval.batch_size if recipe.data.eval or recipe.data.eval_split else 0
    tokens = train.micro_batch_size * longest
    inside = tokens * (14 * shape.hidden + 4 * shape.intermediate) * width
    recomputed = train.gradient_checkpointing != "off"
    return {
        "4-bit weights": shape.four_bit // 2,
        "quantization constants": round(shape.four_bit / quant.blocksize * per_constant),
        "other weights": other,
        "trained weights": shape.trainable * stored,
        "gradients": shape.trainable * stored,
        "optimizer": round(shape.trainable * STATE_BYTES[train.optimizer]),
        "activations": inside + shape.layers * tokens * shape.hidden * width if recomputed else shape.layers * inside,
        "logits": max(tokens, evaluated * longest) * shape.vocabulary * (width + 8),
    }
