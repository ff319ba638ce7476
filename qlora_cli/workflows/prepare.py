"""Everything that can fail before a weight is read: machine, base folder, structure, data, plan.

Sees the whole recipe. Invariant: what it returns is enough to start training, and nothing was written anywhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_cli.data.dataset import TokenData, load_data
from qlora_cli.errors import MachineError, ModelError, RecipeError
from qlora_cli.model.base import load_config, load_tokenizer, meta_model
from qlora_cli.model.device import Machine, compute_dtype, find_machine, free_memory
from qlora_cli.model.folder import BaseFolder, find_base
from qlora_cli.recipe.load import DEFAULT, LoadedRecipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.optim import paging_note
from qlora_cli.workflows.events import Emit, Fact, Notice, Stage, size
from qlora_cli.workflows.fits import Needs, settled
from qlora_cli.workflows.measuring import Asked, asked_of
from qlora_cli.workflows.plan import Plan, check_length, make_plan, order_of, shape_of, with_tokens
from qlora_cli.workflows.rows import packing_share, setting_of
from qlora_cli.workflows.storage import check_blocks, check_stored


@dataclass(frozen=True)
class Prepared:
    """A checked start."""

    recipe: Recipe
    machine: Machine
    dtype: torch.dtype
    folder: BaseFolder
    tokenizer: Any
    data: TokenData
    plan: Plan
    new_tokens: tuple[int, ...]
    """Ids of the special tokens that the tokenizer gained, or the recipe names: their embeddings are trained."""
    asked: Asked


def local_rank() -> int:
    """This process' device index among those of its machine, as its launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def prepare(loaded: LoadedRecipe, weights: bool, emit: Emit) -> Prepared:
    """Checks in the order of cost: machine, base folder and structure, tokenizer, data. `weights` False (a dry run)
    neither needs nor downloads them."""
    recipe = loaded.recipe
    machine = find_machine(recipe.model.device, local_rank())
    dtype = compute_dtype(recipe.quantization.compute_dtype, machine)
    _check_offload(recipe, machine)
    _check_world(recipe)
    folder = find_base(recipe.model.base, recipe.model.revision, weights)
    config = load_config(folder)
    check_length(recipe, config, _place(loaded, "data.max_length"))
    check_stored(recipe, folder, config)
    skeleton = meta_model(config)
    shape = shape_of(skeleton, recipe)
    check_blocks(skeleton, recipe.quantization, machine.device)
    tokenizer = load_tokenizer(folder)
    emit(Stage(f"reading {recipe.data.title}"))
    data = load_data(recipe.data, setting_of(recipe, tokenizer, emit))
    trained = {*data.chosen.added, *recipe.data.new_tokens}
    new_tokens = tuple(sorted(tokenizer.convert_tokens_to_ids(sorted(trained))))
    shape = with_tokens(shape, skeleton, recipe, new_tokens)
    _check_vocabulary(data, shape.vocabulary, recipe.model.base)
    asked = asked_of(recipe, data, tokenizer, config)
    plan = make_plan(recipe, shape, data, dtype, machine.device.type)
    packing = packing_share(recipe, data, order_of(recipe, data), plan.rows)
    data = replace(data, receipt=data.receipt.with_packing(packing))
    needs = settled(Needs(recipe, shape, plan.load, dtype, machine.device.type, free_memory(machine.device)))
    plan = replace(plan, memory=needs.parts, checkpointing=needs.recipe.train.gradient_checkpointing)
    ready = Prepared(needs.recipe, machine, dtype, folder, tokenizer, data, plan, new_tokens, asked)
    for event in header(ready, needs):
        emit(event)
    check_memory(needs, weights, emit)
    return ready


def check_memory(needs: Needs, runs: bool, emit: Emit) -> None:
    """A run that lacks memory is refused; a dry run says so."""
    if not needs.lacking:
        return
    if runs:
        raise needs.problem()
    problem = needs.problem().problems[0]
    emit(Notice(f"{problem.what}: the run itself would be refused; {problem.fix}"))


def _place(loaded: LoadedRecipe, key: str) -> str:
    """Where the recipe sets `key`; empty when it has its default."""
    origin = loaded.origins.get(key, DEFAULT)
    return "" if origin == DEFAULT else origin


