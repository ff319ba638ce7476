"""Encoded rows on disk: written once, in order, and read by place without being loaded.

Knows arrays and files; nothing of formats or tokenizers. Invariant: memory grows with the number of rows, by less than
a hundred bytes each, never with their tokens.

    ids.bin         int32, all sequences one after the other
    loss.bin        bool, likewise
    sequences.npy   per sequence where it starts, its length, its targets, and the row that it is of
    rows.npy        per row read: file and line, hash of what it says, and what became of it
    notes.jsonl     what is wrong with rows that could not be read, by their number
    facts.json      names of files and of fates; what else its writer wants to keep
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.encode import Encoded
from qlora_cli.errors import DataError
from qlora_cli.files import disk_errors, write_json

SEQUENCE = np.dtype([("start", "<i8"), ("length", "<i4"), ("targets", "<i4"), ("row", "<i8")])
ROW = np.dtype([("file", "<i4"), ("line", "<i8"), ("key", "V16"), ("fate", "<i4")])
KEPT, CUT = "kept", "cut"
"""Fates that are no reason to drop a row: kept as it is, and kept but for what was cut."""
NO_KEY = bytes(16)


class StoreWriter:
    """Writes a folder. Use as a context manager; `finish` last, without which nothing can be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files, self._fates = dict[str, int](), {KEPT: 0, CUT: 1}
        self._sequences = (array("q"), array("i"), array("i"), array("q"))
        self._rows = (array("i"), array("q"), array("i"))
        self._keys = bytearray()
        self._written = 0
        self._open = ExitStack()

    def __enter__(self) -> StoreWriter:
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._ids = self._open.enter_context((self._folder / "ids.bin").open("wb"))
            self._loss = self._open.enter_context((self._folder / "loss.bin").open("wb"))
            self._notes = self._open.enter_context((self._folder / "notes.jsonl").open("w", encoding="utf-8"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()

    def note(self, text: str) -> None:
        """What is wrong with the row that comes next."""
        with disk_errors(self._folder):
            self._notes.write(json.dumps({"row": len(self._rows[0]), "what": text}) + "\n")

    def row(self, file: str, line: int, key: bytes, fate: str, sequences: Iterable[Encoded] = ()) -> None:
        """One row read, and what it became: none of `sequences` where it was dropped, for the reason `fate`."""
        number = len(self._rows[0])
        place = self._files.setdefault(file, len(self._files))
        for column, value in zip(
            self._rows, (place, line, self._fates.setdefault(fate, len(self._fates))), strict=True
        ):
            column.append(value)
        self._keys += key
        for sequence in sequences:
            self._sequence(sequence, number)

    def _sequence(self, sequence: Encoded, row: int) -> None:
        with disk_errors(self._folder):
            self._ids.write(np.ascontiguousarray(sequence.ids, "<i4").data)
            self._loss.write(np.ascontiguousarray(sequence.loss, np.bool_).data)
        values = (self._written, len(sequence), sequence.targets, row)
        for column, value in zip(self._sequences, values, strict=True):
            column.append(value)
        self._written += len(sequence)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Writes the tables and `facts`."""
        sequences = np.zeros(len(self._sequences[0]), SEQUENCE)
        for name, column in zip(SEQUENCE.names or (), self._sequences, strict=True):
            sequences[name] = column
        rows = np.zeros(len(self._rows[0]), ROW)
        rows["file"], rows["line"], rows["fate"] = self._rows
        rows["key"] = np.frombuffer(bytes(self._keys), "V16")
        with disk_errors(self._folder):
            self._open.close()
            np.save(self._folder / "sequences.npy", sequences, allow_pickle=False)
            np.save(self._folder / "rows.npy", rows, allow_pickle=False)
        write_json(self._folder / "facts.json", {"files": list(self._files), "fates": list(self._fates), **facts})


class Store:
    """A folder that was written, mapped into memory. Raises `DataError` where it is not one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
            self.sequences = np.load(folder / "sequences.npy", allow_pickle=False)
            self.rows = np.load(folder / "rows.npy", allow_pickle=False)
            tokens = int(self.sequences["length"].sum(dtype=np.int64))
            self._ids = _mapped(folder / "ids.bin", np.dtype("<i4"), tokens)
            self._loss = _mapped(folder / "loss.bin", np.dtype(np.bool_), tokens)
            self.files: list[str] = self.facts["files"]
            self.fates: list[str] = self.facts["fates"]
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"{folder} holds no encoded rows: {error}", fix="remove it") from error

    def sequence(self, index: int) -> Encoded:
        """A sequence; its arrays are read-only views of the files."""
        found = self.sequences[index]
        part = slice(int(found["start"]), int(found["start"]) + int(found["length"]))
        return Encoded(self._ids[part], self._loss[part], self.where(int(found["row"])))

    def notes(self) -> dict[int, str]:
        """What is wrong with rows that could not be read."""
        lines = (self.folder / "notes.jsonl").read_text(encoding="utf-8").splitlines()
        return {found["row"]: found["what"] for found in map(json.loads, lines)}

    def where(self, row: int) -> str:
        """FILE:LINE of a row."""
        return f"{self.files[int(self.rows['file'][row])]}:{int(self.rows['line'][row])}"

    @property
    def largest_id(self) -> int:
        """The largest token id, -1 where there is none."""
        return int(self.facts.get("largest_id", -1))


def _mapped(file: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if file.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes instead of {count * dtype.itemsize:,}")
    return np.memmap(file, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)


class Rows(Sequence[Encoded]):
    """Sequences chosen from stores, in an order; one may come several times."""

    def __init__(self, stores: Sequence[Store], chosen: Sequence[NDArray[np.int64]], names: Sequence[str] = ()) -> None:
        """`chosen` are places in each store; the rows of the first store come first. `names` are the sources' that the
        stores hold, as far as whoever asks needs them."""
        self.stores, self.names = tuple(stores), tuple(names)
        self._store = np.repeat(np.arange(len(stores)), [len(each) for each in chosen])
        self._place = np.concatenate([*chosen, np.empty(0, np.int64)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._place)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.stores[self._store[index]].sequence(int(self._place[index]))

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each."""
        return self._column("length")

    @property
    def targets(self) -> NDArray[np.int64]:
        """Tokens of each that carry loss."""
        return self._column("targets")

    @property
    def sources(self) -> NDArray[np.int64]:
        """Of each, the number of its store."""
        return self._store

    def source_rows(self) -> int:
        """How many different rows they are of."""
        pairs = np.stack([self._store, self._column("row")])
        return int(np.unique(pairs, axis=1).shape[1]) if len(self) else 0

    def _column(self, name: str) -> NDArray[np.int64]:
        found = np.empty(len(self), np.int64)
        for number, store in enumerate(self.stores):
            mine = self._store == number
            found[mine] = store.sequences[name][self._place[mine]]
        return found
