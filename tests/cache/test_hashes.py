"""Remembered hashes of files."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cache.hashes import Hashes, _facts, sealed
from qlora_cli.files import sample_hash

LATER = 10**11


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are old enough for their times to be trusted."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + LATER)


def digest(data: bytes) -> str:
    """What a hash must be."""
    return hashlib.sha256(data).hexdigest()


def poisoned(hashes: Hashes) -> None:
    """Puts a mark in place of what is remembered, by which its use is seen."""
    known = json.loads(hashes.memory.read_text())
    hashes.memory.write_text(
        json.dumps({place: resealed(place, {**facts, "sha256": "remembered"}) for place, facts in known.items()})
    )


def resealed(place: str, record: dict[str, Any]) -> dict[str, Any]:
    """A record that was changed, as if it had been written so."""
    return sealed(place, {key: value for key, value in record.items() if key != "seal"})


@pytest.mark.usefixtures("settled")
def test_a_file_that_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(file.name.encode() * 100)
    hashes = Hashes(tmp_path / "place" / "hashes.json")
    assert hashes.of(files) == {file: digest(file.name.encode() * 100) for file in files}
    poisoned(hashes)
    assert Hashes(hashes.memory).of(files) == dict.fromkeys(files, "remembered")


@pytest.mark.usefixtures("settled")
def test_new_content_of_the_same_size_time_and_samples_is_read_again(tmp_path: Path) -> None:
    file, hashes = tmp_path / "file", Hashes(tmp_path / "hashes.json")
    file.write_bytes(bytes(2_000_000))
    hashes.sha256(file)
    before, samples = file.stat(), sample_hash(file)
    changed = bytes(100_000) + b"x" + bytes(1_899_999)
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, sample_hash(file)) == (before.st_size, before.st_mtime_ns, samples)
    assert hashes.sha256(file) == digest(changed)


@pytest.mark.usefixtures("settled")
def test_samples_tell_a_change_that_left_every_time_as_it_was(tmp_path: Path) -> None:
    file, hashes = tmp_path / "file", Hashes(tmp_path / "hashes.json")
    file.write_bytes(b"a" * 5000)
    hashes.sha256(file)
    known = json.loads(hashes.memory.read_text())
    file.write_bytes(b"a" * 4999 + b"b")
    facts = {key: value for key, value in _facts(file).items() if key != "samples"}
    hashes.memory.write_text(json.dumps({str(file): resealed(str(file), {**known[str(file)], **facts})}))
    assert hashes.sha256(file) == digest(b"a" * 4999 + b"b")


@pytest.mark.usefixtures("settled")
def test_another_file_put_in_place_is_read(tmp_path: Path) -> None:
    file, hashes = tmp_path / "file", Hashes(tmp_path / "hashes.json")
    file.write_bytes(b"old")
    hashes.sha256(file)
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(file)
    assert hashes.sha256(file) == digest(b"new")


def test_a_file_written_a_moment_ago_is_not_remembered(tmp_path: Path) -> None:
    file, hashes = tmp_path / "file", Hashes(tmp_path / "hashes.json")
    file.write_bytes(b"young")
    assert hashes.sha256(file) == digest(b"young")
    assert not hashes.memory.exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("text", ["", "[]", "{", '{"PLACE": 3}', '{"PLACE": {"sha256": "x"}}', "[" * 100_000])
def test_a_broken_memory_is_no_obstacle(tmp_path: Path, text: str) -> None:
    file, hashes = tmp_path / "file", Hashes(tmp_path / "hashes.json")
    file.write_bytes(b"content")
    hashes.memory.write_text(text.replace("PLACE", str(file)))
    assert hashes.sha256(file) == digest(b"content")
    poisoned(hashes)
    assert hashes.sha256(file) == "remembered"


@pytest.mark.usefixtures("settled")
def test_a_memory_that_cannot_be_written_is_no_obstacle_and_files_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    for each in (file, other):
        each.write_bytes(b"content")
    assert Hashes(file / "hashes.json").sha256(other) == digest(b"content")
    hashes = Hashes(tmp_path / "hashes.json")
    hashes.of([file])
    file.unlink()
    hashes.of([other])
    assert list(json.loads(hashes.memory.read_text())) == [str(other)]


@pytest.mark.usefixtures("settled")
def test_a_flipped_bit_in_the_memory_never_gives_a_wrong_hash(tmp_path: Path) -> None:
    file, hashes = tmp_path / "file", Hashes(tmp_path / "hashes.json")
    file.write_bytes(b"content")
    hashes.sha256(file)
    whole = hashes.memory.read_bytes()
    assert len(whole) > 300
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 1 << place // 3 % 8
        hashes.memory.write_bytes(changed)
        assert hashes.sha256(file) == digest(b"content")
