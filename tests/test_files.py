"""Atomic writing: the old content, or the whole new one, and no litter."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_cli.errors import DiskError, RunDirectoryError
from qlora_cli.files import (
    disk_errors,
    manifest_problems,
    sha256,
    staged_folder,
    write_json,
    write_manifest,
    write_text,
)


@pytest.fixture
def umask() -> Iterator[int]:
    """A umask that lets the group read and others nothing."""
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_replaces_what_was_there_and_makes_the_folders_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "old")
    write_text(path, "näw\n")
    assert path.read_bytes() == "näw\n".encode()
    assert names(path.parent) == ["note.txt"]


def test_json_is_indented_unicode_with_a_last_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"k": ["ä", 1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "k": [\n    "ä",\n    1\n  ]\n}\n'


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["note.txt"]


def test_json_that_cannot_be_written_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, object())
    assert (path.read_text(), names(tmp_path)) == ("1\n", ["a.json"])


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from qlora_cli.errors import DiskError
from qlora_cli.files import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path(sys.argv[1]), "x" * 5000)
except DiskError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on the size of files there")
def test_a_disk_that_fills_up_is_a_disk_error_and_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (8, "")
    assert done.stdout.startswith(f"cannot write {path}: ")
    assert "  fix: free space there: " in done.stdout
    assert (path.read_text(), names(tmp_path)) == ("old", ["note.txt"])


def test_a_place_that_cannot_be_written_is_a_disk_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError) as caught:
        write_text(tmp_path / "file" / "note.txt", "x")
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'file' / 'note.txt'}: ")
    assert "choose another place with -o DIR" in caught.value.problems[0].fix


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_error_of_a_full_device_is_a_disk_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    with pytest.raises(DiskError, match="No space left"), disk_errors(tmp_path), full.open("w") as file:
        file.write("x")


def test_a_safetensors_file_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.safetensors"
    with pytest.raises(DiskError, match="cannot write"), disk_errors(path):
        save_file({"a": torch.zeros(1)}, path)


def test_an_error_that_is_not_the_disks_keeps_its_kind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), disk_errors(tmp_path):
        raise KeyError("bug")


def test_files_are_as_readable_as_the_users_umask_says(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "note.txt", "x")
    assert mode(tmp_path / "note.txt") == 0o666 & ~umask
    assert os.umask(umask) == umask


def test_a_staged_folder_appears_whole_under_its_name(tmp_path: Path, umask: int) -> None:
    final = tmp_path / "run" / "adapter"
    with staged_folder(final) as staging:
        assert staging.parent == final.parent
        assert not final.exists()
        save_file({"a": torch.zeros(1)}, staging / "a.safetensors")
        (staging / "inner").mkdir()
        (staging / "inner" / "b.txt").write_text("b")
    assert names(final.parent) == ["adapter"]
    assert names(final) == ["a.safetensors", "inner"]
    assert [mode(path) for path in (final, final / "a.safetensors", final / "inner" / "b.txt")] == [0o750, 0o640, 0o640]


def test_a_staged_folder_whose_block_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "adapter") as staging:
        (staging / "a.txt").write_text("a")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_an_interrupted_staged_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "adapter"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_staged_folder_never_replaces_one_that_holds_something(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    final.mkdir()
    (final / "old.txt").write_text("old")
    with pytest.raises(RunDirectoryError, match="something else was put there"), staged_folder(final) as staging:
        (staging / "new.txt").write_text("new")
    assert (names(tmp_path), names(final)) == (["adapter"], ["old.txt"])


def test_a_staged_folder_where_none_can_be_made_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError), staged_folder(tmp_path / "file" / "adapter"):
        pytest.fail("the block must not run")


def test_the_hash_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "big").write_bytes(b"\0" * ((1 << 20) + 1))
    assert sha256(tmp_path / "big") == "2cb74edba754a81d121c9db6833704a8e7d417e5b13d1a19f4a52f007d644264"


def test_a_staged_folder_that_replaces_leaves_the_new_one_and_nothing_else(tmp_path: Path) -> None:
    final = tmp_path / "merged"
    final.mkdir()
    (final / "old.txt").write_text("old")
    with staged_folder(final, replace=True) as staging:
        (staging / "new.txt").write_text("new")
        assert names(final) == ["old.txt"]
    assert (names(tmp_path), names(final)) == (["merged"], ["new.txt"])


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    final = tmp_path / "merged"
    final.mkdir()
    (final / "old.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), staged_folder(final, replace=True):
        raise KeyboardInterrupt
    assert (names(tmp_path), names(final)) == (["merged"], ["old.txt"])


def test_a_manifest_tells_every_kind_of_damage(tmp_path: Path) -> None:
    for name in ("same", "longer", "flipped", "gone"):
        (tmp_path / name).write_bytes(b"content")
    write_manifest(tmp_path)
    assert manifest_problems(tmp_path) == []
    (tmp_path / "longer").write_bytes(b"content and more")
    (tmp_path / "flipped").write_bytes(b"contenu")
    (tmp_path / "gone").unlink()
    problems = " ".join(manifest_problems(tmp_path))
    assert "longer has 16 bytes instead of 7" in problems
    assert "flipped is not as it was written" in problems and "gone is missing" in problems and "same" not in problems
    assert manifest_problems(tmp_path, ["same"]) == []
    (tmp_path / "manifest.json").write_text("[")
    assert "cannot be read" in manifest_problems(tmp_path)[0]


@pytest.mark.parametrize("content", ["{}", "[1]", '{"version": 1, "files": {"a": "b"}}'])
def test_a_manifest_of_another_program_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert manifest_problems(tmp_path) == []


def test_a_manifest_does_not_lead_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    entry = {"bytes": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps({"../secret": entry}))
    assert manifest_problems(folder) == ["../secret lies outside of the folder"]


def test_a_manifest_holds_for_files_that_are_links(tmp_path: Path) -> None:
    """As in the Hub's cache."""
    (tmp_path / "blob").write_bytes(b"content")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "weights").symlink_to(tmp_path / "blob")
    write_manifest(folder)
    assert manifest_problems(folder) == []
    (tmp_path / "blob").write_bytes(b"contenu")
    assert "weights is not as it was written" in manifest_problems(folder)[0]
