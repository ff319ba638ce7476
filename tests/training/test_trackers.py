"""Trackers show what metrics.jsonl holds, once, without secrets, and never end a run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from qlora_cli.cli.app import main
from qlora_cli.errors import MachineError
from qlora_cli.model.ranks import Ranks
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import LogSection
from qlora_cli.training.trackers import KINDS, Beginning, Trackers, check_trackers, settings
from qlora_cli.workflows.events import Event, Notice, Progress
from qlora_cli.workflows.rundir import RunDirectory
from qlora_cli.workflows.tracking import trackers_of
from qlora_cli.workflows.train import run_train
from tests.conftest import RECIPE

Recipe = Callable[..., Path]
Series = dict[str, list[tuple[int, float]]]
HERE = [name for name in KINDS if importlib.util.find_spec(name)]
SAVING = ("-s", "save.every=1", "-s", "save.keep_last=99")
TEXT = RECIPE + "eval: {{every: 3}}\n"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's settings, and no network."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))


def train(recipe: Path, run: Path, *flags: str) -> int:
    """Exit code of `qlora train`."""
    return main(["train", str(recipe), "-o", str(run), "-q", *flags])


def to(*names: str) -> tuple[str, str]:
    """The flags that name trackers."""
    return "-s", f"log.to=[{', '.join(names)}]"


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def expected(run: Path) -> Series:
    """What metrics.jsonl holds, as a tracker names it."""
    series: Series = {}
    for line in lines(run):
        prefix = {"step": "train", "eval": "eval"}[line["kind"]]
        for name, value in line.items():
            if type(value) in (int, float) and name not in {"step", "total"}:
                series.setdefault(f"{prefix}/{name}", []).append((line["step"], value))
    assert {"train/loss", "train/lr", "train/grad_norm", "train/memory_bytes", "eval/loss"} <= set(series)
    assert [step for step, _ in series["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in series["eval/loss"]] == [3, 6]
    return series


def single(series: Series) -> Series:
    """Every value as float32 holds it, which is all that TensorBoard keeps."""
    return {n: [(step, struct.unpack("f", struct.pack("f", v))[0]) for step, v in s] for n, s in series.items()}


def accumulated(run: Path) -> EventAccumulator:
    """TensorBoard's own view of a run."""
    view = EventAccumulator(str(run / "trackers/tensorboard"))
    view.Reload()
    return view


def shown(run: Path) -> Series:
    """Every scalar that TensorBoard shows, but for the speed, which metrics.jsonl has as tokens and seconds."""
    view = accumulated(run)
    series = {name: [(e.step, e.value) for e in view.Scalars(name)] for name in view.Tags()["scalars"]}
    speed = series.pop("train/tokens_per_second")
    steps = [line for line in lines(run) if line["kind"] == "step"]
    assert speed == [(s["step"], pytest.approx(s["tokens"] / s["seconds"], rel=1e-6)) for s in steps]
    return series


def cut(run: Path, step: int, target: Path) -> Path:
    """The run as if it had been killed at its last step, with no whole checkpoint but that one."""
    shutil.copytree(run, target, symlinks=True)
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) != step:
            shutil.rmtree(folder)
    shutil.rmtree(target / "adapter")
    status = json.loads((target / "status.json").read_text())
    (target / "status.json").write_text(json.dumps(status | {"state": "running", "step": step}))
    return target


def test_every_tracker_of_the_recipe_is_one_that_can_be_started() -> None:
    assert get_args(get_args(LogSection.model_fields["to"].annotation)[0]) == tuple(KINDS)
    assert "tensorboard" in HERE


