"""`qlora train`: from a recipe to a verified adapter (or model).

Sees the whole recipe. Invariant: a run that returns has written what it trained, read it back, and found it equal,
finite and changed; until then nothing stands under a final name.
"""

from __future__ import annotations

import json
import math
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import ModelError, QloraError, RunDirectoryError
from qlora_cli.files import bytes_below, check_space
from qlora_cli.model.base import load_base, report, set_checkpointing
from qlora_cli.model.device import make_deterministic
from qlora_cli.model.ranks import Ranks
from qlora_cli.model.trained import Trained, TrainedAdapter, TrainedModel
from qlora_cli.recipe.load import LoadedRecipe
from qlora_cli.recipe.snapshot import resolved_yaml
from qlora_cli.training.best import Best
from qlora_cli.training.checkpoint import Checkpoints
from qlora_cli.training.guard import memory_guard
from qlora_cli.training.metrics import cut_metrics
from qlora_cli.training.trackers import Trackers, check_trackers
from qlora_cli.workflows.card import Outcome, beside
from qlora_cli.workflows.changes import Change
from qlora_cli.workflows.events import Emit, Event, Fact, Notice, Progress, Saved, Stage, size
from qlora_cli.workflows.fits import Watch, score
from qlora_cli.workflows.locate import cache_of
from qlora_cli.workflows.lock import lock
from qlora_cli.workflows.plan import Plan
from qlora_cli.workflows.prepare import Prepared, local_rank, parts, prepare, weights_dtype
from qlora_cli.workflows.result import TrainResult, finished
from qlora_cli.workflows.resume import LOCK, Resumed, find_changes, find_checkpoint, resumed
from qlora_cli.workflows.rundir import RESOLVED, SAMPLES, RunDirectory, check_run, check_unused
from qlora_cli.workflows.standing import Standing
from qlora_cli.workflows.start import start
from qlora_cli.workflows.steps import Steps
from qlora_cli.workflows.tracking import trackers_of


def run_directory(loaded: LoadedRecipe, output: Path | None) -> Path:
    """`-o`, else the recipe's `output`, else out/RECIPE-NAME."""
    return output or Path(loaded.recipe.output or Path("out") / loaded.path.stem)


def plan_train(loaded: LoadedRecipe, output: Path | None, emit: Emit, resume: bool = False) -> Plan:
    """`--dry-run`: everything up to the plan, without reading or downloading a weight, and without writing."""
    path = run_directory(loaded, output)
    check_trackers(loaded.recipe.log.to)
    if resume and check_run(path):
        found = find_checkpoint(path / "checkpoints", None, emit)
        emit(Notice(f"the run would go on {f'after step {found.step}' if found else 'at its beginning'}"))
    plan = prepare(loaded, weights=False, emit=emit).plan
    check_space(path, plan.disk_bytes)
    emit(Fact("disk", f"about {size(plan.disk_bytes)} in {path} ({parts(plan.disk)}), estimated"))
    try:
        if not resume:
            check_unused(path)
    except RunDirectoryError as error:
        emit(Notice(f"{error.problems[0].what}: the run itself would be refused; name another directory with -o DIR"))
    return plan


def run_train(
    loaded: LoadedRecipe, output: Path | None, emit: Emit, resume: bool = False, allowed: Sequence[str] = ()
) -> TrainResult:
    """Trains; with `resume` goes on with the run that is in its directory, if there is one, whatever differs under a
    key of `allowed`. Raises `QloraError` for everything that a user or machine can cause, and `SystemExit` where a
    signal ended the run, saved."""
    path, first = run_directory(loaded, output), local_rank() == 0
    if first and not (resume and check_run(path)):
        check_unused(path)
    check_trackers(loaded.recipe.log.to)
    early: list[Event] = []  # told before there is a log to write them to

    def tell(event: Event) -> None:
        early.append(event)
        emit(event)

    make_deterministic(loaded.recipe.train.deterministic)
    ready = prepare(loaded, weights=True, emit=tell)
    mixed = ready.dtype if ready.recipe.lora is None and ready.dtype != torch.float32 else None
    ranks = Ranks(ready.machine.device, mixed)
    if ranks.is_main:
        check_space(path, ready.plan.disk_bytes - bytes_below(path / "checkpoints"))  # they make way for later ones
    ranks.wait()
    directory = RunDirectory(path, ranks.is_main, resume)
    try:
        run = _Run(loaded, ready, ranks, directory, emit)
        done = run.go_on(allowed, tell) if resume else None
        if done is not None:
            return done
        directory.status("starting", step=run.at.step, total_steps=run.total)  # first: without it this is no run
        with _recorded(directory):
            for event in early:
                directory.log(event.line())
            return run.train()
    finally:
        directory.close()


