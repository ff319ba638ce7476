"""`qlora train`: from a recipe to a verified adapter (or model).

Sees the whole recipe. Invariant: a run that returns has written what it trained, read it back, and found it equal,
finite and changed; until then nothing stands under a final name.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import NonFiniteError, QloraError, RunDirectoryError
from qlora_cli.evaluation.perplexity import EvalResult
from qlora_cli.model.base import load_base, report, set_checkpointing
from qlora_cli.model.device import peak_memory
from qlora_cli.model.ranks import Ranks
from qlora_cli.model.trained import Trained, TrainedAdapter, TrainedModel
from qlora_cli.recipe.load import LoadedRecipe
from qlora_cli.recipe.snapshot import resolved_yaml
from qlora_cli.training.best import Best
from qlora_cli.training.checkpoint import save_checkpoint
from qlora_cli.training.guard import memory_guard
from qlora_cli.training.loop import StepReport, train_steps
from qlora_cli.training.metrics import MetricsFile
from qlora_cli.workflows.card import Outcome, beside
from qlora_cli.workflows.events import Emit, Evaluated, Event, Fact, Notice, Progress, Saved, Stage, eval_json, size
from qlora_cli.workflows.fits import Watch, score
from qlora_cli.workflows.locate import cache_of
from qlora_cli.workflows.lock import lock
from qlora_cli.workflows.plan import Plan
from qlora_cli.workflows.prepare import Prepared, local_rank, parts, prepare, weights_dtype
from qlora_cli.workflows.rundir import RunDirectory, check_space, check_unused
from qlora_cli.workflows.start import Evaluation, start


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its directory, the folder with what was trained, and what it reached."""

    run: Path
    artifact: Path
    steps: int
    train_loss: float
    held_out: EvalResult | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        held = eval_json(self.held_out) if self.held_out else None
        values = {"run": str(self.run), "artifact": str(self.artifact), "steps": self.steps}
        return {"event": "result", **values, "train_loss": self.train_loss, "held_out": held}


def run_directory(loaded: LoadedRecipe, output: Path | None) -> Path:
    """`-o`, else the recipe's `output`, else out/RECIPE-NAME."""
    return output or Path(loaded.recipe.output or Path("out") / loaded.path.stem)


def plan_train(loaded: LoadedRecipe, output: Path | None, emit: Emit) -> Plan:
    """`--dry-run`: everything up to the plan, without reading or downloading a weight, and without writing."""
    path = run_directory(loaded, output)
    plan = prepare(loaded, weights=False, emit=emit).plan
    check_space(path, plan.disk_bytes)
    emit(Fact("disk", f"about {size(plan.disk_bytes)} in {path} ({parts(plan.disk)}), estimated"))
    try:
        check_unused(path)
    except RunDirectoryError as error:
        emit(Notice(f"{error.problems[0].what}: the run itself would be refused; name another directory with -o DIR"))
    return plan


def run_train(loaded: LoadedRecipe, output: Path | None, emit: Emit) -> TrainResult:
    """Trains. Raises `QloraError` for everything that a user or machine can cause."""
    path = run_directory(loaded, output)
    if local_rank() == 0:
        check_unused(path)
    early: list[Event] = []  # told before there is a log to write them to

    def tell(event: Event) -> None:
        early.append(event)
        emit(event)

    ready = prepare(loaded, weights=True, emit=tell)
    mixed = ready.dtype if ready.recipe.lora is None and ready.dtype != torch.float32 else None
    ranks = Ranks(ready.machine.device, mixed)
    if ranks.is_main:
        check_space(path, ready.plan.disk_bytes)
    ranks.wait()
    directory = RunDirectory(path, ready.plan.steps, ranks.is_main)
    for event in early:
        directory.log(event.line())
    with _recorded(directory):
        return _Run(loaded, ready, ranks, directory, emit).train()


