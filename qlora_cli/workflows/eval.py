"""`qlora eval`: what a model is worth on held-out rows, alone and against another.

Sees the whole recipe. Invariant: the rows are those that training held out, found by content, or those of `--data`; two
models are compared on the same ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_cli.data.sources import is_local
from qlora_cli.errors import DiskError, ModelError, QloraError
from qlora_cli.evaluation.paired import Interval, Ratio, interval
from qlora_cli.files import disk_errors, write_json
from qlora_cli.model.folder import is_folder
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import DataSection, Recipe
from qlora_cli.recipe.snapshot import read_resolved
from qlora_cli.secrets import redacted
from qlora_cli.workflows.against import Against, against
from qlora_cli.workflows.card import RECIPE_FILE
from qlora_cli.workflows.eval_rows import write_rows
from qlora_cli.workflows.events import Emit, Notice
from qlora_cli.workflows.locate import NO_ROWS, Found, find, is_model
from qlora_cli.workflows.rundir import STATUS
from qlora_cli.workflows.sides import Measures, Side, measure

BASE = "base"
"""What `--against` calls the model before training."""
EVALUATIONS = "evaluations"
"""The folder of a run directory that keeps its evaluations."""


@dataclass(frozen=True)
class EvalRequest:
    """What the command line asks for."""

    target: str
    adapter: Path | None = None
    data: str | None = None
    against: str | None = None
    measures: Measures = field(default_factory=Measures)
    output: Path | None = None
    rows: Path | None = None
    overwrite: bool = False
    allow_changed_base: bool = False


@dataclass(frozen=True, eq=False)
class EvalOutcome:
    """What was found, and when; `interval` is that of the loss."""

    target: str
    side: Side
    other: Side | None
    against: Against | None
    interval: Interval | None
    created: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        side, found = self.side, {"event": "result", "target": self.target, **_model(self.side)}
        found |= {"data": side.data or None, "created": self.created} | _figures(side)
        if self.interval is not None:
            found["interval"] = {"low": self.interval.low, "high": self.interval.high}
        if side.answers is not None:
            found |= {"unended": side.answers.unended, "not_asked": side.left_out}
        return found | {"against": self._against_json()}

    def _against_json(self) -> dict[str, Any] | None:
        other, apart = self.other, self.against
        if other is None or apart is None:
            return None
        found = {"model": other.name, **_model(other), **_figures(other)}
        found["difference"] = apart.loss.as_json() if apart.loss else None
        pairs = zip(found.get("scores", ()), apart.scores, strict=True)
        found |= {"scores": [score | compared.as_json() for score, compared in pairs]} if apart.scores else {}
        if apart.choices is not None:
            found["choices"] |= apart.choices.as_json()
        return found


def _model(side: Side) -> dict[str, Any]:
    adapter = side.found.adapter
    return {"base": side.found.recipe.model.base, "adapter": str(adapter) if adapter else None}


def _figures(side: Side) -> dict[str, Any]:
    found = side.result.as_json() if side.result else {}
    found |= {"scores": [score.as_json() for score in side.answers.scores]} if side.answers else {}
    found |= {"choices": side.choices.as_json()} if side.choices else {}
    tasks = side.tasks
    return found | ({"lm_eval": tasks.as_json(), "lm_eval_setting": tasks.setting_json()} if tasks else {})


def run_eval(request: EvalRequest, emit: Emit) -> EvalOutcome:
    """Evaluates a run's adapter, a model, or a recipe's base (with `adapter`, when given), and what it is to be
    compared with. Raises `QloraError`; what was to be written is, once everything is measured."""
    for path in filter(None, (request.output, request.rows)):
        check_free(path, request.overwrite)
    found = _on_data(_find(request), request.data)
    other = _other(request.against, found) if request.against is not None else None
    side = measure(request.target, found, request.measures, emit, request.allow_changed_base)
    second = apart = None
    if other is not None and request.against is not None:
        second = measure(request.against, other, request.measures, emit, request.allow_changed_base)
        apart = against(side, second)
    losses = side.losses
    bounds = interval(Ratio(losses.sums, losses.targets)) if losses is not None else None
    created = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    outcome = EvalOutcome(request.target, side, second, apart, bounds, created)
    _write(request, outcome, emit)
    return outcome


def check_free(path: Path, overwrite: bool) -> None:
    """Raises `DiskError` where a result has no place."""
    if path.is_dir() or (path.exists() and not overwrite):
        what = "is a folder" if path.is_dir() else "exists"
        raise DiskError(
            f"cannot write {path}: it {what}", fix="name another file" + ", or add --overwrite" * path.is_file()
        )
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def _write(request: EvalRequest, outcome: EvalOutcome, emit: Emit) -> None:
    """The result as JSON, the rows, and in a run directory a copy that its report will show."""
    values = redacted(outcome.as_json())
    if request.output is not None:
        write_json(request.output, values)
    if request.rows is not None:
        write_rows(request.rows, outcome.side, outcome.other)
    run = Path(request.target)
    if request.adapter is not None or not (is_folder(run) and (run / STATUS).is_file()):
        return
    place = run / EVALUATIONS / f"{outcome.created[:19].replace(':', '-')}.json"
    try:
        with disk_errors(place):
            place.parent.mkdir(exist_ok=True)
        write_json(place, values)
    except QloraError as error:
        emit(Notice(f"the result is not kept in the run directory: {error.problems[0].what}"))


def _find(request: EvalRequest) -> Found:
    """A run's own recipe, a model, or a recipe file; with `adapter`, its rows on the base and template of that."""
    path, adapter = Path(request.target), request.adapter
    named = is_folder(path) or not _is_recipe(request.target)
    if adapter is not None:
        rows = find(request.target, None).recipe if is_folder(path) else load_recipe(request.target).recipe
        return _with_rows_of(find(None, adapter), rows)
    found = find(request.target, None) if named else _base_of(load_recipe(request.target).recipe)
    bare = is_model(path) and not (path / RECIPE_FILE).is_file()
    if (bare or not is_folder(path)) and named and request.measures.held_out and request.data is None:
        raise ModelError(
            f"{request.target} is a model without {RECIPE_FILE}",
            why="eval takes rows from a run, a merged model or a recipe",
            fix=f"name rows with --data FILE, or a recipe with model.base: {request.target}",
        )
    return found


