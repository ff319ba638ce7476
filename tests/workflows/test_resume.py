"""A run that was ended goes on as if it had not been, bit for bit; what differs is refused, or said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli.app import main
from qlora_cli.workflows.runlock import RunLock
from tests.conftest import RECIPE, chat_rows, make_llama, write_jsonl

Recipe = Callable[..., Path]
STEPS = 6
SAVING = ("-s", "save.every=1", "-s", "save.keep_last=99")


def train(recipe: Path, run: Path, *flags: str) -> int:
    """Exit code of `qlora train`."""
    return main(["train", str(recipe), "-o", str(run), "-q", *flags])


def metrics(run: Path) -> list[tuple[Any, ...]]:
    """What of metrics.jsonl does not depend on the clock or the machine."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    keys = ("kind", "step", "loss", "lr", "grad_norm", "rows", "tokens", "best")
    return [tuple(line.get(key) for key in keys) for line in lines]


def learned(run: Path) -> tuple[bytes, bytes, list[tuple[Any, ...]]]:
    """Adapter, last optimizer state and losses."""
    last = max((run / "checkpoints").glob("step-??????"))
    return (
        (run / "adapter/adapter_model.safetensors").read_bytes(),
        (last / "optimizer.safetensors").read_bytes(),
        metrics(run),
    )


def cut(run: Path, step: int, target: Path) -> Path:
    """The run as if it had been killed right after that checkpoint."""
    shutil.copytree(run, target)
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(target / "adapter", ignore_errors=True)
    status = json.loads((target / "status.json").read_text())
    (target / "status.json").write_text(json.dumps(status | {"state": "running", "step": step}))
    return target


def half(recipe_file: Recipe, tmp_path: Path) -> tuple[Path, Path]:
    """(a recipe, a run of it that was killed after its third step); the whole run is beside it."""
    recipe = recipe_file()
    assert train(recipe, tmp_path / "whole", *SAVING) == 0
    return recipe, cut(tmp_path / "whole", 3, tmp_path / "run")


