"""How far a run has come: what its next step, its result and its checkpoints depend on.

Knows figures. Invariant: what `as_json` writes, `read` gives back equal, so that a resumed run stands where the first
one stood; the values of the best evaluation travel beside it as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.evaluation.perplexity import EvalResult
from qlora_cli.training.best import Best
from qlora_cli.training.loop import StepReport
from qlora_cli.workflows.events import finite


@dataclass(frozen=True)
class Measured:
    """An evaluation, after how many steps."""

    step: int
    result: EvalResult

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"step": self.step, "result": self.result.as_json()}


@dataclass
class Standing:
    """After `step` steps of a run. `loss` is the last step's; `tokens`, `targets` and `seconds` are those of all."""

    best: Best
    step: int = 0
    loss: float | None = None
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Steps passed over because a number was not finite."""
    micro_batch: tuple[int, int] | None = None
    """(rows, length) of the micro-batches that the loop went over to when memory ran out."""
    pending: bool = False
    """Whether the evaluation that is due after this step is still to be made."""
    last: Measured | None = None
    kept: Measured | None = None
    kept_values: Mapping[str, Tensor] = field(default_factory=dict)
    """The trained values of `kept`, the best evaluation, where the recipe keeps them."""

    def take(self, report: StepReport) -> None:
        """One more step."""
        self.step, self.loss = report.step, report.loss
        self.tokens += report.tokens
        self.targets += report.targets
        self.seconds += report.seconds
        self.skipped += bool(report.skipped)
        if report.shrunk is not None:
            self.micro_batch = (report.shrunk.rows, report.shrunk.length)

    def measured_at(self, step: int) -> EvalResult | None:
        """The evaluation after `step`, if there was one."""
        return self.last.result if self.last and self.last.step == step else None

    def as_json(self) -> dict[str, Any]:
        """Plain values; a number that is not finite as null."""
        best = {"loss": finite(self.best.loss), "step": self.best.step, "waited": self.best.waited}
        found = [("last", self.last), ("kept", self.kept)]
        evaluations = {name: each.as_json() if each else None for name, each in found}
        names = ("step", "tokens", "targets", "seconds", "skipped", "micro_batch", "pending")
        return {**{name: getattr(self, name) for name in names}, "loss": finite(self.loss), "best": best} | evaluations

    @classmethod
    def read(cls, values: Mapping[str, Any], patience: int | None, kept_values: Mapping[str, Tensor]) -> Standing:
        """What `as_json` wrote. Raises `ModelError` for anything else."""
        try:
            said = values["best"]
            loss = math.inf if said["loss"] is None else float(said["loss"])
            micro = values["micro_batch"]
            return cls(
                Best(patience, loss, int(said["step"]), int(said["waited"])),
                step=int(values["step"]),
                loss=None if values["loss"] is None else float(values["loss"]),
                tokens=int(values["tokens"]),
                targets=int(values["targets"]),
                seconds=float(values["seconds"]),
                skipped=int(values["skipped"]),
                micro_batch=None if micro is None else (int(micro[0]), int(micro[1])),
                pending=bool(values["pending"]),
                last=_measured(values["last"]),
                kept=_measured(values["kept"]),
                kept_values=kept_values,
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            what = f"the checkpoint's state is not complete: {error!r}"
            raise ModelError(what, fix="go on from another one") from error


def _measured(said: Mapping[str, Any] | None) -> Measured | None:
    return Measured(int(said["step"]), EvalResult.read(said["result"])) if said is not None else None
