"""From a loaded model to a job whose first step may begin: engine, optimizer, rehearsal.

Sees the whole recipe. Invariant: what the run computes with was tried, and is said; its largest micro-batch has passed
through once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlora_cli.data.batches import Batching
from qlora_cli.evaluation.perplexity import divided
from qlora_cli.model.engine import Engine, build_engine, plain_engine
from qlora_cli.model.ranks import Ranks
from qlora_cli.model.trained import Trained
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.guard import memory_guard
from qlora_cli.training.loop import Job
from qlora_cli.training.optim import build_optimizer
from qlora_cli.training.rehearsal import rehearse, rehearse_evaluation
from qlora_cli.workflows.events import Emit, Fact, Notice
from qlora_cli.workflows.measuring import Measuring
from qlora_cli.workflows.plan import order_of, worth_compiling
from qlora_cli.workflows.prepare import Prepared


def start(model: Any, trained: Trained, ready: Prepared, ranks: Ranks, tell: Emit) -> tuple[Job, Measuring]:
    """The job, and how to evaluate it, both rehearsed. Raises `DeviceMemoryError` with what would fit."""
    recipe, plan = ready.recipe, ready.plan
    wanted = worth_compiling(recipe, plan.tokens, plan.shape.parameters, ranks.device.type)
    with memory_guard("trying the engine's parts"):
        plain = recipe.model.engine == "plain"
        engine = plain_engine(model) if plain else build_engine(model, trained.adapters(), wanted)
    engine = replace(engine, packs=not ranks.any(not engine.packs))  # all processes divide a step's rows alike
    _tell_engine(engine, recipe, tell)
    parameters = list(trained.named().values())
    job = Job(
        model=model,
        loss=engine.loss,
        parameters=parameters,
        optimizer=build_optimizer(parameters, recipe.train, ranks.device),
        rows=ready.data.train,
        order=order_of(recipe, ready.data),
        batching=batching_of(recipe, engine, recipe.train.micro_batch_size),
        total_steps=plan.steps,
        total_rows=plan.rows,
    )
    held_out = ready.asked.held
    batching = batching_of(recipe, engine, recipe.eval.batch_size)
    rehearsed = rehearse(job, ranks)
    if held_out.rows:
        rehearse_evaluation(model, engine.losses, divided(held_out.listed, batching), batching, ranks)
    tell(Fact("rehearsal", rehearsed.line()))
    return job, Measuring(model, engine.losses, ready.asked, batching, recipe.eval, ranks)


def batching_of(recipe: Recipe, engine: Engine, rows: int) -> Batching:
    """How the recipe divides rows into micro-batches of `rows`, packed where it says so and the model can."""
    return Batching(rows, recipe.data.max_length, recipe.train.packing and engine.packs)


def _tell_engine(engine: Engine, recipe: Recipe, tell: Emit) -> None:
    tell(Fact("engine", engine.line(recipe.train.packing)))
    for note in engine.notes(recipe.train.packing):
        tell(Notice(note))
    if engine.compile_seconds:
        tell(Fact("compiled", f"in {engine.compile_seconds:.1f} s, not counted in the steps' times"))