def weights_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """Type of unquantised weights: the compute dtype, or float32 where they are trained (with autocast around)."""
    return dtype if recipe.lora is not None else torch.float32


def _check_vocabulary(data: TokenData, vocabulary: int, base: str) -> None:
    largest = data.largest_id
    if largest >= vocabulary:
        raise ModelError(
            f"{base}: its tokenizer gives token {largest}, but the model has only {vocabulary} embeddings",
            fix="check that the tokenizer's files belong to this model",
        )


def _check_offload(recipe: Recipe, machine: Machine) -> None:
    if recipe.train.gradient_checkpointing == "offload" and machine.device.type == "cpu":
        raise MachineError(
            "train.gradient_checkpointing is offload, but this run computes on the CPU",
            why="activations are in host memory already",
            fix="set train.gradient_checkpointing to on",
        )


def _check_world(recipe: Recipe) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.train.batch_size % (recipe.train.micro_batch_size * world):
        raise RecipeError(
            f"train.batch_size is {recipe.train.batch_size}, not a multiple of train.micro_batch_size "
            f"({recipe.train.micro_batch_size}) x processes ({world})",
            why="every process takes the same number of micro-batches",
            fix=f"set train.batch_size to a multiple of {recipe.train.micro_batch_size * world}",
        )


def header(ready: Prepared, needs: Needs) -> list[Fact | Notice]:
    """The console's header: model, quantization, adapter, data, plan, memory."""
    recipe, shape = ready.recipe, ready.plan.shape
    share = 100 * (1 - shape.four_bit / shape.parameters)
    facts: list[Fact | Notice] = [
        Fact("model", f"{recipe.model.base}, {shape.parameters:,} parameters on {ready.machine.name}"),
        Fact("base", f"{_quantization(ready)}; {share:.1f}% of parameters are not 4-bit"),
        Fact("lora" if recipe.lora else "train", _trainable(ready)),
        *(Fact("data", line) for line in ready.data.receipt.lines()),
        Fact("plan", _plan_line(ready)),
        Fact("memory", needs.line()),
    ]
    note = paging_note(recipe.train, ready.machine.device)
    return [*facts, *([Notice(note)] if note else [])]


def _quantization(ready: Prepared) -> str:
    quant, dtype = ready.recipe.quantization, str(ready.dtype).removeprefix("torch.")
    if quant.type == "none":
        return f"not quantised, compute {dtype}"
    double = " + double quantization" if quant.double_quant else ""
    return f"{quant.type}{double}, blocks of {quant.blocksize}, compute {dtype}"


def _trainable(ready: Prepared) -> str:
    shape, lora = ready.plan.shape, ready.recipe.lora
    share = f"{shape.trainable:,} trainable parameters ({100 * shape.trainable / shape.parameters:.2f}%)"
    if lora is None:
        return f"full fine-tuning, {share}"
    kind = ", rank-stabilised" if lora.rslora else ""
    return f"r {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}{kind}, {shape.adapted_layers} layers, {share}"


def _plan_line(ready: Prepared) -> str:
    plan, train = ready.plan, ready.recipe.train
    rows = train.micro_batch_size
    many = f"up to {rows * ready.recipe.data.max_length:,} packed tokens" if train.packing else f"{rows} padded rows"
    split = f"{train.batch_size} rows a step in micro-batches of {many}"
    passes = plan.rows / len(ready.data.train)
    return (
        f"{plan.steps:,} steps, {split}, {plan.rows:,} rows ({passes:.2f} epochs), about {plan.tokens:,} tokens; "
        f"{train.optimizer}, lr {train.lr:g} {train.schedule}; {ACTIVATIONS[train.gradient_checkpointing]}"
    )


ACTIVATIONS = {
    "on": "activations computed again in the backward pass",
    "off": "activations kept for the backward pass",
    "offload": "activations computed again, their inputs kept in host memory",
}


def parts(sizes: dict[str, int]) -> str:
    """Bytes by part, those that are not 0."""
    return ", ".join(f"{name} {size(count)}" for name, count in sizes.items() if count)