def _is_recipe(target: str) -> bool:
    """Whether it is to be read as a recipe: a file, or a name without the slash of a Hub id."""
    return Path(target).suffix.lower() in {".yaml", ".yml"} or Path(target).is_file() or "/" not in target


def _base_of(recipe: Recipe) -> Found:
    return Found(recipe.model_copy(update={"lora": None}), None)


def _with_rows_of(found: Found, rows: Recipe) -> Found:
    """The model with the rows of another recipe, in its own template."""
    theirs = found.recipe.data
    data = rows.data.model_copy(update={"template": theirs.template, "new_tokens": theirs.new_tokens})
    return replace(found, recipe=found.recipe.model_copy(update={"data": data, "eval": rows.eval}))


def _on_data(found: Found, data: str | None) -> Found:
    """On rows of a file, all of them."""
    if data is None:
        return found
    name = data if is_local(data) or not Path(data).exists() else f"./{data}"
    rows = {"eval": name, "eval_split": None} | ({"format": "auto"} if found.recipe.data.train == NO_ROWS else {})
    section: DataSection = found.recipe.data.model_copy(update=rows)
    return replace(found, recipe=found.recipe.model_copy(update={"data": section}))


def _other(named: str, first: Found) -> Found:
    """What the first model is compared with, on the same rows."""
    found = _before(first) if named == BASE else find(named, None)
    return _with_rows_of(found, first.recipe)


def _before(found: Found) -> Found:
    """The model before training."""
    if found.adapter is not None:
        return _base_of(found.recipe)
    folder = Path(found.recipe.model.base)
    trained = folder / RECIPE_FILE
    if not trained.is_file():
        raise ModelError(
            f"--against {BASE}: {found.recipe.model.base} is a base itself",
            why="nothing is known of a model that it was trained from",
            fix=f"name a run, a model folder or a Hub id (a folder called {BASE} as ./{BASE})",
        )
    model = read_resolved(trained).model
    return Found(found.recipe.model_copy(update={"model": model, "lora": None}), None)
