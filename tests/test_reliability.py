"""The fast part of scripts/reliability finds nothing wrong, and what it judges with does find what is wrong.

The checks that break runs go in one process of their own, for a fork of this one would take along what other tests
have started.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from battery import common, fsyncs, kills
from battery.fsyncs import Call

from qlora_cli.files import write_manifest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "reliability"
BREAKS_RUNS = ("kills", "resumes", "signals", "disk", "races", "nonfinite", "fsyncs")
LEAST = {"kills": 20, "resumes": 12, "signals": 7, "disk": 2, "races": 3, "nonfinite": 5, "fsyncs": 5}
"""Cases of the fast part; of `disk`, where no tmpfs can be mounted."""


MEMORY = Path("/dev/shm")  # a process that dies takes nothing along that it has written, there or on a disk


def has_room(folder: Path) -> bool:
    """Whether a gigabyte can be written there."""
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 1 << 30


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the fast part of each check that breaks runs has found."""
    names = [part for name in BREAKS_RUNS for part in ("--only", name)]
    work = Path(tempfile.mkdtemp(dir=MEMORY if has_room(MEMORY) else tmp_path_factory.mktemp("runs")))
    command = [sys.executable, str(SCRIPT), "--json", "--work", str(work / "work"), *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    finally:
        shutil.rmtree(work)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["check"] for result in results] == list(BREAKS_RUNS), done.stderr
    assert done.returncode == (0 if all(result["passed"] for result in results) else 1)
    return {result["check"]: result for result in results}


