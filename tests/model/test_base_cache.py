"""The cache of quantised bases: what it returns is what was written, whatever happens to its files."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_cli.cache.entries import LIMIT, PLACE, Cache, find_cache
from qlora_cli.cache.folders import SEAL
from qlora_cli.errors import MachineError
from qlora_cli.model.base import load_base, load_config
from qlora_cli.model.folder import find_base
from qlora_cli.model.stored import Wanted
from qlora_cli.recipe.schema import ModelSection, QuantizationSection
from qlora_cli.workflows.events import Event
from qlora_cli.workflows.locate import Found, load_bare, plain_recipe
from tests.conftest import make_llama, save_base
from tests.model.test_stored import assert_same_layers, assert_same_tensors

CPU = torch.device("cpu")
GB = 10**9
KEY = "key"


class Log:
    """What a cache tells and warns of."""

    def __init__(self, place: Path, limit: int = GB) -> None:
        self.told: list[str] = []
        self.warned: list[str] = []
        self.cache = Cache(place, limit, self.told.append, self.warned.append)

    def base(self, base: Path, section: QuantizationSection | None = None) -> Any:
        """The base, through the cache."""
        folder, section = find_base(str(base), None), section or QuantizationSection()
        return load_base(folder, ModelSection(base="-"), section, torch.float32, CPU, self.cache)


class Content:
    """Stands for a model: something to refer to."""

    def __init__(self, place: Path) -> None:
        self.files = {file.name: file.read_bytes() for file in place.glob("*.bin")}


def writes(**files: bytes) -> Callable[[Path], None]:
    """Writes an entry of these files."""

    def write(place: Path) -> None:
        for name, data in files.items():
            (place / f"{name}.bin").write_bytes(data)

    return write


def entry_of(log: Log) -> Path:
    """The only entry."""
    (entry,) = log.cache.entries()
    return entry


def flip(file: Path, position: int, mask: int) -> None:
    """Changes bits of a byte."""
    data = bytearray(file.read_bytes())
    data[position % len(data)] ^= mask
    file.write_bytes(data)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Any]:
    """A cache with the tiny base in it, and that base."""
    log = Log(tmp_path_factory.mktemp("cache"))
    return log.cache.folder, log.base(base)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_changed_byte_anywhere_is_detected_named_and_mended(
    pristine: tuple[Path, Any], base: Path, tmp_path: Path, data: st.DataObject
) -> None:
    place = tmp_path / "cache"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(pristine[0], place)
    log = Log(place)
    entry = entry_of(log)
    file = data.draw(st.sampled_from(sorted(entry.iterdir())))
    flip(file, data.draw(st.integers(0, file.stat().st_size - 1)), data.draw(st.integers(1, 255)))
    assert_same_tensors(log.base(base), pristine[1])
    assert len(log.warned) == 1 and str(entry) in log.warned[0] and file.name in log.warned[0]
    assert [text.split(" in ")[0] for text in log.told] == ["4-bit weights kept"]
    assert_same_tensors(log.base(base), pristine[1])
    assert len(log.warned) == 1 and "read from" in log.told[-1]


def cut(file: Path) -> None:
    """Loses the end of a file."""
    file.write_bytes(file.read_bytes()[:-1])


def made_a_folder(file: Path) -> None:
    """Is no file any more."""
    file.unlink()
    file.mkdir()


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated": ("model.safetensors", cut),
    "emptied": ("model.safetensors", lambda file: file.write_bytes(b"")),
    "missing": ("model.safetensors", Path.unlink),
    "longer": ("aliases.json", lambda file: file.write_bytes(file.read_bytes() + b" ")),
    "no manifest": ("manifest.json", Path.unlink),
    "no seal": (SEAL, Path.unlink),
    "a folder": ("aliases.json", made_a_folder),
    "one too many": ("more.safetensors", lambda file: shutil.copyfile(file.with_name("model.safetensors"), file)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_named_removed_and_made_again(
    pristine: tuple[Path, Any], base: Path, tmp_path: Path, kind: str
) -> None:
    shutil.copytree(pristine[0], tmp_path / "cache")
    log = Log(tmp_path / "cache")
    name, damage = DAMAGE[kind]
    damage(entry_of(log) / name)
    model = log.base(base)
    assert_same_tensors(model, pristine[1])
    assert_same_layers(model, pristine[1])
    assert len(log.warned) == 1 and name in log.warned[0] and "made again" in log.warned[0]
    log.base(base)
    assert len(log.warned) == 1 and "read from" in log.told[-1]


def test_whole_files_of_another_model_are_not_used(pristine: tuple[Path, Any], base: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine[0], tmp_path / "cache")
    log, other = Log(tmp_path / "cache"), Log(tmp_path / "other")
    other.base(save_base(tmp_path / "base", num_hidden_layers=1))
    entry = entry_of(log)
    shutil.rmtree(entry)
    shutil.copytree(entry_of(other), entry)
    assert_same_tensors(log.base(base), pristine[1])
    assert len(log.warned) == 1 and "is not there" in log.warned[0]


def key(base: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", **section: Any) -> str:
    """Of a base under settings."""
    folder = find_base(str(base), None)
    values = (QuantizationSection(**section), dtype, torch.device(device), "auto")
    return Wanted(folder, load_config(folder), *values).key(Cache(base.parent / "no-cache", GB, print, print))


def test_every_setting_that_decides_a_bit_has_a_key_of_its_own(base: Path) -> None:
    keys = [
        key(base),
        key(base, type="fp4"),
        key(base, blocksize=128),
        key(base, double_quant=False),
        key(base, storage_dtype="bfloat16"),
        key(base, skip_modules=("q_proj",)),
        key(base, dtype=torch.bfloat16),
        key(base, device="cuda"),
    ]
    assert len(set(keys)) == len(keys) == 8


def test_settings_that_decide_no_bit_and_the_place_of_the_base_are_not_in_the_key(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "moved")
    assert key(base) == key(base, cache=False) == key(base, compute_dtype="float16") == key(tmp_path / "moved")


def test_another_base_of_the_same_size_and_time_has_another_key(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    file, before = base / "model.safetensors", key(base)
    stat = file.stat()
    flip(file, stat.st_size - 1, 1)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert key(base) != before
    flip(file, stat.st_size - 1, 1)
    assert key(base) == before
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert key(base) != before


def test_a_changed_base_is_quantised_and_not_read_from_the_cache(tmp_path: Path) -> None:
    log, base = Log(tmp_path / "cache"), save_base(tmp_path / "base")
    log.base(base)
    make_llama(seed=1).save_pretrained(base)
    assert_same_tensors(log.base(base), Log(tmp_path / "new").base(base))
    assert ["kept" in text for text in log.told] == [True, True] and len(log.cache.entries()) == 2


def test_what_a_killed_writer_left_is_never_read_and_is_swept_up(tmp_path: Path) -> None:
    log = Log(tmp_path)

    def die(place: Path) -> None:
        (place / "a.bin").write_bytes(b"half")
        os._exit(9)

    child = os.fork()
    if not child:
        log.cache.store(KEY, 4, die)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(log.cache.place.glob(".tmp-*"))) == 1
    assert log.cache.entries() == [] and log.cache.load(KEY, Content) is None and log.warned == []
    log.cache.store(KEY, 4, writes(a=b"whole"))
    assert log.cache.load(KEY, Content).files == {"a.bin": b"whole"}
    assert [path.name for path in log.cache.place.iterdir() if path.name.startswith(".")] == [".lock"]


def test_of_two_writers_one_writes_and_the_other_goes_on(tmp_path: Path) -> None:
    first, second = Log(tmp_path), Log(tmp_path)
    inside, done = threading.Event(), threading.Event()

    def slowly(place: Path) -> None:
        inside.set()
        assert done.wait(20)
        writes(a=b"first")(place)

    thread = threading.Thread(target=first.cache.store, args=(KEY, 5, slowly))
    thread.start()
    assert inside.wait(20)
    second.cache.store(KEY, 6, writes(a=b"second"))
    done.set()
    thread.join()
    assert ["another process" in text for text in second.warned] == [True] and first.warned == []
    assert second.cache.load(KEY, Content).files == {"a.bin": b"first"}
    second.cache.store(KEY, 6, writes(a=b"second"))  # there already
    assert second.cache.load(KEY, Content).files == {"a.bin": b"first"}


def fill(log: Log, *names: str) -> None:
    """Entries of about 1,000 bytes and their manifests, used in this order."""
    for name in names:
        log.cache.store(name, 1000, writes(a=b"x" * 1000))
        os.utime(log.cache.place / name / SEAL, (len(log.cache.entries()), len(log.cache.entries())))


def names(log: Log) -> set[str]:
    """Keys of the entries."""
    return {entry.name for entry in log.cache.entries()}


def test_the_least_recently_used_entries_make_room(tmp_path: Path) -> None:
    log = Log(tmp_path, limit=4500)
    fill(log, "a", "b", "c")
    assert names(log) == {"a", "b", "c"}
    log.cache.load("a", Content)
    log.cache.store("d", 3000, writes(a=b"x" * 3000))
    assert names(log) == {"a", "d"} and log.warned == []
    assert [text.split(" removed")[0] for text in log.told if "removed" in text] == [
        str(log.cache.place / name) for name in "bc"
    ]


def test_an_entry_in_use_is_not_evicted(tmp_path: Path) -> None:
    log = Log(tmp_path, limit=2500)
    fill(log, "a", "b")
    used = log.cache.load("a", Content)
    os.utime(log.cache.place / "a" / SEAL, (0, 0))  # the least recently used
    fill(log, "c")
    assert names(log) == {"a", "c"} and used.files
    log.cache.store("big", 2400, writes(a=b"x" * 2400))
    assert names(log) == {"a"} and ["in use" in text for text in log.warned] == [True]
    del used
    gc.collect()
    log.cache.store("big", 2400, writes(a=b"x" * 2400))
    assert names(log) == {"big"}


def test_an_entry_larger_than_the_limit_is_not_written_and_removes_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path, limit=2500)
    fill(log, "a")
    log.cache.store(KEY, 2501, writes(a=b"x" * 2501))
    assert names(log) == {"a"} and len(log.warned) == 1 and LIMIT in log.warned[0]


def test_a_disk_with_little_room_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 2 * GB + 10))
    log.cache.store(KEY, 11, writes(a=b"x" * 11))
    assert names(log) == set() and ["of the disk" in text for text in log.warned] == [True]
    log.cache.store(KEY, 10, writes(a=b"x" * 10))
    assert names(log) == {KEY}


def test_a_disk_that_fills_up_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    log = Log(tmp_path)

    def fails(place: Path) -> None:
        (place / "a.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    log.cache.store(KEY, 4, fails)
    assert ["No space left" in text for text in log.warned] == [True]
    assert [path.name for path in log.cache.place.iterdir()] == [".lock"]


def test_a_place_that_cannot_be_written_fails_no_run(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = Log(tmp_path / "file")
    assert log.base(base) is not None
    assert ["are not kept in" in text for text in log.warned] == [True] and log.told == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_read_and_fails_no_run(base: Path, tmp_path: Path) -> None:
    log = Log(tmp_path / "cache")
    log.base(base)
    folders = [log.cache.folder, log.cache.place, entry_of(log)]
    for folder in folders:
        folder.chmod(0o555)
    log.base(base)
    log.base(base, QuantizationSection(type="fp4"))
    for folder in folders:
        folder.chmod(0o755)
    assert "read from" in log.told[1] and ["are not kept" in text for text in log.warned] == [True]


def test_a_base_that_is_not_quantised_here_is_not_kept(base: Path, tmp_path: Path) -> None:
    log = Log(tmp_path / "cache")
    log.base(base, QuantizationSection(type="none"))
    assert not log.cache.folder.exists()


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the default size at a place of its own."""
    monkeypatch.setenv(PLACE, str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT)
    return tmp_path / "cache"


