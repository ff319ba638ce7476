"""Encoded rows on disk are those that were written, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.encode import Encoded
from qlora_cli.data.store import CUT, KEPT, NO_KEY, Rows, Store, StoreWriter
from qlora_cli.errors import DataError


def encoded(*ids: int) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.arange(len(ids)) > 0, "")


def write(folder: Path, rows: list[list[Encoded]], file: str = "rows.jsonl") -> Store:
    with StoreWriter(folder) as writer:
        for number, sequences in enumerate(rows, start=1):
            writer.row(file, number, bytes([number] * 16), KEPT if sequences else "too long", sequences)
        writer.finish({"largest_id": 9})
    return Store(folder)


def values(rows: Rows) -> list[tuple[list[int], list[bool], str]]:
    return [(row.ids.tolist(), row.loss.tolist(), row.where) for row in rows]


def test_rows_are_read_as_they_were_written_each_with_its_place(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [[encoded(1, 2)], [], [encoded(3), encoded(4, 5, 6)]])
    rows = Rows([store], [np.arange(3)])
    assert values(rows) == [
        ([1, 2], [False, True], "rows.jsonl:1"),
        ([3], [False], "rows.jsonl:3"),
        ([4, 5, 6], [False, True, True], "rows.jsonl:3"),
    ]
    assert (rows.lengths.tolist(), rows.targets.tolist(), rows.source_rows()) == ([2, 1, 3], [1, 0, 2], 2)
    assert [store.fates[fate] for fate in store.rows["fate"]] == [KEPT, "too long", KEPT]
    assert store.largest_id == 9


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5), max_size=3), max_size=6))
def test_whatever_was_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[list[int]]]
) -> None:
    store = write(tmp_path_factory.mktemp("s"), [[encoded(*ids) for ids in row] for row in drawn])
    wanted = [(ids, f"rows.jsonl:{n}") for n, row in enumerate(drawn, start=1) for ids in row]
    rows = Rows([store], [np.arange(len(wanted))])
    assert [(row.ids.tolist(), row.where) for row in rows] == wanted


def test_rows_of_several_stores_come_in_the_chosen_order_and_as_often(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", [[encoded(1)], [encoded(2)]]), write(tmp_path / "b", [[encoded(3)]], "b")
    rows = Rows([first, second], [np.array([1, 0, 1]), np.array([0])])
    assert [row.ids.tolist() for row in rows] == [[2], [1], [2], [3]]
    assert [row.ids.tolist() for row in rows[1:3]] == [[1], [2]]
    assert rows[-1].where == "b:1"
    assert rows.source_rows() == 3
    with pytest.raises(IndexError):
        rows[4]


def test_what_is_wrong_with_a_row_is_kept_by_its_number(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s") as writer:
        writer.row("f", 1, NO_KEY, CUT, [encoded(1, 2)])
        writer.note("not JSON")
        writer.row("f", 2, NO_KEY, "cannot be read")
        writer.finish({})
    assert Store(tmp_path / "s").notes() == {1: "not JSON"}


@pytest.mark.parametrize("name", ["ids.bin", "loss.bin", "sequences.npy", "rows.npy", "facts.json"])
def test_a_folder_that_was_not_finished_or_lost_a_byte_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "s", [[encoded(1, 2)]])
    whole = (tmp_path / "s" / name).read_bytes()
    (tmp_path / "s" / name).write_bytes(whole[:-1] if name.endswith(".bin") else whole[: len(whole) // 2])
    with pytest.raises(DataError, match="holds no encoded rows"):
        Store(tmp_path / "s")
    (tmp_path / "s" / name).unlink()
    with pytest.raises(DataError, match="holds no encoded rows"):
        Store(tmp_path / "s")


def test_tables_are_never_unpickled(tmp_path: Path) -> None:
    write(tmp_path / "s", [[encoded(1, 2)]])
    np.save(tmp_path / "s" / "rows.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="holds no encoded rows"):
        Store(tmp_path / "s")
