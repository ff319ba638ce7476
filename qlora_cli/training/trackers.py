"""Experiment trackers: the figures of metrics.jsonl, also where TensorBoard, Weights & Biases and MLflow show them.

Knows accelerate's tracker classes, which need its state (`Ranks` makes it), and plain values; its caller leaves the
secrets out. Invariant: no tracker ends a run: one that fails is told, once, and left out from then on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

from qlora_cli.errors import MachineError
from qlora_cli.files import write_json

PROJECT, IDS = "qlora", "ids.json"
PREFIXES: Mapping[str, str] = {"step": "train"}
"""Under what the figures of a kind of line of metrics.jsonl are shown, where not under the kind."""
SECONDS = 60
"""How long the end of a run waits for a network."""
MLFLOW_DEFAULTS: Mapping[str, str] = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is away does not hold the training up for long
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # figures go where the user sends them, and nothing elsewhere
}
End = Literal["finished", "failed", "interrupted"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Beginning:
    """What a tracker begins with: its folder, the run's name, how many steps are done, and the settings to record."""

    folder: Path
    run: str
    done: int
    config: Mapping[str, str | int | float | bool]


class Tracker(Protocol):
    """A tracker at work. `id` names its run, for when that goes on."""

    id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values, by their whole names."""

    def end(self, how: End) -> None:
        """Nothing follows."""


class _TensorBoard:
    """Event files in FOLDER/tensorboard. Those of steps that are done anew are purged."""

    id = ""

    def __init__(self, beginning: Beginning, _: str) -> None:
        # Its files are read in the order of their names, which begin with the second they were made in.
        while any((beginning.folder / "tensorboard").glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        self._tracker = TensorBoardTracker("tensorboard", beginning.folder, purge_step=beginning.done + 1)
        self._tracker.start()
        if not beginning.done:  # accelerate would make a run of its own of them
            self._tracker.tracker.add_hparams(dict(beginning.config), {}, run_name=".")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._tracker.log(dict(values), step=step)

    def end(self, how: End) -> None:
        self._tracker.finish()


class _WandB:
    """A run under an id that is kept; its own environment says how and where (WANDB_MODE, WANDB_PROJECT, ...)."""

    def __init__(self, beginning: Beginning, known: str) -> None:
        import wandb

        self.id = known or uuid.uuid4().hex[:8]
        quiet = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
        settings = wandb.Settings(**quiet, finish_timeout=SECONDS)
        project = None if "WANDB_PROJECT" in os.environ else PROJECT
        folder = None if "WANDB_DIR" in os.environ else str(beginning.folder)
        place = {"dir": folder, "name": beginning.run, "id": self.id, "resume": "allow", "settings": settings}
        self._tracker = WandBTracker(project, **place)
        self._tracker.start()
        self._tracker.store_init_configuration(dict(beginning.config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._tracker.log(dict(values), step=step)

    def end(self, how: End) -> None:
        self._tracker.tracker.finish(exit_code=0 if how == "finished" else 1)


class _MLflow:
    """A run on the server of MLFLOW_TRACKING_URI, else in a database in FOLDER. It keeps all that it was ever given, so
    steps that are done anew are not given again."""

    def __init__(self, beginning: Beginning, known: str) -> None:
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        folder = beginning.folder.absolute()
        self._local = "MLFLOW_TRACKING_URI" not in os.environ
        if self._local:
            folder.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        files = str(folder / "mlflow") if self._local else None
        self._tracker = MLflowTracker(PROJECT, logging_dir=files, run_id=known or None, run_name=beginning.run)
        self._tracker.start()
        self.id = self._tracker.tracker.info.run_id
        self._given = self._given_before() if known else {}
        if not known:  # what was recorded once cannot be changed there
            self._tracker.store_init_configuration(dict(beginning.config))

    def _given_before(self) -> dict[str, int]:
        import mlflow

        client = mlflow.MlflowClient()
        names = client.get_run(self.id).data.metrics
        return {name: max(each.step for each in client.get_metric_history(self.id, name)) for name in names}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        new = {name: value for name, value in values.items() if step > self._given.get(name, -1)}
        if new:
            self._tracker.log(new, step=step)

    def end(self, how: End) -> None:
        import mlflow

        mlflow.end_run({"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[how])
        if self._local:
            mlflow.set_tracking_uri(None)  # which it had put into the environment


KINDS: Mapping[str, Callable[[Beginning, str], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises `MachineError` unless each can be used: its package is there, and wandb's user logged in or offline."""
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        fix = f"pip install 'qlora-cli[{','.join(missing)}]', or leave it out of log.to"
        raise MachineError(f"log.to names {' and '.join(missing)}, which is not installed", fix=fix)
    if "wandb" in names and not _is_logged_in():
        why = "without an API key its figures have nowhere to go"
        fix = "wandb login, or set WANDB_MODE=offline to keep them in the run directory"
        raise MachineError("log.to names wandb, but nobody is logged in there", why, fix)


