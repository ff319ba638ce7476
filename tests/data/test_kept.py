"""Encoded rows kept on disk: used for the very same content and settings, and for nothing else."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cache.entries import Cache
from qlora_cli.data.dataset import Setting, TokenData, load_data
from qlora_cli.data.kept import SETTINGS
from qlora_cli.errors import DataError
from qlora_cli.recipe.data_schema import DataSection
from tests.conftest import make_tokenizer, write_jsonl
from tests.data.conftest import THINKING

ROWS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a" * 4 * i or "a"}]}
    for i in range(5)
]


class Place:
    """A file of rows, a cache, and what the cache told."""

    def __init__(self, folder: Path, limit: int = 10**9) -> None:
        self.file = write_jsonl(folder / "rows.jsonl", ROWS)
        self.told: list[str] = []
        self.warned: list[str] = []
        self.cache = Cache(folder / "cache", limit, self.told.append, self.warned.append, kind="rows")

    def load(self, tokenizer: Any = None, **keys: Any) -> TokenData:
        section = DataSection.model_validate({"train": str(self.file), "template": "tokenizer"} | keys)
        return load_data(section, Setting(tokenizer or make_tokenizer(), cache=self.cache))

    def events(self) -> list[str]:
        """`kept` or `read` for each time since the last call."""
        found = ["kept" if " kept in " in text else "read" for text in self.told]
        self.told.clear()
        return found

    @property
    def entries(self) -> list[Path]:
        return self.cache.entries()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def values(data: TokenData) -> list[tuple[list[int], list[bool], str]]:
    return [(row.ids.tolist(), row.loss.tolist(), row.where) for row in data.train]


def test_the_second_start_reads_what_the_first_one_kept(place: Place) -> None:
    first, second = place.load(), place.load()
    assert place.events() == ["kept", "read"]
    assert values(first) == values(second)
    assert first.receipt == second.receipt
    assert (first.stop_ids, first.largest_id) == (second.stop_ids, second.largest_id)


CHANGES: list[dict[str, Any]] = [
    {"max_length": 14},
    {"max_length": 14, "too_long": "truncate"},
    {"max_length": 14, "too_long": "truncate", "truncate": "start"},
    {"source_max_length": 3},
    {"target_max_length": 3},
    {"loss_on": "all"},
    {"on_bad_row": "skip"},
]


def test_every_setting_that_is_part_of_the_key_is_tried_below() -> None:
    assert {name for change in CHANGES for name in change} == SETTINGS


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_setting_is_encoded_anew(place: Place, change: dict[str, Any]) -> None:
    place.load()
    without = {name: value for name, value in change.items() if name == "max_length" and len(change) > 1}
    place.load(**without)
    place.events()
    place.load(**change)
    assert place.events() == ["kept"]


def test_one_changed_byte_of_the_rows_is_enough(place: Place) -> None:
    before = values(place.load())
    place.file.write_bytes(place.file.read_bytes().replace(b"q3", b"q7"))
    after = values(place.load())
    assert place.events() == ["kept", "kept"]
    assert before != after


def test_another_format_template_or_tokenizer_is_encoded_anew(place: Place) -> None:
    place.load()
    place.load(make_tokenizer(THINKING))
    place.load(template="none")
    other = make_tokenizer()
    other.add_tokens(["q1"])
    place.load(other)
    assert place.events() == ["kept"] * 4
    write_jsonl(place.file, [{"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}])
    place.load(format="prompt-completion")
    place.load(format="prompt-completion", columns={"prompt": "instruction"})
    assert place.events() == ["kept"] * 2


def test_what_does_not_change_a_row_uses_the_same_entry(place: Place) -> None:
    place.load()
    place.load(eval_split=2, limits={"dropped": 5}, duplicates="drop")
    assert place.events() == ["kept", "read"]


def test_a_damaged_entry_is_named_removed_and_made_again(place: Place) -> None:
    before = values(place.load())
    (entry,) = place.entries
    content = bytearray((entry / "ids.bin").read_bytes())
    content[3] ^= 1
    (entry / "ids.bin").write_bytes(content)
    assert values(place.load()) == before
    assert len(place.warned) == 1
    assert "ids.bin" in place.warned[0] and "damaged" in place.warned[0]
    assert place.events() == ["kept", "kept"]


def test_clearing_removes_every_entry_and_says_how_many(place: Place) -> None:
    place.load()
    place.load(max_length=14)
    count, size = place.cache.clear()
    assert count == 2 and size > 0
    assert place.entries == []


def test_rows_without_a_cache_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    data = load_data(DataSection(train=str(file), template="tokenizer"), Setting(make_tokenizer()))
    assert list((tmp_path / "tmp").iterdir())
    assert len(values(data)) == 5
    del data
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_refused_source_leaves_nothing_in_the_cache(place: Place) -> None:
    place.file.write_text(place.file.read_text() + "not json\n")
    with pytest.raises(Exception, match="not JSON"):
        place.load()
    assert list(place.cache.place.iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(place: Place) -> None:
    def change(opened: Any, rows: int, read: int) -> None:
        place.file.write_text(place.file.read_text() + json.dumps(ROWS[0]) + "\n")

    section = DataSection(train=str(place.file), template="tokenizer")
    with pytest.raises(DataError, match="changed while it was read"):
        load_data(section, Setting(make_tokenizer(), cache=place.cache, watch=change))
    assert place.entries == []


def _load(folder: str, ready: Any, found: Any) -> None:
    place = Place(Path(folder))
    ready.wait()
    found.put(json.dumps([values(place.load()), place.warned]))


def test_runs_that_encode_at_once_all_get_the_rows_and_leave_one_entry(place: Place, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, found = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_load, args=(str(tmp_path), ready, found)) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [json.loads(found.get(timeout=60)) for _ in workers]
    for worker in workers:
        worker.join()
    assert results[0] == results[1] == results[2]
    assert results[0][1] == []
    assert len(place.entries) == 1
    assert [path.name for path in place.cache.place.iterdir()] == [place.entries[0].name]
