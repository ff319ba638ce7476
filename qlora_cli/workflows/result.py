"""What a finished run has come to.

Knows status.json and the folder of what was trained. Invariant: a run counts as finished only while that folder is as
it was written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.evaluation.perplexity import EvalResult
from qlora_cli.files import manifest_problems
from qlora_cli.workflows.events import finite
from qlora_cli.workflows.rundir import read_status


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
        held = self.held_out.as_json() if self.held_out else None
        values = {"run": str(self.run), "artifact": str(self.artifact), "steps": self.steps}
        return {"event": "result", **values, "train_loss": finite(self.train_loss), "held_out": held}


def finished(path: Path, total: int) -> TrainResult | None:
    """The result of a run of `total` steps that has finished and whose files are as they were written, else None."""
    said = read_status(path)
    try:
        if said["state"] != "finished" or said["total_steps"] != total:
            return None
        found, artifact = said["result"], path / Path(said["result"]["artifact"]).name
        held = EvalResult.read(found["held_out"]) if found["held_out"] else None
        loss = math.nan if found["train_loss"] is None else found["train_loss"]
        result = TrainResult(path, artifact, found["steps"], loss, held)
    except (KeyError, TypeError):
        return None
    return result if artifact.is_dir() and not manifest_problems(artifact) else None
