"""The trackers of a run, made from its recipe.

Sees the whole recipe. Invariant: what a tracker records of the recipe holds no secret, and only the process that
writes the run directory has any tracker.
"""

from __future__ import annotations

from qlora_cli.recipe.schema import Recipe
from qlora_cli.secrets import redacted
from qlora_cli.training.trackers import Beginning, Trackers, settings
from qlora_cli.workflows.events import Emit, Notice
from qlora_cli.workflows.rundir import RunDirectory

FOLDER = "trackers"


def trackers_of(recipe: Recipe, directory: RunDirectory, done: int, tell: Emit) -> Trackers:
    """The trackers of `log.to` for a run that has done so many steps."""
    path, config = directory.path.absolute(), settings(redacted(recipe.model_dump(mode="json")))
    names = recipe.log.to if directory.metrics_path else ()
    return Trackers(names, Beginning(path / FOLDER, path.name, done, config), lambda text: tell(Notice(text)))