@contextmanager
def _recorded(directory: RunDirectory) -> Iterator[None]:
    """Records in status.json how a run ended that did not finish."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        directory.log("interrupted")
        directory.status("interrupted", reason="interrupted by a signal")
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
        self.loaded, self.ready, self.ranks, self.directory = loaded, ready, ranks, directory
        self.recipe, self.total = ready.recipe, ready.plan.steps
        self.resolved = resolved_yaml(_as_run(loaded, directory.path, ready))
        self._emit = emit
        self.best = Best(self.recipe.eval.patience)
        self.measured: tuple[int, EvalResult] | None = None
        self.kept: tuple[int, EvalResult, dict[str, torch.Tensor]] | None = None
        self.first_seconds = self.later_seconds = 0.0
        self.failure: QloraError | None = None

    def tell(self, event: Event) -> None:
        """To the console, and to train.log."""
        if not isinstance(event, Progress) or event.logged:
            self.directory.log(event.line())
        self._emit(event)

    def train(self) -> TrainResult:
        """Everything after the preparation."""
        self._record_inputs()
        model, trained = self._load()
        last = self._loop(model, trained)
        if self.kept is not None and self.kept[0] != last.step:
            trained.restore(self.kept[2])
            self.tell(Notice(f"keeping the values of step {self.kept[0]}, which had the lowest held-out loss"))
        result = self._finish(trained, last)
        if self.failure is not None:
            self.tell(Notice(f"what was trained is saved in {result.artifact}, though the last evaluation failed"))
            raise self.failure
        return result

    def _record_inputs(self) -> None:
        directory, ready = self.directory, self.ready
        directory.text("recipe.yaml", self.loaded.text)
        directory.text("resolved.yaml", self.resolved)
        directory.json("data_receipt.json", ready.data.receipt.as_json())
        lost = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ready.data.lost_rows())
        directory.text("data_rows.jsonl", lost)
        directory.json("plan.json", ready.plan.as_json())
        if self.ranks.is_main:
            directory.json("lock.json", lock(ready, cache_of(ready.recipe.quantization, self.tell)))

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

    def _loop(self, model: Any, trained: Trained) -> StepReport:
        recipe = self.recipe
        job, evaluation = start(model, trained, self.ready, self.ranks, self.tell)
        self.directory.status("running", 0)
        with MetricsFile(self.directory.metrics_path) as metrics:
            for step_report in train_steps(job, recipe.train, self.ranks):
                self._after_step(step_report, metrics)
                if self._evaluate_if_due(evaluation, trained, step_report.step, metrics):
                    self.tell(Notice(f"stopped early: no lower held-out loss in {recipe.eval.patience} evaluations"))
                    break
                self._checkpoint_if_due(trained, step_report)
        return step_report

    def _after_step(self, step: StepReport, metrics: MetricsFile) -> None:
        if step.step == 1:  # which also warms caches up, and so says little of the others
            self.first_seconds = step.seconds
        else:
            self.later_seconds += step.seconds
        if step.shrunk:
            self.tell(Notice(f"memory ran out in step {step.step}; it was done again with {step.shrunk.line()}"))
        logged = step.step % self.recipe.log.every == 0 or step.step in (1, self.total)
        pace = self.later_seconds / (step.step - 1) if step.step > 1 else self.first_seconds
        eta = pace * (self.total - step.step)
        progress = Progress(step, self.total, peak_memory(self.ranks.device), eta, logged)
        self.tell(progress)
        if logged:
            metrics.write("step", progress.as_json())
            self.directory.status("running", step.step)

    def _evaluate_if_due(self, evaluation: Evaluation, trained: Trained, step: int, metrics: MetricsFile) -> bool:
        """Evaluates when `eval.every` or the end says so; returns whether to stop early."""
        section, rows = self.recipe.eval, self.ready.data.held_out
        due = step == self.total or (section.every is not None and step % section.every == 0)
        if not rows or not due:
            return False
        self.tell(Stage(f"evaluating on {len(rows):,} held-out rows"))
        try:
            result = self._evaluate(evaluation)
        except QloraError as error:
            if step < self.total:
                raise
            self.failure = error  # what was trained is saved first; see `train`
            return False
        better = self.best.update(step, result.loss)
        self.measured = (step, result)
        if better and section.keep_best:
            self.kept = (step, result, trained.snapshot())
        event = Evaluated(step, result, better)
        self.tell(event)
        metrics.write("eval", event.as_json())
        return self.best.exhausted and step < self.total

    def _evaluate(self, evaluation: Evaluation) -> EvalResult:
        with memory_guard("evaluating"):
            result = evaluation()
        if not math.isfinite(result.loss):
            raise NonFiniteError(
                f"the held-out loss is {result.loss}", fix="set quantization.compute_dtype to bfloat16 or float32"
            )
        return result

    def _checkpoint_if_due(self, trained: Trained, step: StepReport) -> None:
        every = self.recipe.save.every
        if every is None or step.step % every or step.step == self.total or not self.ranks.is_main:
            return
        outcome = Outcome(step.step, step.loss, self._measured_at(step.step))
        extras = beside(self.ready, self.resolved, outcome)
        folder = self.directory.path / "checkpoints"
        self.tell(Saved("checkpoint", save_checkpoint(folder, step.step, trained, extras, self.recipe.save.keep_last)))

    def _measured_at(self, step: int) -> EvalResult | None:
        return self.measured[1] if self.measured and self.measured[0] == step else None

    def _finish(self, trained: Trained, last: StepReport) -> TrainResult:
        kept = self.kept[0] if self.kept else last.step
        held = self.kept[1] if self.kept else self._measured_at(last.step)
        artifact = self.directory.path / trained.kind
        if self.ranks.is_main:
            trained.save(artifact, beside(self.ready, self.resolved, Outcome(kept, last.loss, held)))
            self.directory.status("finished", last.step)
        self.ranks.wait()
        self.tell(Saved(trained.kind, artifact))
        self._tell_memory()
        return TrainResult(self.directory.path, artifact, last.step, last.loss, held)

    def _tell_memory(self) -> None:
        plan, measured = self.ready.plan, self.watch.growth()
        self.directory.json("plan.json", {**plan.as_json(), "measured_memory_bytes": measured})
        self.tell(Fact("memory", score(plan.memory_bytes, measured)))
