"""`qlora show`: what it says of runs that are at work, over, dead or damaged."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file

from qlora_cli.cli.app import main
from qlora_cli.cli.show import show
from qlora_cli.errors import ModelError
from qlora_cli.files import write_manifest
from qlora_cli.workflows.show import ShowResult, run_show
from qlora_cli.workflows.show_text import show_text
from tests.conftest import write_jsonl

NOW = 1_700_000_000.0
Make = Callable[..., Path]


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": loss, "lr": 1e-3, "tokens": 500, "seconds": 2.0, **more}


METRICS = [step(1, 4.0), step(10, 1.0), {"kind": "eval", "step": 10, "loss": 1.5}, step(20, 2.0)]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes a run directory: status.json with the values given, metrics.jsonl, and a result."""

    def write(metrics: list[Any] = METRICS, result: bool = False, **status: Any) -> Path:
        run = tmp_path / "my run"
        run.mkdir()
        values = {"state": "interrupted", "step": 20, "total_steps": 40, "reason": "", "pid": os.getpid()}
        values |= {"host": socket.gethostname(), "started": NOW, "updated": NOW + 60} | status
        (run / "status.json").write_text(json.dumps(values))
        (run / "resolved.yaml").write_text("model: {base: b}\n")
        write_jsonl(run / "metrics.jsonl", metrics)
        if result:
            (run / "adapter").mkdir()
            (run / "adapter" / "adapter_model.safetensors").write_bytes(b"12345")
            write_manifest(run / "adapter")
        return run

    return write


def checkpoint(run: Path, number: int) -> Path:
    """A folder as the checkpoints' own check wants it."""
    folder = run / "checkpoints" / f"step-{number:06d}"
    folder.mkdir(parents=True)
    for name in ("adapter_model", "optimizer", "rng"):
        save_file({"a": torch.zeros(100)}, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps({"format": 1, "step": number}))
    write_manifest(folder)
    return folder


def said(found: ShowResult) -> str:
    return show_text(found, 60)