def test_tensorboard_shows_what_metrics_jsonl_holds_and_the_settings(
    recipe_file: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(recipe_file(TEXT), run, *to("tensorboard")) == 0
    assert capfd.readouterr().out == f"{run / 'adapter'}\n"
    assert shown(run) == single(expected(run))
    view = accumulated(run)
    content = view.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["train.lr"].number_value == 0.01
    assert found["quantization.type"].string_value == "nf4"
    assert found["log.to"].string_value == '["tensorboard"]'


def test_a_run_without_trackers_writes_none(recipe_file: Recipe, tmp_path: Path) -> None:
    assert train(recipe_file(TEXT), tmp_path / "run") == 0
    assert not (tmp_path / "run/trackers").exists()


def test_a_resumed_run_shows_every_step_once_in_tensorboard(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe, whole = recipe_file(TEXT), tmp_path / "whole"
    assert train(recipe, whole, *SAVING, *to("tensorboard")) == 0
    run = cut(whole, 2, tmp_path / "run")
    events = max((run / "trackers/tensorboard").iterdir(), key=lambda file: file.stat().st_size)
    events.write_bytes(events.read_bytes()[:-9])  # the process was killed in the middle of a record
    assert [step for step, _ in shown_steps(run)] == [1, 2, 3, 4, 5, 6]
    assert main(["train", str(run), "--resume", "-q"]) == 0
    assert lines(run) != lines(whole), "their times differ, so the values tell which leg they are of"
    assert shown(run) == single(expected(run))


def shown_steps(run: Path) -> list[tuple[int, float]]:
    """The losses that TensorBoard shows."""
    return [(each.step, each.value) for each in accumulated(run).Scalars("train/loss")]


def test_a_tracker_may_be_added_when_a_run_goes_on(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe, whole = recipe_file(TEXT), tmp_path / "whole"
    assert train(recipe, whole, *SAVING) == 0
    run = cut(whole, 4, tmp_path / "run")
    assert train(recipe, run, *SAVING, "--resume", *to("tensorboard")) == 0
    assert [step for step, _ in shown_steps(run)] == [5, 6]


@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"]])
def test_a_missing_package_is_told_before_anything_is_read(
    recipe_file: Recipe,
    tmp_path: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else there(name, *rest)
    )
    run, recipe = tmp_path / "run", recipe_file()
    assert main([*command, str(recipe), "-o", str(run), *to("tensorboard", "wandb")]) == 6
    said = capsys.readouterr().err
    assert "error: log.to names wandb, which is not installed" in said
    assert "fix: pip install 'qlora-cli[wandb]'" in said
    assert "reading" not in said
    assert not run.exists()


@pytest.mark.skipif("wandb" in HERE, reason="wandb is installed")
def test_a_folder_that_a_tracker_wrote_is_not_taken_for_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(MachineError, match="not installed"):
        check_trackers(["wandb"])


def replaced_by_a_file(folder: Path) -> None:
    """No file can be made in the folder any more."""
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def full_disk(folder: Path) -> None:
    """Whatever is written to the folder's files finds no space."""
    for file in list(folder.iterdir()):
        file.unlink()
        file.symlink_to("/dev/full")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("break_it", [replaced_by_a_file, full_disk])
def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(
    recipe_file: Recipe, tmp_path: Path, break_it: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    if break_it is full_disk and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    run, told = tmp_path / "run", list[str]()

    def emit(event: Event) -> None:
        if isinstance(event, Notice):
            told.append(event.text)
        if isinstance(event, Progress) and event.report.step == 2:
            break_it(run / "trackers/tensorboard")

    flags = [f for f in to("tensorboard") if f != "-s"]
    result = run_train(load_recipe(recipe_file(TEXT), flags), run, emit)
    assert result.steps == 6
    assert len(lines(run)) == 8
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    [failure] = [text for text in told if "log.to" in text]
    assert failure.startswith("log.to: tensorboard failed and is left out from here on")
    assert (run / "train.log").read_text().count("left out from here on") == 1
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_tracker_that_cannot_start_is_left_out(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe, whole = recipe_file(TEXT), tmp_path / "whole"
    assert train(recipe, whole, *SAVING) == 0
    run = cut(whole, 4, tmp_path / "run")
    (run / "trackers").write_text("not a folder")
    assert train(recipe, run, "--resume", *SAVING, *to(*HERE)) == 0
    assert (run / "train.log").read_text().count("failed and is left out from here on") == len(HERE)
    adapters = [(each / "adapter/adapter_model.safetensors").read_bytes() for each in (whole, run)]
    assert adapters[0] == adapters[1]


def test_no_secret_is_in_any_file_of_a_run(
    recipe_file: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"HF_TOKEN": "hf_" + "aB3" * 11, "WANDB_API_KEY": "0a1b2c3d" * 5, "MY_PASSWORD": "correct-horse-9"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    loaded = load_recipe(recipe_file(TEXT), [to(*HERE)[1]])
    recipe = loaded.recipe  # a recipe that holds a secret is refused, so this one is made past the reader
    url = "https://someone:swordfish-7@example.org/rows.jsonl"
    recipe = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"train": url}),
            "model": recipe.model.model_copy(update={"base": f"hub/{secrets['HF_TOKEN']}"}),
            "output": f"out-{secrets['MY_PASSWORD']}",
        }
    )
    Ranks(torch.device("cpu"))
    directory = RunDirectory(tmp_path / "run", writes=True)
    told: list[Event] = []
    with trackers_of(recipe, directory, 0, told.append) as trackers:
        trackers.log(1, "step", {"loss": 0.5})
    directory.close()
    assert told == []
    files = [file for file in (tmp_path / "run/trackers").rglob("*") if file.is_file()]
    content = b"".join(file.read_bytes() for file in files)
    assert b"[secret]" in content and b"example.org" in content
    assert [each for each in (*secrets.values(), "swordfish-7") if each.encode() in content] == []
    assert [each for each in secrets.values() if any(each in str(file) for file in files)] == []


def test_a_process_that_does_not_write_has_no_tracker(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(TEXT), [to("tensorboard")[1]]).recipe
    with trackers_of(recipe, RunDirectory(tmp_path / "run", writes=False), 0, lambda event: None) as trackers:
        trackers.log(1, "step", {"loss": 0.5})
    assert not (tmp_path / "run").exists()


def test_values_of_a_tree_are_shown_by_their_whole_names_and_only_numbers_are(tmp_path: Path) -> None:
    Ranks(torch.device("cpu"))
    told: list[str] = []
    with Trackers(("tensorboard",), Beginning(tmp_path / "trackers", "run", 0, {}), told.append) as trackers:
        values = {"step": 3, "loss": 2.0, "best": True, "text": "t", "none": None, "list": [1.0]}
        trackers.log(3, "eval", values | {"scores": {"exact": {"rate": 0.25}, "contains": 1}})
    assert told == []
    view = accumulated(tmp_path)
    found = {name: [(e.step, e.value) for e in view.Scalars(name)] for name in view.Tags()["scalars"]}
    wanted = {"eval/loss": 2.0, "eval/scores/exact/rate": 0.25, "eval/scores/contains": 1.0}
    assert found == {name: [(3, value)] for name, value in wanted.items()}


def test_settings_are_plain_values_by_dotted_names() -> None:
    tree = {"a": {"b": 1, "c": None}, "d": [1, "x"], "e": "text", "f": True}
    assert settings(tree) == {"a.b": 1, "a.c": "null", "d": '[1, "x"]', "e": "text", "f": True}


def mlflow_run(run: Path) -> tuple[Any, Series]:
    """The run that MLflow keeps, and its figures in the order they were given."""
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{run / 'trackers/mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'qlora'")
    [found] = client.search_runs([experiment.experiment_id])
    names = set(found.data.metrics) - {"train/tokens_per_second"}
    return found, {n: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, n)] for n in names}


def test_mlflow_keeps_what_metrics_jsonl_holds_also_of_a_run_that_goes_on(recipe_file: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    recipe, whole = recipe_file(TEXT), tmp_path / "whole"
    assert train(recipe, whole, *SAVING, *to("mlflow")) == 0
    found, series = mlflow_run(whole)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "whole")
    assert found.data.params["train.lr"] == "0.01"
    assert series == expected(whole)
    run = cut(whole, 2, tmp_path / "run")
    assert train(recipe, run, *SAVING, "--resume", *to("mlflow")) == 0
    again, shown_again = mlflow_run(run)
    assert again.info.run_id == found.info.run_id
    assert shown_again == series, "what it was given before the run was killed stays, and nothing is there twice"


def test_a_server_that_is_away_ends_no_run_and_its_password_is_told_nowhere(
    recipe_file: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:swordfish-7@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = tmp_path / "run"
    assert main(["train", str(recipe_file(TEXT)), "-o", str(run), *to("mlflow")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{run / 'adapter'}\n"
    assert captured.err.count("log.to: mlflow failed and is left out from here on") == 1
    assert "swordfish-7" not in captured.err
    assert [file for file in run.rglob("*") if file.is_file() and b"swordfish-7" in file.read_bytes()] == []


def test_mlflow_says_how_a_run_ended(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    Ranks(torch.device("cpu"))
    ends: dict[str, type[BaseException]] = {"FAILED": MemoryError, "KILLED": SystemExit}
    for state, error in ends.items():
        beginning = Beginning(tmp_path / state / "trackers", state, 0, {})
        with pytest.raises(error), Trackers(("mlflow",), beginning, pytest.fail):
            raise error
        assert mlflow_run(tmp_path / state)[0].info.status == state


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log, in blocks of 32 KiB, behind a header of 7 bytes."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield protocol.Record.FromString(parts)
            parts = b""


def wandb_leg(folder: Path) -> tuple[dict[str, Any], Series, int]:
    """(settings, figures, exit code) of one offline run."""
    [file] = folder.glob("*.wandb")
    config: dict[str, Any] = {}
    series: Series = {}
    code = -1
    for record in wandb_records(file):
        config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        if record.HasField("exit"):
            code = record.exit.exit_code
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name in row.keys() - {"train/tokens_per_second"}:
            if not name.startswith("_"):
                series.setdefault(name, []).append((row["_step"], row[name]))
    return config, series, code


def test_wandb_keeps_what_metrics_jsonl_holds_and_a_run_that_goes_on_has_its_id(
    recipe_file: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    recipe, whole = recipe_file(TEXT), tmp_path / "whole"
    assert train(recipe, whole, *SAVING, *to("wandb")) == 0
    assert capfd.readouterr().out == f"{whole / 'adapter'}\n"
    [leg] = (whole / "trackers/wandb").glob("offline-run-*")
    config, series, code = wandb_leg(leg)
    assert code == 0
    assert config["train.lr"] == 0.01
    assert series == expected(whole)
    run = cut(whole, 2, tmp_path / "run")
    known = json.loads((run / "trackers/ids.json").read_text())["wandb"]
    assert train(recipe, run, *SAVING, "--resume", *to("wandb")) == 0
    [second] = set((run / "trackers/wandb").glob(f"offline-run-*-{known}*")) - {run / "trackers/wandb" / leg.name}
    later = {name: [each for each in values if each[0] > 2] for name, values in expected(run).items()}
    assert wandb_leg(second)[1] == later


def test_wandb_without_a_login_is_told_before_anything_is_read(
    recipe_file: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    wandb.teardown()  # it reads its settings once
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert train(recipe_file(), tmp_path / "run", *to("wandb")) == 6
    wandb.teardown()
    said = capsys.readouterr().err
    assert "nobody is logged in" in said and "WANDB_MODE=offline" in said
    assert not (tmp_path / "run").exists()
