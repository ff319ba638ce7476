"""Checkpoints of the trained values while a run goes on.

Knows folders. Invariant: a folder `step-NNNNNN` under its final name is complete and was verified when it was written,
and an older one goes only after a newer one stands.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora_cli.files import disk_errors, write_json
from qlora_cli.model.trained import Beside, Trained


def save_checkpoint(folder: Path, step: int, trained: Trained, beside: Beside, keep_last: int) -> Path:
    """Writes `folder/step-NNNNNN/` and then removes all but the newest `keep_last`."""
    final = folder / f"step-{step:06d}"

    def with_state(staging: Path) -> None:
        beside(staging)
        write_json(staging / "state.json", {"step": step})

    trained.save(final, with_state)
    for old in sorted(folder.glob("step-*"), key=_step)[:-keep_last]:
        _remove(old)
    return final


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _remove(folder: Path) -> None:
    """Renames before deleting, so that a crash in between leaves no half checkpoint under a final name."""
    trash = folder.with_name(f".trash-{folder.name}")
    with disk_errors(folder):
        folder.rename(trash)
        shutil.rmtree(trash)
