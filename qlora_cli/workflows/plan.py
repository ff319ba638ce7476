"""The plan of a run: what is trained, for how long, and an estimate of memory and disk, part by part.

Knows the recipe, the model's structure without weights, and the data's lengths. Invariant: counts are exact; bytes are
estimates and are called that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from qlora_cli.data.batches import Order
from qlora_cli.data.dataset import TokenData
from qlora_cli.errors import RecipeError
from qlora_cli.model.compiler import why_no_compiler
from qlora_cli.model.head import CAPS
from qlora_cli.model.lora import adapter_parameters, linear_layers, linear_shape, target_layers
from qlora_cli.model.nf4 import four_bit_layers
from qlora_cli.model.quantizer import four_bit_skeleton
from qlora_cli.model.tokens import check_ids, token_layers
from qlora_cli.recipe.schema import QuantizationSection, Recipe
from qlora_cli.training.optim import STATE_BYTES
from qlora_cli.workflows.events import size
from qlora_cli.workflows.memory import Load, Shape, block_of, load_of, plan_memory, total

COMPILE_FROM = {"cpu": 0, "cuda": 2e12}
"""Tokens x parameters of a run that is long enough for torch's compiler to pay on a device (not measured). What is
compiled for a CPU takes two seconds once, and pays always."""


@dataclass(frozen=True)
class Plan:
    """What a run will do. Bytes are estimates by part; `checkpointing` is what `auto` came to."""

    shape: Shape
    checkpointing: str
    steps: int
    rows: int
    tokens: int
    load: Load
    memory: dict[str, int]
    disk: dict[str, int]

    @property
    def memory_bytes(self) -> int:
        """Estimated peak; see `memory.total`."""
        return total(self.memory)

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
    text, block = skeleton.config.get_text_config(), block_of(skeleton, chosen)
    largest = max(math.prod(linear_shape(layer)) for layer in linear_layers(skeleton).values())
    four_bit = four_bit_shapes(skeleton, recipe.quantization)
    return Shape(
        parameters=parameters,
        four_bit=sum(out * in_ for out, in_ in four_bit.values()),
        trainable=adapter_parameters(chosen, recipe.lora.r) if recipe.lora else parameters,
        adapted_layers=len(chosen),
        largest=largest,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        soft_cap=any(getattr(text, name, None) for name in CAPS),  # most configurations have none of these keys
        block=block,
    )


def with_tokens(shape: Shape, skeleton: Any, recipe: Recipe, new_tokens: Sequence[int]) -> Shape:
    """The shape with the embeddings of `new_tokens` (ids, rising). Raises `ModelError` where they cannot be trained."""
    if not new_tokens:
        return shape
    embedding = skeleton.get_input_embeddings()
    per_token = len(token_layers(skeleton).names) * embedding.embedding_dim
    rows = check_ids(new_tokens, embedding.num_embeddings)
    parameters = shape.parameters + (rows - embedding.num_embeddings) * per_token
    trainable = shape.trainable + len(new_tokens) * per_token if recipe.lora else parameters
    return replace(shape, parameters=parameters, trainable=trainable, vocabulary=rows)


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
    return Order(
        tuple(data.train.lengths.tolist()), recipe.train.batch_size, recipe.train.seed, recipe.train.group_by_length
    )


def worth_compiling(recipe: Recipe, tokens: int, parameters: int, device: str) -> bool:
    """Whether the pointwise parts are to be compiled on this type of device, where there is a compiler."""
    return recipe.model.compile == "auto" and tokens * parameters >= COMPILE_FROM.get(device, math.inf)


def make_plan(recipe: Recipe, shape: Shape, data: TokenData, dtype: torch.dtype, device: str) -> Plan:
    """The plan of a run that computes in `dtype`; see `plan_memory` for the estimate."""
    order = order_of(recipe, data)
    steps, rows = steps_and_rows(recipe, order)
    mean = sum(order.lengths) / len(order.lengths)
    tokens = round(rows * mean)
    compiled = worth_compiling(recipe, tokens, shape.parameters, device) and not why_no_compiler(torch.device(device))
    load = replace(load_of(recipe, data, order, steps, rows), compiled=compiled)
    saved = shape.trainable * (dtype.itemsize if recipe.lora and recipe.lora.dtype == "compute" else 4)
    saves = bool(recipe.save.every or recipe.save.minutes)
    checkpoints = (recipe.save.keep_last + 1) * saves  # one more while it saves
    state = round(STATE_BYTES[recipe.train.optimizer] * shape.trainable) + saved * recipe.eval.keep_best
    disk = {"result": saved + 8_000_000, "checkpoints": (saved + state + 8_000_000) * checkpoints}
    memory = plan_memory(recipe, shape, load, dtype, device)
    return Plan(shape, recipe.train.gradient_checkpointing, steps, rows, tokens, load, memory, disk)