@contextmanager
def _recorded(directory: RunDirectory) -> Iterator[None]:
    """Records in status.json how a run ended that did not finish."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        directory.log("interrupted")
        code = end.code if isinstance(end, SystemExit) and type(end.code) is int else 128 + signal.SIGINT
        directory.status("interrupted", reason=f"interrupted by {signal.Signals(code - 128).name}")
        raise
    except QloraError as error:
        directory.log(f"error: {error}")
        directory.status("failed", reason=str(error))
        raise
    except Exception as error:
        directory.log(traceback.format_exc())
        directory.status("failed", reason=f"{type(error).__name__}: {error}")
        raise


def _as_run(loaded: LoadedRecipe, path: Path, ready: Prepared) -> LoadedRecipe:
    """The recipe with the run directory and the template that were chosen, and the Hub commit that was loaded, so that
    whoever reads it later gets that very base and those very turns."""
    recipe, origins, commit = loaded.recipe, dict(loaded.origins), ready.folder.revision
    if recipe.data.template == "auto":
        data = recipe.data.model_copy(update={"template": ready.data.chosen.name})
        recipe, origins["data.template"] = recipe.model_copy(update={"data": data}), "chosen for this run"
    if recipe.output != str(path):
        recipe, origins["output"] = recipe.model_copy(update={"output": str(path)}), "chosen for this run"
    if commit is not None:
        model = recipe.model.model_copy(update={"revision": commit})
        recipe, origins["model.revision"] = recipe.model_copy(update={"model": model}), "the Hub's commit at the start"
    return replace(loaded, recipe=recipe, origins=origins)


class _Run:
    """One run, from loaded weights to the saved result."""

    def __init__(
        self, loaded: LoadedRecipe, ready: Prepared, ranks: Ranks, directory: RunDirectory, emit: Emit
    ) -> None:
        self.ready, self.ranks, self.directory = ready, ranks, directory
        self.recipe, self.total = ready.recipe, ready.plan.steps
        self.loaded = _as_run(loaded, directory.path, ready)
        self.resolved = resolved_yaml(self.loaded)
        self._emit = emit
        self.at = Standing(Best(self.recipe.eval.patience))
        self.resumed: Resumed | None = None
        self.kept = Checkpoints(directory.path / "checkpoints", self.recipe.save.keep_last)
        self.failure: QloraError | None = None

    def tell(self, event: Event) -> None:
        """To the console, and to train.log."""
        if not isinstance(event, Progress) or event.logged:
            self.directory.log(event.line())
        self._emit(event)

    def go_on(self, allowed: Sequence[str], tell: Emit) -> TrainResult | None:
        """Finds where the run in the directory goes on. Returns its result where there is nothing left to do."""
        path, main = self.directory.path, self.ranks.is_main
        if self.directory.left:
            tell(Notice(f"{path} was in use by {self.directory.left}, which ended without saying so; taken over"))
        changes: tuple[Change, ...] | None = ()
        if main:
            self.lock = lock(self.ready, cache_of(self.recipe.quantization, tell))
            changes = find_changes(path, self.loaded.recipe, self.lock, allowed)
            if changes is not None and (done := finished(path, self.total)) is not None:
                tell(Notice(f"{path} is finished: nothing is left to do"))
                return done
        found = find_checkpoint(path / "checkpoints", self.kept if main else None, tell)
        if found is None:
            tell(Notice(f"{path} holds no checkpoint: the run starts at its beginning"))
            return None
        if changes is None:
            what = f"{path} has checkpoints, but not {RESOLVED} and {LOCK}, which say of what run"
            raise ModelError(what, fix="take them from a copy, or train again in another directory with -o DIR")
        self.resumed = resumed(found, changes, self.recipe, self.ready.plan)
        self.at = self.resumed.standing(self.recipe.eval.patience)
        tell(Notice(f"going on after step {found.step}, from {found.path}"))
        for change in changes:
            tell(Notice(f"otherwise than before: {change.line()}"))
        return None

    def train(self) -> TrainResult:
        """Everything after the preparation."""
        self._record_inputs()
        with trackers_of(self.loaded.recipe, self.directory, self.at.step, self.tell) as trackers:
            return self._train(trackers)

    def _train(self, trackers: Trackers) -> TrainResult:
        model, trained = self._load()
        self._loop(model, trained, trackers)
        best = self.at.kept
        if best is not None and best.step != self.at.step:
            trained.restore(self.at.kept_values)
            self.tell(Notice(f"keeping the values of step {best.step}, which had the lowest held-out loss"))
        result = self._finish(trained)
        if self.failure is not None:
            self.tell(Notice(f"what was trained is saved in {result.artifact}, though the last evaluation failed"))
            raise self.failure
        return result

    def _record_inputs(self) -> None:
        directory, ready = self.directory, self.ready
        if self.ranks.is_main and self.resumed is None:
            self.lock = lock(ready, cache_of(ready.recipe.quantization, self.tell))
        if self.loaded.path.name != RESOLVED:  # then the run goes on by its own record of what was written there
            directory.text("recipe.yaml", self.loaded.text)
        directory.text(RESOLVED, self.resolved)
        directory.json("data_receipt.json", ready.data.receipt.as_json())
        lost = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ready.data.lost_rows())
        directory.text("data_rows.jsonl", lost)
        directory.json("plan.json", ready.plan.as_json())
        if self.ranks.is_main:
            directory.json(LOCK, self.lock)
        if directory.metrics_path:
            cut_metrics(directory.metrics_path, self.at.step)
            cut_metrics(directory.path / SAMPLES, self.at.step)
        if self.resumed is not None:
            directory.append("resumes.jsonl", self.resumed.as_json())

    def _load(self) -> tuple[Any, Trained]:
        ready, recipe = self.ready, self.recipe
        self.tell(Stage(f"loading {recipe.model.base}"))
        started = time.perf_counter()
        dtype, device = weights_dtype(recipe, ready.dtype), self.ranks.device
        self.watch = Watch(device)
        with memory_guard("loading the base model"):
            cache = cache_of(recipe.quantization, self.tell)
            model = load_base(ready.folder, recipe.model, recipe.quantization, dtype, device, cache)
            self._tell_base(model, time.perf_counter() - started)
            set_checkpointing(model, recipe.train.gradient_checkpointing)
            lora, seed = recipe.lora, recipe.train.seed
            base, new = recipe.model.base, ready.new_tokens
            trained = TrainedAdapter(model, lora, base, ready.dtype, seed, new) if lora else TrainedModel(model, new)
        return model, trained

    def _tell_base(self, model: Any, seconds: float) -> None:
        held = report(model)
        counts = f"{held.four_bit_parameters:,} of {held.parameters:,} parameters in 4 bits"
        counts += f" ({held.share_not_four_bit:.1%} are not)"
        counts += f", {held.bits_per_parameter:.3f} bits per parameter" if held.four_bit_parameters else ""
        total = size(held.four_bit_bytes + held.other_bytes)
        self.tell(Fact("loaded", f"{counts}, {total} in all, {seconds:.1f} s"))

    def _loop(self, model: Any, trained: Trained, trackers: Trackers) -> None:
        job, measuring = start(model, trained, self.ready, self.ranks, self.tell)
        if self.resumed is not None:
            job = self.resumed.restore(job, trained, self.at)
        self.directory.status("running", step=self.at.step)
        place = (self.ready, self.resolved, self.ranks, self.directory, self.kept)
        steps = Steps(*place, self.at, self.tell, job, trained, measuring, trackers)
        steps.run()
        self.failure = steps.failure

    def _finish(self, trained: Trained) -> TrainResult:
        at = self.at
        step, held = (at.kept.step, at.kept.result) if at.kept else (at.step, at.measured_at(at.step))
        artifact = self.directory.path / trained.kind
        loss = math.nan if at.loss is None else at.loss
        result = TrainResult(self.directory.path, artifact, at.step, loss, held)
        if self.ranks.is_main:
            trained.save(artifact, beside(self.ready, self.resolved, Outcome(step, loss, held)))
            self.directory.status("finished", step=at.step, result=result.as_json())
        self.ranks.wait()
        self.tell(Saved(trained.kind, artifact))
        self._tell_memory()
        return result

    def _tell_memory(self) -> None:
        plan, measured = self.ready.plan, self.watch.growth()
        self.directory.json("plan.json", {**plan.as_json(), "measured_memory_bytes": measured})
        self.tell(Fact("memory", score(plan.memory_bytes, measured)))
