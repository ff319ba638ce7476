"""`--push`: a finished folder goes to the Hub.

Knows events. Invariant: nothing is uploaded that was not written whole under its final name.
"""

from __future__ import annotations

from pathlib import Path

from qlora_cli.export.push import check_push, push
from qlora_cli.workflows.events import Emit, Fact, Stage

__all__ = ["check_push", "upload"]


def upload(folder: Path, repository: str, public: bool, emit: Emit) -> None:
    """Uploads `folder` and says where it is."""
    emit(Stage(f"uploading {folder} to {repository}"))
    emit(Fact("hub", push(folder, repository, public)))
