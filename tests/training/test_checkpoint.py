"""Checkpoints: complete, read back, rotated; a damaged one is named, never counted and never removed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli import files
from qlora_cli.errors import DiskError, ModelError
from qlora_cli.training import checkpoint
from qlora_cli.training.checkpoint import Checkpoints, State, checkpoints, load_state, problem_of
from qlora_cli.training.state import random_tensors


class Values:
    """Something trained: one tensor, saved as the real ones are."""

    kind = "adapter"

    def __init__(self) -> None:
        self.value = torch.nn.Parameter(torch.zeros(4))

    def named(self) -> dict[str, torch.nn.Parameter]:
        return {"value": self.value}

    def save(self, final: Path, beside: Callable[[Path], None], result: bool = True) -> None:
        with files.staged_folder(final, replace=result) as folder:
            files.write_json(folder / "value.json", self.value.tolist())
            beside(folder)
            files.write_manifest(folder)


def state(step: int, **best: torch.Tensor) -> State:
    """Of a run with one optimizer state."""
    values = {"total_steps": 9, "step": step}
    return State(values, {"value:exp_avg": torch.full((4,), float(step))}, random_tensors(), best)


def saved(folder: Path, steps: int, keep_last: int = 2) -> Checkpoints:
    """A checkpoint after each of so many steps."""
    kept, trained = Checkpoints(folder, keep_last), Values()
    for step in range(1, steps + 1):
        kept.save(step, trained, lambda staging: None, state(step))  # type: ignore[arg-type]
    return kept


def names(folder: Path) -> list[str]:
    """Of all that is in it, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_stay_and_hold_what_was_given(tmp_path: Path) -> None:
    saved(tmp_path, 5, keep_last=3)
    assert names(tmp_path) == ["step-000003", "step-000004", "step-000005"]
    assert [(each.step, each.problem) for each in checkpoints(tmp_path)] == [(3, ""), (4, ""), (5, "")]
    found = load_state(tmp_path / "step-000005")
    assert found.values == {"format": 1, "step": 5, "total_steps": 9}
    assert found.optimizer["value:exp_avg"].tolist() == [5.0] * 4
    assert found.best == {}
    assert found.random.keys() == random_tensors().keys()


def test_the_best_values_travel_along(tmp_path: Path) -> None:
    Checkpoints(tmp_path, 2).save(1, Values(), lambda staging: None, state(1, value=torch.ones(4)))  # type: ignore[arg-type]
    assert load_state(tmp_path / "step-000001").best["value"].tolist() == [1.0] * 4


@pytest.mark.parametrize("name", ["optimizer.safetensors", "rng.safetensors", "state.json", "value.json"])
def test_a_flipped_bit_a_cut_and_a_missing_file_are_named(tmp_path: Path, name: str) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "step-000001" / name
    content = file.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], None):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        assert name in problem_of(tmp_path / "step-000001")
        file.write_bytes(content)
    assert problem_of(tmp_path / "step-000001") == ""


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"state.json": {}}', "{" * 100_000])
def test_without_its_manifest_a_checkpoint_is_none(tmp_path: Path, text: str | None) -> None:
    saved(tmp_path, 1)
    manifest = tmp_path / "step-000001" / "manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    assert "manifest.json" in problem_of(tmp_path / "step-000001")


def test_a_manifest_that_leaves_the_state_out_is_none(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    manifest = tmp_path / "step-000001" / "manifest.json"
    entries = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: entries[name] for name in entries if name != "state.json"}))
    assert "state.json" in problem_of(tmp_path / "step-000001")


def test_a_broken_one_is_passed_over_counts_for_nothing_and_stays(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    (tmp_path / "step-000003" / "state.json").write_text("{}")
    kept, trained = Checkpoints(tmp_path, 2), Values()
    newest, broken = kept.newest()
    assert newest is not None and newest.step == 2
    assert [each.step for each in broken] == [3]
    kept.save(3, trained, lambda staging: None, state(3))  # type: ignore[arg-type]
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000003.broken"]
    kept.save(4, trained, lambda staging: None, state(4))  # type: ignore[arg-type]
    assert names(tmp_path) == ["step-000003", "step-000003.broken", "step-000004"]
    assert all(not each.problem for each in checkpoints(tmp_path))


def test_what_a_killed_process_left_half_done_goes(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / ".tmp-step-000003-x").mkdir()
    (tmp_path / ".trash-step-000001").mkdir()
    assert Checkpoints(tmp_path, 2).newest()[0] is not None
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path: Path) -> None:
    kept = saved(tmp_path, 2)
    before = (tmp_path / "step-000002").stat().st_ino
    kept.save(2, Values(), lambda staging: None, state(2))  # type: ignore[arg-type]
    assert (tmp_path / "step-000002").stat().st_ino == before


def test_a_checkpoint_that_fails_leaves_the_others_and_nothing_else(tmp_path: Path) -> None:
    kept = saved(tmp_path, 2)

    def fails(staging: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises((DiskError, OSError)):
        kept.save(3, Values(), fails, state(3))  # type: ignore[arg-type]
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert all(not each.problem for each in checkpoints(tmp_path))


def test_one_that_is_read_back_otherwise_than_written_is_no_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    kept = saved(tmp_path, 2)

    def damaging(staging: Path, final: Path, replace: bool = False) -> None:
        (staging / "value.json").write_text("[9]")
        staging.rename(final)

    monkeypatch.setattr(files, "give_name", damaging)
    with pytest.raises(ModelError, match=r"value\.json"):
        kept.save(3, Values(), lambda staging: None, state(3))  # type: ignore[arg-type]
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003.broken"]


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint, "BESIDE_BYTES", 10**18)
    with pytest.raises(DiskError, match=r"a checkpoint will write 1000000000\.00 GB"):
        saved(tmp_path, 1)
    assert names(tmp_path) == []


def test_a_checkpoint_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-000001" / "state.json").write_text('{"format": 2}')
    with pytest.raises(ModelError, match="has format 2, this version reads 1"):
        load_state(tmp_path / "step-000001")


def test_every_file_is_on_the_disk_before_the_name_is_given_and_the_name_before_an_old_one_goes(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Watches the real calls in their order; each still does what it does."""
    kept, calls = saved(tmp_path, 2), list[tuple[str, str]]()
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def name_of(handle: int) -> str:
        return Path(f"/proc/self/fd/{handle}").readlink().name

    def watch_fsync(handle: int) -> None:
        calls.append(("fsync", name_of(handle)))
        fsync(handle)

    def watch_replace(self: Path, target: Any) -> Path:
        calls.append(("rename", Path(target).name))
        return replace(self, target)

    def watch_rename(self: Path, target: Any) -> Path:
        calls.append(("rename", Path(target).name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "replace", watch_replace)
    monkeypatch.setattr(Path, "rename", watch_rename)
    kept.save(3, Values(), lambda staging: None, state(3))  # type: ignore[arg-type]
    named = calls.index(("rename", "step-000003"))
    synced = {name for what, name in calls[:named] if what == "fsync"}
    written = {path.name for path in (tmp_path / "step-000003").iterdir()}
    assert written <= synced and len(written) == 5
    assert any(name.startswith(".tmp-step-000003") for name in synced), "the folder itself"
    assert calls[named + 1] == ("fsync", tmp_path.name)
    assert calls.index(("rename", ".trash-step-000001")) > named + 1
