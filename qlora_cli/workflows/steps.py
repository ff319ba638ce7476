"""What surrounds the steps of a run: figures, evaluations, checkpoints, signals.

Sees the whole recipe. Invariant: a checkpoint is written when all that its step brings has been done, or says what has
not; so a run that goes on from it does every evaluation exactly once.
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

from qlora_cli.errors import QloraError
from qlora_cli.model.device import peak_memory
from qlora_cli.model.ranks import Ranks
from qlora_cli.model.trained import Trained
from qlora_cli.training.checkpoint import Checkpoints, State
from qlora_cli.training.guard import memory_guard
from qlora_cli.training.loop import Job, StepReport, train_steps
from qlora_cli.training.metrics import MetricsFile
from qlora_cli.training.state import optimizer_tensors, random_tensors
from qlora_cli.training.stop import Stop, StopNowError
from qlora_cli.training.trackers import Trackers
from qlora_cli.workflows.card import Outcome, beside
from qlora_cli.workflows.events import Emit, Evaluated, Notice, Progress, Sampled, Saved, Stage
from qlora_cli.workflows.measuring import Measuring
from qlora_cli.workflows.prepare import Prepared
from qlora_cli.workflows.rundir import SAMPLES, RunDirectory
from qlora_cli.workflows.standing import Measured, Standing


@dataclass
class Steps:
    """The steps of a run that are left to do; `at` says how far it has come, and is kept up to date."""

    ready: Prepared
    resolved: str
    ranks: Ranks
    directory: RunDirectory
    kept: Checkpoints
    at: Standing
    tell: Emit
    job: Job
    trained: Trained
    measuring: Measuring
    trackers: Trackers
    failure: QloraError | None = None
    """Of the last evaluation: what was trained is saved first."""
    _saved_at: float = field(default_factory=time.monotonic)
    _timed: tuple[float, int] = (0.0, 0)

    def run(self) -> None:
        """Does them, unless a signal or an evaluation ends them early. Raises `SystemExit` after a signal, when a
        checkpoint of the last step stands."""
        with MetricsFile(self.directory.metrics_path) as metrics, Stop(lambda text: self.tell(Notice(text))) as stop:
            if self.at.pending:
                self._evaluate(metrics, stop)
                if self.at.pending:
                    self._end(stop)
            if self.at.best.exhausted:
                return
            for report in train_steps(self.job, self.ready.recipe.train, self.ranks):
                self._after(report, metrics)
                ending = self.ranks.any(stop.asked is not None)
                self.at.pending = self._evaluation_is_due()
                if self.at.pending and not ending:
                    self._evaluate(metrics, stop)
                self._save_if_due(stop, ending or self.at.best.exhausted)
                if ending or self.at.pending:
                    self._end(stop)
                if self.at.best.exhausted:
                    return

    @property
    def _total(self) -> int:
        return self.job.total_steps

    def _after(self, step: StepReport, metrics: MetricsFile) -> None:
        self.at.take(step)
        seconds, count = self._timed
        if step.step > self.job.done + 1:  # the first warms caches up, and so says little of the others
            seconds, count = self._timed = (seconds + step.seconds, count + 1)
        if step.shrunk:
            self.tell(Notice(f"memory ran out in step {step.step}; it was done again with {step.shrunk.line()}"))
        if step.skipped:
            self.tell(Notice(f"{step.skipped}: the step was passed over, no weight was updated with it"))
        logged = step.step % self.ready.recipe.log.every == 0 or step.step in (1, self._total) or bool(step.skipped)
        eta = (seconds / count if count else step.seconds) * (self._total - step.step)
        progress = Progress(step, self._total, peak_memory(self.ranks.device), eta, logged)
        self.tell(progress)
        if logged:
            metrics.write("step", progress.as_json())
            speed = {"tokens_per_second": progress.tokens_per_second}
            self.trackers.log(step.step, "step", progress.as_json() | speed)
            self.directory.status("running", step=step.step)

    def _evaluation_is_due(self) -> bool:
        every, step = self.ready.recipe.eval.every, self.at.step
        due = step == self._total or (every is not None and step % every == 0)
        return due and bool(self.ready.data.held_out)

    def _evaluate(self, metrics: MetricsFile, stop: Stop) -> None:
        """The evaluation that is pending. A signal leaves it so."""
        section, step = self.ready.recipe.eval, self.at.step
        self.tell(Stage(f"evaluating on {self.measuring.asked.held.count:,} held-out rows"))
        try:
            with stop.impatient() if self.ranks.count == 1 else nullcontext(), memory_guard("evaluating"):
                found = self.measuring()
        except StopNowError:
            return
        except QloraError as error:
            if step < self._total:
                raise
            self.failure, self.at.pending = error, False
            return
        better = self.at.best.update(step, found.result.loss)
        self.at.last, self.at.pending = Measured(step, found.result), False
        if better and section.keep_best:
            self.at.kept, self.at.kept_values = self.at.last, self.trained.snapshot()
        event = Evaluated(step, found, better)
        self.tell(event)
        metrics.write("eval", event.as_json())
        self.trackers.log(step, "eval", event.as_json())
        for question, reply in found.samples:
            sample = Sampled(step, question.where, reply.text, reply.ended)
            self.tell(sample)
            self.directory.append(SAMPLES, {key: value for key, value in sample.as_json().items() if key != "event"})
        if self.at.best.exhausted and step < self._total:
            self.tell(Notice(f"stopped early: no lower held-out loss in {section.patience} evaluations"))

    def _save_if_due(self, stop: Stop, ending: bool) -> None:
        section, step = self.ready.recipe.save, self.at.step
        asked, stop.save = stop.save, False
        minutes = (time.monotonic() - self._saved_at) / 60
        due = bool(section.every and step % section.every == 0) or bool(section.minutes and minutes >= section.minutes)
        last = (step == self._total or ending) and (section.every or section.minutes) is not None
        if due or last or asked or ending or self.at.pending:
            self._save()

    def _save(self) -> None:
        self._saved_at, at = time.monotonic(), self.at
        if not self.ranks.is_main:
            return
        self.directory.status("running", step=at.step)
        job = self.job
        values = {
            **at.as_json(),
            "total_steps": job.total_steps,
            "first_total": job.first_total or job.total_steps,
            "raised": job.raised,
        }
        tensors = optimizer_tensors(job.optimizer, self.trained.named())
        state = State(values, tensors, random_tensors(), at.kept_values)
        outcome = Outcome(at.step, math.nan if at.loss is None else at.loss, at.measured_at(at.step))
        extras = beside(self.ready, self.resolved, outcome)
        self.tell(Saved("checkpoint", self.kept.save(at.step, self.trained, extras, state)))

    def _end(self, stop: Stop) -> None:
        """Ends the program as the signal asked; in another process than the one that got it, as SIGTERM would."""
        number = stop.asked or signal.SIGTERM
        run = self.directory.path
        self.tell(Notice(f"ended after step {self.at.step}, which is saved; go on with: qlora train {run} --resume"))
        raise SystemExit(128 + number)