@pytest.mark.timeout(900)  # the first one waits for all
@pytest.mark.parametrize("name", BREAKS_RUNS)
def test_what_breaks_a_run_loses_nothing_and_leaves_nothing_half_done(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    assert found[name]["failures"] == []
    assert found[name]["passed"] is True
    assert found[name]["count"] >= LEAST[name]


@pytest.fixture
def script() -> ModuleType:
    """scripts/reliability as a module."""
    loader = SourceFileLoader("reliability", str(SCRIPT))
    spec = spec_from_loader("reliability", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def check_that(monkeypatch: pytest.MonkeyPatch, count: int, failures: list[str], raises: bool = False) -> None:
    """Puts a check of that result under the name `battery.made_up`."""

    def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
        if raises:
            raise OSError("no such thing")
        return common.result(count, f"{count} of seed {seed}", failures)

    module = ModuleType("battery.made_up")
    vars(module).update(TITLE="made up", run=run)
    monkeypatch.setitem(sys.modules, "battery.made_up", module)


@pytest.mark.parametrize(
    ("count", "failures", "raises", "passed"),
    [(3, [], False, True), (3, ["one"], False, False), (0, [], False, False), (3, [], True, False)],
    ids=["nothing wrong", "something wrong", "nothing done", "broken itself"],
)
def test_a_check_passes_only_when_it_did_something_and_found_nothing_wrong(
    count: int,
    failures: list[str],
    raises: bool,
    passed: bool,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_that(monkeypatch, count, failures, raises)
    failed = script.run_all(["made_up"], Namespace(full=False, json=True, seed=7), tmp_path / "work")
    told = json.loads(capsys.readouterr().out)
    assert (failed, told["passed"]) == (0 if passed else 1, passed)
    assert raises == ("OSError: no such thing" in "".join(told["failures"]))


def test_a_name_that_is_no_check_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "common"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "kills" in done.stderr


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with the names and the manifest of a checkpoint."""
    folder = tmp_path / "checkpoints" / "step-000003"
    folder.mkdir(parents=True)
    for name in common.SAVED:
        (folder / name).write_text(f"content of {name}", encoding="utf-8")
    write_manifest(folder)
    return folder


def test_a_whole_checkpoint_is_not_called_damaged(checkpoint: Path) -> None:
    assert common.damage(checkpoint) == []


@pytest.mark.parametrize("name", [*common.SAVED, "manifest.json"])
def test_a_checkpoint_that_lacks_a_file_is_called_damaged(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    assert name.split(".", maxsplit=1)[0] in " ".join(common.damage(checkpoint))


def test_a_changed_byte_and_a_file_too_many_are_found(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("content of State.json", encoding="utf-8")
    (checkpoint / "extra").touch()
    assert sorted(text.split(": ")[1] for text in common.damage(checkpoint)) == [
        "extra is in one of folder and manifest only",
        "state.json differs",
    ]


@pytest.mark.parametrize(
    ("left", "hit"),
    [
        ({".tmp-step-000004-abc"}, "save"),
        ({".tmp-step-000004-abc", ".trash-step-000001"}, "rotation"),
        ({".tmp-adapter-abc"}, "result"),
        ({".tmp-status.json-abc"}, "elsewhere"),
        (set(), "elsewhere"),
    ],
)
def test_what_a_kill_hit_is_read_from_what_it_left(left: set[str], hit: str) -> None:
    assert kills.what_was_hit(left) == hit


RUN = Path("/run/checkpoints")
STAGING = f"{RUN}/.tmp-step-000003-abc"
FILES = [f"{STAGING}/{name}" for name in ("a", "b", "c", "d")]
GOOD = [
    *(Call("write", path) for path in FILES),
    Call("write", f"{STAGING}/.tmpE"),
    Call("rename", f"{STAGING}/.tmpE", f"{STAGING}/e"),
    *(Call("fsync", path) for path in [*FILES, f"{STAGING}/e", STAGING]),
    Call("rename", STAGING, f"{RUN}/step-000003"),
    Call("fsync", str(RUN)),
]


def test_a_save_in_the_right_order_is_found_right() -> None:
    assert fsyncs.out_of_order(GOOD, RUN / "step-000003") == []


@pytest.mark.parametrize(
    ("dropped", "said"),
    [
        (Call("fsync", FILES[2]), "step-000003/c was not synced after it was written"),
        (Call("fsync", f"{STAGING}/e"), "step-000003/e was not synced after it was written"),
        (Call("fsync", STAGING), "the folder of step-000003 was not synced after its files"),
        (Call("fsync", str(RUN)), "the parent of step-000003 was not synced right after the rename"),
        (Call("rename", STAGING, f"{RUN}/step-000003"), "step-000003 was never renamed to its name"),
    ],
)
def test_a_call_that_is_missing_from_a_save_is_found(dropped: Call, said: str) -> None:
    assert fsyncs.out_of_order([call for call in GOOD if call != dropped], RUN / "step-000003") == [said]


def test_a_file_written_to_after_its_fsync_is_found() -> None:
    late = [*GOOD[:-3], Call("write", FILES[0]), *GOOD[-3:]]
    assert fsyncs.out_of_order(late, RUN / "step-000003") == ["step-000003/a was not synced after it was written"]


def saved(*numbers: int) -> list[Call]:
    """The last two calls of a save, for each of these steps."""
    return [
        call for i in numbers for call in (Call("rename", f"/t{i}", f"{RUN}/step-{i:06d}"), Call("fsync", str(RUN)))
    ]


def test_a_rotation_before_the_newer_checkpoint_is_safe_is_found() -> None:
    trash = [Call("rename", f"{RUN}/step-{i:06d}", f"{RUN}/.trash-step-{i:06d}") for i in (1, 2)]
    assert fsyncs.hasty_rotations([*saved(1, 2, 3), trash[0], *saved(4), trash[1]]) == []
    said = ["step-000001 was given up before a newer one was safe"]
    assert fsyncs.hasty_rotations([*saved(1, 2), trash[0], *saved(3, 4), trash[1]]) == said
    unsynced = [*saved(1, 2, 3)[:-1], trash[0], saved(3)[-1], *saved(4), trash[1]]
    assert fsyncs.hasty_rotations(unsynced) == said
    assert fsyncs.hasty_rotations(saved(1, 2, 3, 4)) == ["0 checkpoints were given up, not 2"]


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("12 fsync(5</run/a.txt>)     = 0", Call("fsync", "/run/a.txt")),
        ('12 write(7</run/b>, ""..., 12) = 12', Call("write", "/run/b")),
        ('12 rename("/run/x", "/run/y") = 0', Call("rename", "/run/x", "/run/y")),
        (
            '12 renameat2(AT_FDCWD</w>, "/run/x", AT_FDCWD</w>, "/run/y", RENAME_NOREPLACE) = 0',
            Call("rename", "/run/x", "/run/y"),
        ),
        ('12 rename("/run/x", "/run/y") = -1 ENOENT (No such file or directory)', None),
        ("12 +++ exited with 0 +++", None),
    ],
)
def test_a_line_of_the_trace_is_read_as_the_call_that_succeeded(line: str, call: Call | None) -> None:
    assert fsyncs.parsed(line) == ([call] if call else [])