def found(wanted: bool = True) -> Cache | None:
    """The cache that the environment names."""
    return find_cache(wanted, print, print)


def test_place_and_limit_come_from_the_environment(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = found()
    assert cache is not None and (cache.folder, cache.limit) == (environment, 50 * GB)
    monkeypatch.setenv(LIMIT, "0.5")
    monkeypatch.delenv(PLACE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    cache = found()
    assert cache is not None and (cache.folder, cache.limit) == (Path("/somewhere/qlora"), GB // 2)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    cache = found()
    assert cache is not None and cache.folder == Path("/home/me/.cache/qlora")


@pytest.mark.parametrize("text", ["lots", "-1", "nan", "inf", "5GB"])
def test_a_limit_that_is_no_number_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(MachineError, match=f"{LIMIT} is '{text}'"):
        found()


def start(base: Path, cache: bool = True) -> list[dict[str, Any]]:
    """What a start of `chat` or `eval` tells of the cache."""
    events: list[Event] = []
    recipe = plain_recipe(str(base))
    quantization = recipe.quantization.model_copy(update={"cache": cache})
    load_bare(Found(recipe.model_copy(update={"quantization": quantization}), None), events.append)
    return [each for event in events if (each := event.as_json()).get("label") == "cache" or each["event"] == "notice"]


def test_a_command_keeps_the_base_and_the_next_one_reads_it(environment: Path, base: Path) -> None:
    assert ["kept in" in event["text"] for event in start(base)] == [True]
    assert ["read from" in event["text"] for event in start(base)] == [True]
    flip(next(environment.glob("bases/*/model.safetensors")), -1, 1)
    assert [event["event"] for event in start(base)] == ["notice", "fact"]


def test_cache_false_and_a_limit_of_0_touch_nothing(
    environment: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(base, cache=False) == [] and not environment.exists()
    monkeypatch.setenv(LIMIT, "0")
    assert start(base) == [] and not environment.exists()


def test_reading_an_entry_counts_as_using_it(tmp_path: Path) -> None:
    log = Log(tmp_path)
    fill(log, "a", "b")
    assert [entry.name for entry in log.cache.entries()] == ["a", "b"]
    before = time.time()
    log.cache.load("a", Content)
    assert [entry.name for entry in log.cache.entries()] == ["b", "a"]
    assert (log.cache.place / "a" / SEAL).stat().st_mtime >= before - 1


def test_of_the_processes_of_a_run_only_the_first_keeps_the_base_and_the_others_say_nothing(
    environment: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start(base) == [] and not environment.joinpath("bases").exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert ["kept in" in event["text"] for event in start(base)] == [True]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ["read from" in event["text"] for event in start(base)] == [True]
