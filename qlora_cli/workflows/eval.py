"""`qlora eval`: loss and perplexity on the held-out rows of a recipe.

Sees the whole recipe. Invariant: the rows are those that training held out, found by content.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.data.batches import Batching
from qlora_cli.data.dataset import load_held_out
from qlora_cli.errors import ModelError
from qlora_cli.evaluation.perplexity import EvalResult, evaluate
from qlora_cli.model.engine import build_engine
from qlora_cli.model.folder import is_folder
from qlora_cli.model.ranks import Ranks
from qlora_cli.model.tokens import make_room
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.guard import memory_guard
from qlora_cli.workflows.card import RECIPE_FILE
from qlora_cli.workflows.events import Emit, Stage, eval_json
from qlora_cli.workflows.locate import Found, find, is_model, load_model, tell_changes, tokenizer_of
from qlora_cli.workflows.rows import setting_of


@dataclass(frozen=True)
class EvalOutcome:
    """What was evaluated, on which rows, and the figures."""

    base: str
    adapter: Path | None
    data: str
    result: EvalResult

    def line(self) -> str:
        """One line of text."""
        r, what = self.result, f"{self.base} with {self.adapter}" if self.adapter else self.base
        return f"{what}: loss {r.loss:.4f}, perplexity {r.perplexity:.3f} over {r.targets:,} tokens of {r.rows:,} rows"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        adapter = str(self.adapter) if self.adapter else None
        return {"event": "result", "base": self.base, "adapter": adapter, "data": self.data, **eval_json(self.result)}


def run_eval(target: str, adapter: Path | None, emit: Emit, allow_changed_base: bool = False) -> EvalOutcome:
    """Evaluates a run's adapter, or a recipe's base (with `adapter`, when given). Data and base are read anew."""
    found = _find(target, adapter)
    recipe = found.recipe
    tokenizer = tokenizer_of(found)
    rows, sources = load_held_out(recipe.data, setting_of(recipe, tokenizer, emit))
    if found.adapter is not None:
        tell_changes("data", sources, found.adapter, emit)
    emit(Stage(f"loading {recipe.model.base}"))
    with memory_guard("loading the base model"):
        loaded = load_model(found, emit, allow_changed_base)
        if found.adapter is None:  # a bare base has no embeddings yet of the tokens that the recipe adds
            make_room(loaded.model, len(tokenizer))
    emit(Stage(f"evaluating on {len(rows):,} held-out rows"))
    with memory_guard("evaluating"):
        engine = build_engine(loaded.model, (), compiled=False)
        batching = Batching(recipe.eval.batch_size, recipe.data.max_length, engine.packs)
        result = evaluate(loaded.model, engine.loss, rows, batching, Ranks(loaded.device))
    return EvalOutcome(recipe.model.base, found.adapter, recipe.data.eval or recipe.data.title, result)


def _find(target: str, adapter: Path | None) -> Found:
    """A run's own recipe, or a recipe file; with `adapter`, its rows on the base and template of that."""
    path = Path(target)
    if is_model(path) and not (path / RECIPE_FILE).is_file() and adapter is None:
        raise ModelError(
            f"{target} is a model without {RECIPE_FILE}",
            why="eval takes rows from a run, a merged model or a recipe",
            fix=f"name one of those, e.g. a recipe with model.base: {target}",
        )
    if adapter is None:
        return find(target, None) if is_folder(path) else _base_of(load_recipe(target).recipe)
    rows = find(target, None).recipe if is_folder(path) else load_recipe(target).recipe
    trained = find(None, adapter)
    theirs = trained.recipe.data
    data = rows.data.model_copy(update={"template": theirs.template, "new_tokens": theirs.new_tokens})
    return Found(trained.recipe.model_copy(update={"data": data, "eval": rows.eval}), trained.adapter)


def _base_of(recipe: Recipe) -> Found:
    return Found(recipe.model_copy(update={"lora": None}), None)