def _is_installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # a folder of that name, as both write one, is no package


def _is_logged_in() -> bool:
    import wandb

    found = wandb.setup(wandb.Settings(silent=True)).settings
    return found.mode != "online" or bool(wandb.login(prompt=False, verify=False))


class Trackers:
    """The trackers `names` of one run. `tell` is given a line of text for each that fails."""

    def __init__(self, names: Sequence[str], beginning: Beginning, tell: Callable[[str], None]) -> None:
        self._names, self._beginning, self._tell = names, beginning, tell
        self._at_work: dict[str, Tracker] = {}

    def __enter__(self) -> Trackers:
        self._hook = threading.excepthook
        threading.excepthook = self._without_writers
        for name in self._names:
            started = self._try(name, partial(self._start, name))
            if started is not None:
                self._at_work[name] = started
        return self

    def _start(self, name: str) -> Tracker:
        ids = self._ids()
        started = KINDS[name](self._beginning, ids.get(name, "") if self._beginning.done else "")
        if started.id != ids.get(name, ""):
            write_json(self._beginning.folder / IDS, ids | {name: started.id})
        return started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed: End = "failed" if kind is not None and issubclass(kind, Exception) else "interrupted"
        for name, tracker in list(self._at_work.items()):
            self._try(name, partial(tracker.end, failed if kind else "finished"))
        threading.excepthook = self._hook

    def _without_writers(self, error: threading.ExceptHookArgs) -> None:
        """No traceback of TensorBoard's writing thread, whose error is raised again where `log` waits for it."""
        if error.thread is None or not type(error.thread).__module__.startswith("tensorboard."):
            self._hook(error)

    def log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """What a line of metrics.jsonl says after `step` steps; of its values those that are numbers."""
        prefix = PREFIXES.get(kind, kind)
        numbers = {f"{prefix}/{name}": value for name, value in flat(values, "/") if _is_number(value)}
        numbers = {name: value for name, value in numbers.items() if name not in {f"{prefix}/step", f"{prefix}/total"}}
        for name, tracker in list(self._at_work.items()):
            self._try(name, partial(tracker.log, step, numbers))

    def _try(self, name: str, work: Callable[[], Result]) -> Result | None:
        """What it returns, its chatter left out; None where the tracker failed, which is left out from now on."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return work()
        except Exception as error:  # another's code, network and disk: whatever it is, the training does not need it
            self._at_work.pop(name, None)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            self._tell(f"log.to: {name} failed and is left out from here on, the run goes on ({said})")
            return None

    def _ids(self) -> dict[str, str]:
        try:
            found = json.loads((self._beginning.folder / IDS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(name): str(each) for name, each in found.items()} if isinstance(found, dict) else {}


def flat(values: Mapping[str, Any], between: str) -> Iterator[tuple[str, Any]]:
    """The values of a tree, their names joined."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}{between}{rest}", inner) for rest, inner in flat(value, between))
        else:
            yield name, value


def settings(values: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The values of a tree by dotted names, such as a tracker can record."""
    simple = (str, int, float, bool)
    return {name: each if isinstance(each, simple) else json.dumps(each) for name, each in flat(values, ".")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