def dead_pid() -> int:
    """Of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_run_that_was_interrupted_is_told_with_its_figures_and_how_to_go_on(make: Make) -> None:
    run = make(reason="interrupted by a signal\nwhile evaluating")
    checkpoint(run, 10)
    checkpoint(run, 20)
    text = said(run_show(run))
    kilobytes = sum(path.stat().st_size for path in (run / "checkpoints/step-000010").iterdir()) / 1e3
    assert text.startswith(f"{run}: interrupted\nstep      20 of 40 (50%)\nstarted   ")
    assert "\nreason    interrupted by a signal\n          while evaluating\n" in text
    assert "\ntraining loss  2.0000 at step 20, lowest 1.0000 at step 10\n" in text
    assert "\nheld-out loss  1.5000 at step 10, lowest 1.5000 at step 10\n" in text
    assert "\nlast step      learning rate 1.00e-03, 250 tok/s\n" in text
    assert "\n        4 |'\n" in text
    assert "'. training   o held out" in text
    assert f"\ncheckpoints/step-000010/  {kilobytes:.0f} kB  valid\n" in text
    assert f"\ncheckpoints/step-000020/  {kilobytes:.0f} kB  valid\n" in text
    assert text.endswith(f"\n\nto go on after step 20: qlora train '{run}' --resume")


def test_the_times_are_told_with_how_long_ago_they_were(make: Make) -> None:
    found = run_show(make(started=time.time() - 3725.0, updated=time.time() - 65.0))
    assert ", 1:02:05 ago\nupdated   " in said(found)
    assert ", 1:05 ago\n" in said(found)


def test_a_broken_checkpoint_is_told_with_what_is_wrong_and_the_one_before_is_gone_on_from(make: Make) -> None:
    run = make()
    checkpoint(run, 10)
    broken = checkpoint(run, 20)
    flipped = bytearray((broken / "optimizer.safetensors").read_bytes())
    flipped[-1] ^= 1
    (broken / "optimizer.safetensors").write_bytes(flipped)
    (run / "checkpoints" / "step-000005.broken").mkdir()
    (run / "checkpoints" / ".tmp-step-000030-x").mkdir()
    found = run_show(run)
    what = "optimizer.safetensors is not as it was written (its SHA-256 differs)"
    assert [(each.step, each.problem) for each in found.checkpoints] == [(10, ""), (20, what)]
    assert f" kB  broken: {what}\n" in said(found)
    assert "note: checkpoints: set aside as broken: step-000005.broken\n" in said(found)
    assert said(found).endswith(f"to go on after step 10: qlora train '{run}' --resume")


def test_a_finished_run_is_talked_to(make: Make) -> None:
    found = run_show(make(result=True, state="finished", step=40))
    assert said(found).endswith(f"adapter/  0 kB  valid\n\nto talk to it: qlora chat '{found.run}'")
    assert found.result is not None
    assert found.result.bytes == sum(path.stat().st_size for path in (found.run / "adapter").iterdir())


@pytest.mark.parametrize("damage", ["cut", "unlisted", "gone"])
def test_a_finished_run_with_a_broken_result_makes_it_again_from_its_last_checkpoint(make: Make, damage: str) -> None:
    run = make(result=True, state="finished", step=40)
    adapter = run / "adapter"
    if damage == "cut":
        (adapter / "adapter_model.safetensors").write_bytes(b"1234")
    elif damage == "unlisted":
        (adapter / "manifest.json").unlink()
    else:
        adapter.rename(run / "elsewhere")
    checkpoint(run, 40)
    text = said(run_show(run))
    again = f"to write it again from step 40: qlora train '{run}' --resume"
    assert text.endswith(f"the result is missing or broken\n{again}")
    broken = {"cut": "adapter_model.safetensors has 4 bytes instead of 5", "unlisted": "manifest.json is missing"}
    assert (f"  broken: {broken.get(damage, '')}" in text) == (damage != "gone")


def test_a_run_without_a_checkpoint_begins_again(make: Make) -> None:
    run = make(state="failed", reason="the disk is full")
    assert said(run_show(run)).endswith(f"no checkpoint\n\nno checkpoint: to begin again: qlora train '{run}' --resume")


def test_a_run_without_a_whole_checkpoint_is_not_resumed(make: Make) -> None:
    run = make()
    (checkpoint(run, 10) / "state.json").unlink()
    assert said(run_show(run)).endswith(f"no checkpoint is whole: train again, with another -o than '{run}'")


def test_a_run_that_wrote_down_no_recipe_is_begun_again_by_its_recipe(make: Make) -> None:
    run = make([], state="failed", step=0)
    (run / "resolved.yaml").unlink()
    assert said(run_show(run)).endswith(f"to begin again: qlora train RECIPE -o '{run}' --resume")


def test_of_what_has_no_status_its_checkpoints_are_left(make: Make) -> None:
    run = make()
    (run / "status.json").unlink()
    assert said(run_show(run)).endswith(f"nothing to go on with: train again, with another -o than '{run}'")
    kept = checkpoint(run, 10)
    found = run_show(run)
    assert found.problems == ("status.json is missing",)
    assert said(found).endswith(f"to talk to checkpoint 10: qlora chat --adapter '{kept}'")


@pytest.mark.parametrize("state", ["starting", "running"])
def test_a_run_whose_process_is_gone_died_without_saying_so(make: Make, state: str) -> None:
    run = make(state=state, pid=dead_pid(), step=10)
    (run / ".lock").write_text("{}")
    checkpoint(run, 10)
    found = run_show(run)
    assert (found.state, found.step) == ("died", 20)  # metrics.jsonl is ahead of status.json
    assert f"my run: died without saying so, last step 20 (status.json says {state}, but process " in said(found)
    assert said(found).endswith(f"to go on after step 10: qlora train '{run}' --resume")


def test_a_process_that_does_not_hold_the_directory_is_not_its_run(make: Make) -> None:
    run = make(state="running")
    (run / ".lock").write_text("{}")
    assert run_show(run).state == "died"


def test_without_a_lock_file_a_process_that_lives_is_believed(make: Make) -> None:
    assert run_show(make(state="running")).state == "running"


def test_a_run_at_work_is_shown_while_it_holds_its_lock(make: Make) -> None:
    run = make(state="running")
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = run_show(run)
        assert found.state == "running"
        text = said(found)
    assert f"my run: running on {socket.gethostname()}, process {os.getpid()}\n" in text
    assert "\nstep      20 of 40 (50%), about 0:40 to go\n" in text
    assert "no checkpoint yet" in text
    assert text.endswith(f"kill -USR1 {os.getpid()}\nto stop after saving one: kill -TERM {os.getpid()}")


def test_showing_changes_nothing_and_keeps_no_lock(make: Make) -> None:
    run = make(state="running", result=True)
    checkpoint(run, 10)
    (run / ".lock").write_text("{}")
    before = {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in run.rglob("*")}
    run_show(run)
    assert {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in run.rglob("*")} == before
    assert len(before) > 10
    with (run / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_of_a_run_on_another_machine_it_is_not_said_that_it_died(make: Make) -> None:
    run = make(state="running", host="far-away", pid=dead_pid())
    checkpoint(run, 10)
    found = run_show(run)
    assert (found.state, found.away) == ("running", "far-away")
    assert "running on far-away, process " in said(found)
    assert "whether it still works there cannot be seen from here" in said(found)
    assert "once it has stopped on far-away:\nto go on after step 10: qlora train" in said(found)


def test_resumes_are_listed_the_last_of_them(make: Make) -> None:
    run = make()
    changes = [{"key": "train.lr", "before": 1, "now": 2}, {"key": "train.steps", "before": 1, "now": 2}]
    write_jsonl(run / "resumes.jsonl", [{"step": number, "changes": []} for number in range(1, 7)])
    with (run / "resumes.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time() - 65, "step": 7, "changes": changes}) + "\n")
    text = said(run_show(run))
    assert "resumed 7 times\n  after step 3\n" in text
    assert re.search(r"\n  after step 7, [-\d]+ [:\d]+, 1:0[56] ago, with another train.lr, train.steps\n", text)
    assert "after step 2\n" not in text


def test_a_line_that_was_half_written_is_told_and_the_rest_is_shown(make: Make) -> None:
    run = make()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "step": 30, "lo\xff')
    found = run_show(run)
    assert found.problems == ("metrics.jsonl: no JSON object on line 5; the others are shown",)
    assert found.training.last == (20, 2.0)
    assert "\nnote: metrics.jsonl: no JSON object on line 5" in said(found)


DEEP = "[" * 100_000
RUBBISH = ["", "{", "[]", "7", "null", '"text"', "\0", DEEP, '{"state": "sleeping"}', "[" + "9" * 5000 + "]"]
VALUES: list[Any] = [None, "x", -1, 2**70, 1e400, math.nan, [], {}, True, "\ud800", "\x1b[2J", 10**400]


@pytest.mark.parametrize("content", RUBBISH, ids=[str(i) for i in range(len(RUBBISH))])
def test_a_status_that_cannot_be_used_is_told_and_the_figures_are_shown(make: Make, content: str) -> None:
    run = make()
    checkpoint(run, 20)
    (run / "status.json").write_text(content)
    found = run_show(run)
    text = said(found)
    assert [problem for problem in found.problems if problem.startswith("status.json ")] == list(found.problems)
    assert len(found.problems) == 1
    assert text.startswith(f"{run}: in which state cannot be told\nstep      20\n")
    assert "training loss  2.0000 at step 20" in text
    assert text.endswith("--resume")


@pytest.mark.parametrize("value", VALUES, ids=[str(i) for i in range(len(VALUES))])
def test_no_value_of_a_record_ends_in_a_traceback(make: Make, value: Any) -> None:
    names = ["state", "step", "total_steps", "reason", "pid", "host", "started", "updated"]
    run = make()
    good = json.loads((run / "status.json").read_text())
    for name in names:
        (run / "status.json").write_text(json.dumps({**good, "state": "running", name: value}))
        rows = [*METRICS, value, *(step(30, 1.0) | {key: value} for key in ("kind", "step", "loss", "lr", "seconds"))]
        write_jsonl(run / "metrics.jsonl", [row for row in rows if row != 10**400])
        write_jsonl(run / "resumes.jsonl", [value, {"step": value, "a": [value]}])
        found = run_show(run)
        said(found).encode()
        json.dumps(found.as_json(), allow_nan=False, ensure_ascii=False).encode()
        assert found.training.points[:3] == ((1, 4.0), (10, 1.0), (20, 2.0))


def test_a_loss_that_is_not_finite_is_shown_and_never_the_best(make: Make) -> None:
    found = run_show(make([step(1, 2.0), step(2, math.nan)]))
    assert "training loss  nan at step 2, lowest 2.0000 at step 1" in said(found)
    assert "! not finite" in said(found)
    assert found.as_json()["training"] == {"last": {"step": 2, "loss": None}, "best": {"step": 1, "loss": 2.0}}


def test_a_folder_that_is_no_run_is_refused_with_what_to_name(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        run_show(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is no run directory") as caught:
        run_show(tmp_path)
    assert caught.value.exit_code == 5
    assert caught.value.problems[0].fix == "name what `qlora train` wrote"
    run = make(result=True)
    with pytest.raises(ModelError) as caught:
        run_show(run / "adapter")
    assert caught.value.problems[0].fix == f"name the run that it is a part of: qlora show {run}"
    with pytest.raises(ModelError, match="no such folder"):
        run_show(run / "status.json")
    with pytest.raises(ModelError, match="no such folder"):
        run_show(Path("n" * 5000))


@pytest.fixture
def command() -> Callable[..., int]:
    """A function that runs the command alone."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(show)

    def call(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            app(args=[*arguments])
        return int(ended.value.code or 0)

    return call


def test_the_command_prints_on_stdout_without_control_characters(
    make: Make, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(reason="\x1b[2J\udc00")
    assert command(str(run)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"{run}: interrupted\n")
    assert "reason    ␛[2J\\udc00\n" in captured.out
    assert max(map(len, captured.out.replace(str(run), "").splitlines())) <= 100
    assert command(str(run), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["event"], found["state"], found["step"], found["total_steps"]) == ("result", "interrupted", 20, 40)
    assert found["held_out"] == {"last": {"step": 10, "loss": 1.5}, "best": {"step": 10, "loss": 1.5}}
    assert (found["checkpoints"], found["result"], found["resumable_from"]) == ([], None, None)


def test_what_a_run_leaves_is_shown_and_the_command_that_is_named_works(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(recipe_file()), "-o", str(run), "-q", "-s", "save.every=2", "-s", "eval.every=3"]) == 0
    found = run_show(run)
    assert (found.state, found.step, found.total, found.problems) == ("finished", 6, 6, ())
    assert [step for step, _ in found.training.points] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found.held_out.points] == [3, 6]
    assert [(each.step, each.problem) for each in found.checkpoints] == [(4, ""), (6, "")]
    assert found.result is not None
    assert (found.result.path, found.result.problem) == (run / "adapter", "")
    shutil.rmtree(run / "adapter")
    *command, last = said(run_show(run)).splitlines()[-1].partition(": qlora ")[2].split()
    assert (command, last) == (["train", str(run)], "--resume")
    assert main([*command, last, "-q"]) == 0
    capsys.readouterr()
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"\n\nto talk to it: qlora chat {run}\n")
    assert "\nresumed once\n  after step 6, " in shown
