"""Rows from Parquet and Arrow files, a few at a time.

Knows pyarrow, nothing of formats. Invariant: offsets that come from a file are checked before anything is read by
them, or a damaged file would be read beyond its memory. Those of Parquet come from its decoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_cli.data.rows import Outcome, Place, first_line

BATCH = 128  # rows that are Python objects at once
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_AGAIN = "fetch or write it again"


def faults() -> tuple[type[Exception], ...]:
    """What pyarrow raises for a file that is damaged, or for a value that Python has no type for."""
    import pyarrow  # type: ignore[import-untyped]

    arrow = (pyarrow.ArrowException, pyarrow.lib.ArrowMemoryError)  # a size of damaged bytes asks for any memory
    return (*arrow, OSError, ValueError, ArithmeticError, TypeError, LookupError, NotImplementedError, ImportError)


def read_parquet(path: Path, place: Place) -> Iterator[Outcome]:
    """The rows of a Parquet file, numbered from 1."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(str(path), buffer_size=1 << 20, pre_buffer=False) as file:
            if names := _twice(file.schema_arrow):
                yield place.rest_lost(names)
                return
            for batch in file.iter_batches(batch_size=BATCH):
                yield from _rows(batch, place)
    except faults() as error:
        yield place.rest_lost(f"the file is no Parquet, damaged or cut short: {first_line(error)}", fix=_AGAIN)


def read_arrow(path: Path, place: Place) -> Iterator[Outcome]:
    """The rows of an Arrow file (also called Feather) or stream, numbered from 1."""
    import pyarrow

    try:
        if path.stat().st_size == 0:
            yield place.rest_lost("the file is empty, and no Arrow file", fix=_AGAIN)
            return
        with pyarrow.memory_map(str(path)) as source:
            yield from _arrow(source, place)
    except faults() as error:
        yield place.rest_lost(f"the file is no Arrow, damaged or cut short: {first_line(error)}", fix=_AGAIN)


def _arrow(source: Any, place: Place) -> Iterator[Outcome]:
    from pyarrow import ipc

    head = source.read(6)
    source.seek(0)
    if head.startswith(b"FEA1"):
        yield place.rest_lost("the file is Feather of version 1", fix="write it again as .parquet")
        return
    reader = ipc.open_file(source) if head == b"ARROW1" else ipc.open_stream(source)
    if names := _twice(reader.schema):
        yield place.rest_lost(names)
        return
    batches = map(reader.get_batch, range(reader.num_record_batches)) if head == b"ARROW1" else iter(reader)
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, BATCH):
            yield from _rows(batch.slice(start, BATCH), place)
    if head != b"ARROW1" and not _ends(source):
        yield place.rest_lost("the stream has no end mark: it was cut short", fix=_AGAIN)


def _ends(source: Any) -> bool:
    """Whether a stream has its end mark: without one, its reader takes a file cut between batches for a whole one."""
    source.seek(max(0, source.size() - len(_END_OF_STREAM)))
    return bool(source.read() == _END_OF_STREAM)


def _rows(batch: Any, place: Place) -> Iterator[Outcome]:
    """The rows of a batch. One that cannot be a row is found by halving."""
    try:
        rows = batch.to_pylist()
    except faults() as error:
        if batch.num_rows > 1:
            half = batch.num_rows // 2
            yield from _rows(batch.slice(0, half), place)
            yield from _rows(batch.slice(half), place)
            return
        yield place.problem(f"the row cannot be read: {first_line(error)}")
        place.number += 1
        return
    for values in rows:
        yield place.row(values)
        place.number += 1


def _twice(schema: Any) -> str:
    """What is wrong with the names of the columns, if anything."""
    names = [name for name, count in Counter(schema.names).items() if count > 1]
    return f"two columns have the name `{names[0]}`" if names else ""
