"""Run directories: nothing in one is overwritten, and its status says how the run stands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import DiskError, RunDirectoryError
from qlora_cli.files import check_space
from qlora_cli.workflows.rundir import RunDirectory, check_run, check_unused
from qlora_cli.workflows.runlock import is_held


def status(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "status.json").read_text())
    return values


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_and_an_empty_directory_may_be_used(tmp_path: Path) -> None:
    check_unused(tmp_path / "new")
    check_unused(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter", ".hidden", "status.json"])
def test_a_directory_that_holds_anything_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunDirectoryError) as caught:
        check_unused(tmp_path)
    problem = caught.value.problems[0]
    assert problem.what == f"{tmp_path} is not empty"
    assert "-o DIR" in problem.fix
    assert contents(tmp_path) == {name: b"mine"}


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(RunDirectoryError, match="is a file"):
        check_unused(path)
    assert path.read_text() == "mine"


def opened(path: Path, state: str = "starting", **facts: Any) -> RunDirectory:
    """A run directory in `state`, which no process works in any more."""
    directory = RunDirectory(path, writes=True)
    directory.status(state, **({"step": 0, "total_steps": 5} | facts))
    directory.close()
    return directory


@pytest.mark.parametrize("state", ["starting", "running", "finished"])
def test_a_run_that_did_not_end_or_has_finished_keeps_its_directory(tmp_path: Path, state: str) -> None:
    opened(tmp_path, state)
    before = contents(tmp_path)
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory(tmp_path, writes=True)
    assert contents(tmp_path) == before
    assert "--resume" in caught.value.problems[0].fix


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_a_run_that_ended_after_its_first_step_keeps_its_directory(tmp_path: Path, state: str) -> None:
    opened(tmp_path, state, step=1)
    with pytest.raises(RunDirectoryError):
        check_unused(tmp_path)


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_a_run_that_ended_before_its_first_step_gives_its_directory_up(tmp_path: Path, state: str) -> None:
    opened(tmp_path, state, reason="out of memory")
    opened(tmp_path, total_steps=9)
    assert (status(tmp_path)["state"], status(tmp_path)["total_steps"]) == ("starting", 9)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"state": "failed"}', '"failed"', '{"state": "failed", "step": null}']
)
def test_a_status_that_cannot_be_read_protects_the_directory(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(RunDirectoryError):
        check_unused(tmp_path)


def test_the_status_says_state_step_reason_and_process(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "out" / "run", writes=True)
    directory.status("starting", step=0, total_steps=5)
    first = status(directory.path)
    assert (first["state"], first["step"], first["total_steps"], first["pid"]) == ("starting", 0, 5, os.getpid())
    directory.status("running", step=3)
    directory.status("interrupted", reason="interrupted")
    last = status(directory.path)
    assert (last["state"], last["step"], last["reason"]) == ("interrupted", 3, "interrupted")
    assert first["started"] == last["started"] <= last["updated"]
    directory.close()


def test_files_are_written_and_the_log_grows(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", writes=True)
    directory.text("recipe.yaml", "a: 1\n")
    directory.json("lock.json", {"seed": 0})
    directory.append("resumes.jsonl", {"step": 1})
    directory.append("resumes.jsonl", {"step": 2})
    directory.log("one")
    directory.log("two")
    directory.close()
    lines = (directory.path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["one", "two"]
    assert (directory.path / "resumes.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert sorted(contents(directory.path)) == [".lock", "lock.json", "recipe.yaml", "resumes.jsonl", "train.log"]
    assert directory.metrics_path == directory.path / "metrics.jsonl"


def test_no_file_of_a_run_holds_a_secret_nor_does_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr3t-of-the-environment"
    monkeypatch.setenv("OTHER_API_KEY", secret)
    directory = RunDirectory(tmp_path / "run", writes=True)
    directory.text("data_rows.jsonl", f'{{"file": "{secret}.jsonl"}}\n')
    directory.json("lock.json", {"data": {f"/rows/{secret}": "0"}})
    directory.append("resumes.jsonl", {"now": secret})
    directory.status("failed", reason=f"no such file: {secret}", result={"artifact": secret})
    directory.log(secret)
    directory.close()
    found = contents(directory.path)
    assert len(found) == 6 and all(secret.encode() not in each for each in found.values())
    with pytest.raises(RunDirectoryError, match=r"the name of the run directory holds a secret"):
        check_unused(tmp_path / secret)


def test_a_process_that_does_not_write_writes_nothing_and_refuses_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    directory = RunDirectory(tmp_path, writes=False)
    directory.status("running", step=1)
    directory.text("recipe.yaml", "a")
    directory.json("lock.json", {})
    directory.append("resumes.jsonl", {})
    directory.log("line")
    directory.close()
    assert contents(tmp_path) == {"mine.txt": b"mine"}
    assert directory.metrics_path is None


def test_what_a_killed_process_left_half_written_goes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".tmp-status.json-x").write_text("{")
    (tmp_path / ".tmp-adapter-x").mkdir()
    (tmp_path / ".tmp-adapter-x" / "adapter_model.safetensors").write_text("half")
    (tmp_path / "status.json").write_text('{"state": "running", "step": 3}')
    RunDirectory(tmp_path, writes=True, resumes=True).close()
    assert sorted(contents(tmp_path)) == [".lock", "status.json"]


@pytest.mark.parametrize("resumes", [False, True])
def test_a_run_that_was_killed_while_it_wrote_its_first_file_is_begun_anew(resumes: bool, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("{}")
    (tmp_path / ".tmp-status.json-x").write_text("{")
    assert not check_run(tmp_path)
    RunDirectory(tmp_path, writes=True, resumes=resumes).close()
    assert sorted(contents(tmp_path)) == [".lock"]


def test_only_one_at_a_time_has_a_directory_and_the_other_is_told_who(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path, writes=True)
    for resumes in (False, True):
        with pytest.raises(RunDirectoryError, match=rf"in use by process {os.getpid()} on"):
            RunDirectory(tmp_path, writes=True, resumes=resumes)
    with pytest.raises(RunDirectoryError, match="in use by process"):
        check_unused(tmp_path)
    first.close()
    second = RunDirectory(tmp_path, writes=True)
    assert second.left == ""
    second.close()


def test_the_lock_of_a_process_that_was_killed_is_taken_over_and_said(tmp_path: Path) -> None:
    code = "import sys,os,signal; from pathlib import Path; from qlora_cli.workflows.runlock import RunLock;"
    code += "RunLock(Path(sys.argv[1])); print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    assert not is_held(tmp_path)
    directory = RunDirectory(tmp_path, writes=True)
    assert f"process {killed.stdout.strip()} on" in directory.left
    assert is_held(tmp_path)
    directory.close()
    assert not is_held(tmp_path)


def test_a_run_is_there_to_go_on_with_or_nothing_is(tmp_path: Path) -> None:
    assert not check_run(tmp_path / "new")
    assert not check_run(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        check_run(tmp_path)
    opened(tmp_path / "run", "running", step=3)
    assert check_run(tmp_path / "run")


def test_too_little_space_is_refused_with_both_figures_and_without_making_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    check_space(path, 1)
    with pytest.raises(DiskError, match=r"the run will write 1000000000\.00 GB, but only [\d.]+ GB are free there"):
        check_space(path, 10**18)
    assert list(tmp_path.iterdir()) == []


def test_space_is_measured_for_a_relative_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_space(Path("out/run"), 1)
    with pytest.raises(DiskError):
        check_space(Path("out/run"), 10**18)