def contents(run: Path) -> dict[Path, bytes]:
    """Of every file."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


CASES: dict[str, tuple[str, ...]] = {
    "packed, dropout": ("-s", "lora.dropout=0.1", "-s", "train.micro_batch_size=1"),
    "padded, 8-bit": ("-s", "train.packing=false", "-s", "train.optimizer=adamw_8bit", "-s", "lora.r=64"),
    "grouped, paged": (
        *("-s", "train.packing=false", "-s", "train.group_by_length=true"),
        *("-s", "train.optimizer=paged_adamw_32bit", "-s", "lora.dropout=0.1"),
    ),
    "best kept": (
        "-s",
        "eval.every=1",
        "-s",
        "eval.keep_best=true",
        "-s",
        "data.eval_split=null",
        "-s",
        "train.lr=0.1",
    ),
    "patience": ("-s", "eval.every=1", "-s", "eval.patience=2", "-s", "train.lr=0.3", "-s", "train.steps=30"),
    "16 bits, epochs": ("-s", "lora.dtype=compute", "-s", "train.steps=null", "-s", "train.epochs=1.3"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumed_at_any_step_ends_as_the_one_that_never_stopped(
    recipe_file: Recipe, tmp_path: Path, name: str
) -> None:
    recipe, flags = recipe_file(), [*SAVING, *CASES[name]]
    if name == "best kept":  # what is held out becomes less and less likely with what is learned
        asked = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "zzzzzzzz"}]}]
        flags += ["-s", f"data.eval={write_jsonl(tmp_path / 'eval.jsonl', asked)}"]
    assert train(recipe, tmp_path / "whole", *flags) == 0
    whole = learned(tmp_path / "whole")
    saved = sorted(int(path.name[-6:]) for path in (tmp_path / "whole/checkpoints").iterdir())
    assert saved == list(range(1, saved[-1] + 1)) and len(saved) >= 4
    kept = json.loads((tmp_path / f"whole/checkpoints/step-{saved[-1]:06}/state.json").read_text())["kept"]
    assert (kept["step"] < saved[-1] - 1) if name == "best kept" else kept is None
    for step in (1, saved[len(saved) // 2], saved[-1]):
        run = cut(tmp_path / "whole", step, tmp_path / f"from-{step}")
        assert main(["train", str(run), "--resume", "-q"]) == 0
        assert learned(run) == whole


def test_full_fine_tuning_goes_on_too(recipe_file: Recipe, tmp_path: Path) -> None:
    text = RECIPE.replace("lora: {{r: 4, alpha: 8}}", "lora: null").replace(
        "compute_dtype: float32", "compute_dtype: float32, type: none"
    )
    recipe = recipe_file(text)
    assert train(recipe, tmp_path / "whole", *SAVING) == 0
    run = cut(tmp_path / "whole", 3, tmp_path / "run")
    shutil.rmtree(run / "model")
    assert main(["train", str(run), "--resume", "-q"]) == 0
    name = "model/model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_has_nothing_left_to_do(recipe_file: Recipe, tmp_path: Path, capsys: Any) -> None:
    recipe, run = recipe_file(), tmp_path / "run"
    assert train(recipe, run) == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    capsys.readouterr()
    assert train(recipe, run, "--resume") == 0
    assert capsys.readouterr().out == f"{run / 'adapter'}\n"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before


def test_a_finished_run_whose_adapter_was_damaged_writes_it_again(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe, run = recipe_file(), tmp_path / "run"
    assert train(recipe, run) == 0
    adapter = run / "adapter/adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert train(recipe, run, "--resume") == 0
    assert adapter.read_bytes() == whole


def test_a_directory_without_a_run_starts_one(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe = recipe_file()
    assert train(recipe, tmp_path / "run", "--resume") == 0
    assert train(recipe, tmp_path / "other") == 0
    assert learned(tmp_path / "run") == learned(tmp_path / "other")


def test_a_run_killed_before_its_first_checkpoint_starts_at_its_beginning(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe, run = recipe_file(), tmp_path / "run"
    assert train(recipe, run) == 0
    whole = learned(run)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "running"}))
    shutil.rmtree(run / "checkpoints")
    assert train(recipe, run, "--resume") == 0
    assert learned(run) == whole


def test_broken_checkpoints_are_named_and_passed_over(recipe_file: Recipe, tmp_path: Path, capsys: Any) -> None:
    recipe = recipe_file()
    assert train(recipe, tmp_path / "whole", *SAVING) == 0
    run = cut(tmp_path / "whole", 4, tmp_path / "run")
    (run / "checkpoints/step-000004/optimizer.safetensors").write_bytes(b"half")
    capsys.readouterr()
    assert main(["train", str(run), "--resume"]) == 0
    said = capsys.readouterr().err
    assert "step-000004 is broken and passed over: optimizer.safetensors has 4 bytes" in said
    assert f"going on after step 3, from {run / 'checkpoints/step-000003'}" in said
    assert learned(run) == learned(tmp_path / "whole")
    assert (run / "checkpoints/step-000004.broken").is_dir()


def test_with_all_checkpoints_broken_the_run_is_left_as_it_is(recipe_file: Recipe, tmp_path: Path, capsys: Any) -> None:
    recipe = recipe_file()
    assert train(recipe, tmp_path / "whole", *SAVING) == 0
    run = cut(tmp_path / "whole", 1, tmp_path / "run")
    (run / "checkpoints/step-000001/state.json").unlink()
    before = (run / "status.json").read_bytes()
    capsys.readouterr()
    assert main(["train", str(run), "--resume", "-q"]) == 5
    error = capsys.readouterr().err
    assert "no checkpoint in" in error and "state.json is missing" in error
    assert (run / "status.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("train.lr=1e-3",), 3, "train.lr was 0.01, and is 0.001"),
        (("train.seed=1", "lora.dropout=0.5"), 3, "lora.dropout was 0.0, and is 0.5"),
        (("data.max_length=32",), 3, "data.max_length was 64, and is 32"),
    ],
)
def test_what_differs_is_listed_and_refused_and_nothing_changes(
    recipe_file: Recipe, tmp_path: Path, capsys: Any, flags: tuple[str, ...], code: int, said: str
) -> None:
    recipe, run = half(recipe_file, tmp_path)
    before = contents(run)
    capsys.readouterr()
    overrides = [word for flag in flags for word in ("-s", flag)]
    assert train(recipe, run, "--resume", *SAVING, *overrides) == code
    error = capsys.readouterr().err
    assert said in error and f"--allow-change {flags[-1].split('=')[0]}" in error
    assert error.count("error: ") == len(flags)
    (run / ".lock").write_bytes(before[run / ".lock"])
    assert contents(run) == before


def test_other_rows_and_another_base_are_refused_by_what_they_are(
    recipe_file: Recipe, tmp_path: Path, base: Path, capsys: Any
) -> None:
    own = Path(shutil.copytree(base, tmp_path / "base"))
    recipe = recipe_file(RECIPE.replace("{base}", str(own)))
    assert train(recipe, tmp_path / "run", *SAVING) == 0
    run = cut(tmp_path / "run", 3, tmp_path / "again")
    rows = tmp_path / "rows.jsonl"
    before = rows.read_text()
    write_jsonl(rows, chat_rows(25))
    assert train(recipe, run, "--resume", *SAVING) == 4
    assert "data_sha256." in capsys.readouterr().err
    rows.write_text(before)
    make_llama(seed=5).save_pretrained(own)
    assert train(recipe, run, "--resume", *SAVING) == 5
    assert "base_sha256.model.safetensors was" in capsys.readouterr().err
    assert train(recipe, run, "--resume", *SAVING, "--allow-change", "base_sha256") == 0


def test_other_versions_are_refused_unless_allowed_and_that_is_recorded(
    recipe_file: Recipe, tmp_path: Path, capsys: Any
) -> None:
    recipe, run = half(recipe_file, tmp_path)
    lock = json.loads((run / "lock.json").read_text())
    now = lock["versions"]["torch"]
    lock["versions"]["torch"] = "2.0"
    (run / "lock.json").write_text(json.dumps(lock))
    capsys.readouterr()
    assert train(recipe, run, "--resume", *SAVING) == 6
    assert 'versions.torch was "2.0"' in capsys.readouterr().err
    assert train(recipe, run, "--resume", *SAVING, "--allow-change", "versions") == 0
    said = json.loads((run / "resumes.jsonl").read_text())
    assert (said["step"], said["checkpoint"]) == (3, "step-000003")
    assert said["changes"] == [{"key": "versions.torch", "before": "2.0", "now": now}]
    assert json.loads((run / "lock.json").read_text())["versions"]["torch"] == now


def test_a_key_that_is_none_cannot_be_allowed(recipe_file: Recipe, tmp_path: Path, capsys: Any) -> None:
    recipe = recipe_file()
    assert train(recipe, tmp_path / "run", *SAVING) == 0
    capsys.readouterr()
    assert train(recipe, tmp_path / "run", "--resume", "--allow-change", "train.learning") == 3
    assert "--allow-change train.learning: no key of a recipe" in capsys.readouterr().err
    assert train(recipe, tmp_path / "run", "--allow-change", "train.lr") == 2


def test_more_steps_go_on_at_a_constant_rate_as_if_they_had_been_meant(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe, flags = recipe_file(), (*SAVING, "-s", "train.schedule=constant")
    assert train(recipe, tmp_path / "short", *flags) == 0
    assert train(recipe, tmp_path / "short", *flags, "-s", "train.steps=9", "--resume") == 0
    assert train(recipe, tmp_path / "long", *flags, "-s", "train.steps=9") == 0
    kept = [line for line in metrics(tmp_path / "short") if line[:2] != ("eval", STEPS)]
    assert kept == metrics(tmp_path / "long")
    assert learned(tmp_path / "short")[:2] == learned(tmp_path / "long")[:2]


def test_more_steps_after_a_schedule_that_ended_at_0_are_refused_and_fewer_than_done_too(
    recipe_file: Recipe, tmp_path: Path, capsys: Any
) -> None:
    recipe, run = recipe_file(), tmp_path / "run"
    assert train(recipe, run, *SAVING) == 0
    capsys.readouterr()
    assert train(recipe, run, "--resume", "-s", "train.steps=9") == 3
    assert "its learning rate had fallen to 0 there (cosine schedule)" in capsys.readouterr().err
    assert train(recipe, run, "--resume", "-s", "train.steps=5") == 3
    assert "is to have 5 steps, but its checkpoint has done 6" in capsys.readouterr().err


def test_more_steps_on_the_way_let_the_rate_fall_on_from_where_it_is(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe = recipe_file()
    assert train(recipe, tmp_path / "whole", *SAVING, "-s", "train.schedule=linear") == 0
    run = cut(tmp_path / "whole", 3, tmp_path / "run")
    assert train(recipe, run, *SAVING, "-s", "train.schedule=linear", "-s", "train.steps=8", "--resume") == 0
    rates = [line[3] for line in metrics(run) if line[0] == "step"]
    assert rates == pytest.approx([0.01, 0.01 * 5 / 6, 0.01 * 4 / 6, *(0.005 * left / 5 for left in (5, 4, 3, 2, 1))])
    again = cut(run, 5, tmp_path / "again")
    assert main(["train", str(again), "--resume", "-q"]) == 0
    assert learned(again) == learned(run)


def stopped(run: Path, number: int, when: Callable[[], bool]) -> threading.Thread:
    """A thread that sends this process a signal as soon as `when` holds."""

    def watch() -> None:
        until = time.monotonic() + 60
        while not when() and time.monotonic() < until:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_run_after_its_step_saved_and_it_goes_on(
    recipe_file: Recipe, tmp_path: Path, capsys: Any, name: str, code: int
) -> None:
    recipe, flags = recipe_file(), ("-s", "train.steps=40", "-s", "lora.dropout=0.1", "-s", "save.every=2")
    assert train(recipe, tmp_path / "whole", *flags) == 0
    run = tmp_path / "run"
    watcher = stopped(run, getattr(signal, name), (run / "checkpoints/step-000004").is_dir)
    capsys.readouterr()
    ended = main(["train", str(recipe), "-o", str(run), *flags])
    watcher.join()
    assert ended == code
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("interrupted", f"interrupted by {name}")
    newest = max((run / "checkpoints").glob("step-??????"))
    assert int(newest.name[-6:]) == status["step"] == metrics(run)[-1][1] < 40
    assert f"go on with: qlora train {run} --resume" in capsys.readouterr().err
    assert main(["train", str(run), "--resume", "-q"]) == 0
    assert learned(run) == learned(tmp_path / "whole")


def test_a_signal_in_an_evaluation_leaves_it_to_the_run_that_goes_on(recipe_file: Recipe, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "eval.jsonl", chat_rows(600)[100:])
    recipe, run = recipe_file(), tmp_path / "run"
    values = (f"data.eval={rows}", "data.eval_split=null", "eval.every=2", "eval.batch_size=1", "eval.keep_best=true")
    flags = [word for value in values for word in ("-s", value)]
    assert train(recipe, tmp_path / "whole", *flags) == 0

    def evaluating() -> bool:
        log = run / "train.log"
        return log.is_file() and log.read_text().rstrip().endswith("held-out rows ...")

    watcher = stopped(run, signal.SIGTERM, evaluating)
    assert train(recipe, run, *flags) == 143
    watcher.join()
    newest = max((run / "checkpoints").glob("step-??????"))
    assert json.loads((newest / "state.json").read_text())["pending"] is True
    assert main(["train", str(run), "--resume", "-q"]) == 0
    assert learned(run) == learned(tmp_path / "whole")


def test_a_signal_that_asks_for_a_checkpoint_gets_one_and_the_run_goes_on(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe, run = recipe_file(), tmp_path / "run"

    def begun() -> bool:
        return (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size > 0

    watcher = stopped(run, signal.SIGUSR1, begun)
    assert train(recipe, run, "-s", "train.steps=30", "-s", "save.minutes=null", "-s", "log.every=1") == 0
    watcher.join()
    saved = [path.name for path in (run / "checkpoints").iterdir()]
    assert len(saved) == 1 and "step-000001" <= saved[0] < "step-000030"


def test_a_run_that_another_process_works_in_is_not_resumed(recipe_file: Recipe, tmp_path: Path, capsys: Any) -> None:
    recipe, run = recipe_file(), tmp_path / "run"
    assert train(recipe, run) == 0
    lock = RunLock(run)
    capsys.readouterr()
    assert train(recipe, run, "--resume") == 10
    assert f"in use by process {os.getpid()} on" in capsys.readouterr().err
    lock.release()


def test_a_dry_run_says_where_the_run_would_go_on_and_changes_nothing(
    recipe_file: Recipe, tmp_path: Path, capsys: Any
) -> None:
    _, run = half(recipe_file, tmp_path)
    before = contents(run)
    capsys.readouterr()
    assert main(["train", str(run), "--resume", "--dry-run"]) == 0
    assert "note: the run would go on after step 3" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.parametrize("name", ["resolved.yaml", "lock.json"])
def test_checkpoints_of_a_run_that_nothing_describes_are_left_alone(
    recipe_file: Recipe, tmp_path: Path, capsys: Any, name: str
) -> None:
    recipe, run = half(recipe_file, tmp_path)
    (run / name).unlink()
    before = contents(run)
    capsys.readouterr()
    assert train(recipe, run, "--resume", *SAVING) == 5
    assert "has checkpoints, but not resolved.yaml and lock.json" in capsys.readouterr().err
    assert contents(run).keys() == before.keys()
