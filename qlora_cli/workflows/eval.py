"""`qlora eval`: what a model is worth on held-out rows, alone and against another.

Sees the whole recipe. Invariant: the rows are those that training held out, found by content, or those of `--data`; two
models are compared on the same ones.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qlora_cli.data.formats import FORMATS
from qlora_cli.data.sources import is_local
from qlora_cli.errors import DataError, DiskError, ModelError, QloraError
from qlora_cli.evaluation.paired import Interval, Ratio, interval
from qlora_cli.files import disk_errors, write_json
from qlora_cli.model.folder import is_folder
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.snapshot import read_resolved
from qlora_cli.secrets import redacted
from qlora_cli.workflows.against import Against, against
from qlora_cli.workflows.card import RECIPE_FILE
from qlora_cli.workflows.eval_rows import write_rows
from qlora_cli.workflows.events import Emit, Notice
from qlora_cli.workflows.locate import NO_ROWS, Found, find
from qlora_cli.workflows.rundir import RESOLVED, STATUS
from qlora_cli.workflows.sides import Measures, Side, measure

BASE = "base"
"""What `--against` calls the model before training."""
EVALUATIONS = "evaluations"
"""The folder of a run directory that keeps its evaluations."""
WRITTEN = (b'{\n  "event": "result"', b'{"kind": "row"', b'{"kind": "choice"')
"""What the files that this command writes begin with."""


@dataclass(frozen=True)
class EvalRequest:
    """What the command line asks for."""

    target: str
    adapter: Path | None = None
    data: str | None = None
    format_: str | None = None
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
    found = {**side.result.as_json(), "lost": side.lost} if side.result else {}
    found |= {"scores": [score.as_json() for score in side.answers.scores]} if side.answers else {}
    found |= {"choices": side.choices.as_json()} if side.choices else {}
    tasks = side.tasks
    return found | ({"lm_eval": tasks.as_json(), "lm_eval_setting": tasks.setting_json()} if tasks else {})


def run_eval(request: EvalRequest, emit: Emit) -> EvalOutcome:
    """Evaluates a run's adapter, a model, or a recipe's base (with `adapter`, when given), and what it is to be
    compared with. Raises `QloraError`; what was to be written is, once everything is measured."""
    for path in filter(None, (request.output, request.rows)):
        check_free(path, request.overwrite)
    found = _on_data(_find(request), request.data, request.format_)
    other = _other(request.against, found) if request.against is not None else None
    side = measure(request.target, found, request.measures, emit, request.allow_changed_base)
    second = apart = None
    if other is not None and request.against is not None:
        second = measure(request.against, other, request.measures, emit, request.allow_changed_base)
        apart = against(side, second)
    losses = side.losses
    bounds = interval(Ratio(losses.sums, losses.targets)) if losses is not None else None
    created = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    outcome = EvalOutcome(request.target, side, second, apart, bounds, created)
    _write(request, outcome, emit)
    return outcome


def check_free(path: Path, overwrite: bool) -> None:
    """Raises `DiskError` where a result has no place: no file can be written there, or there is one. With `overwrite`
    it may be one that this command wrote; never one of a run, or rows."""
    with disk_errors(path.parent):
        ours = path.is_file() and _is_ours(path)
        if path.exists() and not (ours and overwrite):
            what = "is a folder" if path.is_dir() else "exists" if ours else "exists, and is no result of an evaluation"
            raise DiskError(f"cannot write {path}: it {what}", fix="name another file" + ", or add --overwrite" * ours)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".tmp-{path.name}-", dir=path.parent):
            pass  # it can be written: better known now than when all is measured


def _is_ours(path: Path) -> bool:
    """Whether this command wrote it, or nothing stands in it."""
    with path.open("rb") as file:
        return (file.read(max(map(len, WRITTEN))) or WRITTEN[0]).startswith(WRITTEN)


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
    place = run / EVALUATIONS / f"{outcome.created.removesuffix('+00:00').replace(':', '-')}.json"
    try:
        with disk_errors(place):
            place.parent.mkdir(exist_ok=True)
        write_json(place, values)
    except QloraError as error:
        emit(Notice(f"the result is not kept in the run directory: {error.problems[0].what}"))


def _find(request: EvalRequest) -> Found:
    """A run's own recipe, a model, or a recipe file; or what `adapter` makes of it."""
    target = request.target
    if request.adapter is not None:
        return _adapted(target, request.adapter)
    if _is_recipe(target):
        return _base_of(load_recipe(target).recipe)
    found = _named(target)
    if found.recipe.data.train == NO_ROWS and request.measures.held_out and request.data is None:
        raise ModelError(
            f"{target} is a model without {RECIPE_FILE}",
            why="eval takes rows from a run, a merged model or a recipe",
            fix=f"name rows with --data FILE, or a recipe with model.base: {target}",
        )
    return found


def _named(target: str) -> Found:
    """A run or a model. A name that is neither may have been meant for a recipe."""
    try:
        return find(target, None)
    except ModelError as error:
        problem = error.problems[0]
        if is_folder(Path(target)) or not problem.fix:
            raise
        raise ModelError(problem.what, why=problem.why, fix=f"{problem.fix}, or a recipe (.yaml)") from error


def _adapted(target: str, adapter: Path) -> Found:
    """An adapter on the rows of a run or a recipe, with the base and template that it was trained with; or with its own
    rows on a model that has none, as its base."""
    resolved = Path(target) / RESOLVED
    if _is_recipe(target):
        rows = load_recipe(target).recipe
    elif resolved.is_file():  # a run, which may have come to no adapter yet
        rows = read_resolved(resolved)
    else:
        rows = find(target, None).recipe
    return find(target, adapter) if rows.data.train == NO_ROWS else _with_rows_of(find(None, adapter), rows)


def _is_recipe(target: str) -> bool:
    """Whether it is to be read as a recipe: a file, or a name without the slash of a Hub id, but no folder's."""
    written = target.lower().endswith((".yaml", ".yml")) or os.path.isfile(target)  # noqa: PTH113 - takes any name
    return not is_folder(Path(target)) and (written or "/" not in target)


def _base_of(recipe: Recipe) -> Found:
    return Found(recipe.model_copy(update={"lora": None}), None)


def _with_rows_of(found: Found, rows: Recipe) -> Found:
    """The model with the rows of another recipe, in its own template."""
    theirs = found.recipe.data
    data = rows.data.model_copy(update={"template": theirs.template, "new_tokens": theirs.new_tokens})
    return replace(found, recipe=found.recipe.model_copy(update={"data": data, "eval": rows.eval}))


def _on_data(found: Found, data: str | None, format_: str | None) -> Found:
    """On rows of a file, all of them; in the recipe's format, where none is named and there is a recipe."""
    if data is None:
        return found
    if format_ not in {None, "auto", *FORMATS}:
        what = f"--format {format_}: there is no such shape of rows"
        raise DataError(what, fix=f"name one of {', '.join(('auto', *FORMATS))}")
    name = data if is_local(data) or not Path(data).exists() else f"./{data}"
    section = found.recipe.data
    shape = format_ or ("auto" if section.train == NO_ROWS else section.format)
    section = section.model_copy(update={"eval": name, "eval_split": None, "format": shape})
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
