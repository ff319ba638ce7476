"""The rows of one source, encoded into a store.

Knows sources, formats, turns and limits of length. Invariant: every row read is written down with what became of it,
in the order of the source; no more rows are in memory than a few batches.

Rows are read and understood in one thread while the batches before them are encoded in others.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qlora_cli.data.conversation import Conversation
from qlora_cli.data.encode import Arrays, Encoded, encode_many
from qlora_cli.data.fit import fit
from qlora_cli.data.formats import FORMATS, RowError, fitting, renamed
from qlora_cli.data.rows import RestLost
from qlora_cli.data.sources import SourceRow, raise_all
from qlora_cli.data.store import CUT, KEPT, NO_KEY, StoreWriter
from qlora_cli.data.turns import TurnEncoder
from qlora_cli.errors import Problem
from qlora_cli.recipe.data_schema import DataSection

BATCH, BATCH_CHARACTERS = 128, 2_000_000
"""Rows, and characters, that are encoded at once."""
MOST_CHARACTERS = 4_000_000
"""Of a row: a tokenizer holds hundreds of bytes for each, so that a longer one would take gigabytes."""
ENCODERS, AHEAD = 3, 6
"""Threads that encode, each rendering while another one's tokenizer works, and batches that wait for them."""
COLLECT_AFTER = 20_000
"""Objects that may be made before garbage is collected while rows are encoded."""
MOST_PROBLEMS = 1000
"""With that many, reading ends: it is the file that is wrong, not its rows."""
BAD = "cannot be read"
EMPTY = "an answer is empty"
MASKED = "no token carries loss"
_AS_JSON = json.JSONEncoder(sort_keys=True, default=str).encode

Spans = list[Arrays]
"""(ids, loss) of each sequence of a row."""
Watch = Callable[[int], None]
"""Called with how many rows are done."""


@dataclass(frozen=True)
class Encoder:
    """What it takes to encode rows of one format."""

    data: DataSection
    format: str
    columns: dict[str, str]
    turns: TurnEncoder
    vocabulary: Callable[[], Iterable[str]] = tuple
    """The tokenizer's tokens, asked for where a row is huge."""

    def conversation(self, row: SourceRow) -> Conversation:
        """What the row says. Raises `RowError`."""
        return FORMATS[self.format].build(renamed(row.values, self.columns))

    def fitted(self, spans: Spans, where: str) -> tuple[list[Encoded], str]:
        """(what is left of a row's sequences, what became of the row). Raises `RowError`."""
        data, kept, cut = self.data, list[Encoded](), False
        for ids, loss in spans:
            found = fit(
                Encoded(ids, loss, where),
                max_length=data.max_length,
                too_long=data.too_long,
                truncate=data.truncate,
                source_max_length=data.source_max_length,
                target_max_length=data.target_max_length,
                stop_ids=self.turns.stop_ids,
                bos_id=self.turns.bos_id,
            )
            kept += [row for row in found.rows if row.targets]
            cut |= found.cut
        if not kept:
            return [], self.too_long if cut else MASKED
        return kept, CUT if cut else KEPT

    def surely_too_long(self, conversation: Conversation) -> bool:
        """Whether it is dropped however it is encoded: a token has no more characters than the longest one. Raises
        `RowError` for more than can be encoded at once."""
        count = characters_of(conversation)
        if count <= MOST_CHARACTERS:
            return False
        if self.data.too_long == "drop" and count > self.data.max_length * max(map(len, self.vocabulary()), default=1):
            return True
        what = f"the row has {count:,} characters, more than can be encoded at once ({MOST_CHARACTERS:,})"
        raise RowError(what, "split it into several rows")

    @property
    def too_long(self) -> str:
        """Why a row of which nothing is left within the limits was dropped."""
        limit = f"{self.data.max_length:,} tokens"
        return f"longer than {limit}" if self.data.too_long == "drop" else f"no answer within {limit}"

    def problem(self, row: SourceRow, error: RowError) -> Problem:
        """The error with the row's place, and the format that would fit it."""
        names = fitting(row.values)
        other = f"the row looks like data.format: {' or '.join(names)}" if names and self.format not in names else ""
        return Problem(str(error), fix=other or error.fix, where=row.where)


@dataclass
class _Read:
    """A row on its way: a conversation, or what it was dropped for, or what is wrong with it."""

    row: SourceRow | None
    conversation: Conversation | None = None
    key: bytes = NO_KEY
    fate: str = ""
    problem: Problem | None = None


class Pipeline:
    """Reads, encodes and writes."""

    def __init__(self, encoder: Encoder, writer: StoreWriter, watch: Watch) -> None:
        self._encoder, self._writer, self._watch = encoder, writer, watch
        self._problems: list[Problem] = []
        self._rows = self._bad = self._trailing = 0
        self._largest = -1

    def run(self, rows: Iterable[SourceRow | Problem], check: Callable[[], tuple[str, ...]]) -> dict[str, Any]:
        """Everything; returns counts, and the notes that `check` makes. Nothing is written before that has returned.
        Raises what it raises, and `DataError` for rows that cannot be read, unless they are skipped."""
        waiting: deque[tuple[list[_Read], Future[list[Spans | RowError]]]] = deque()
        source = iter(rows)
        with _rare_collection(), ThreadPoolExecutor(ENCODERS) as pool:
            checked = pool.submit(check)
            while batch := list(self._batch(source)):
                said = [each.conversation for each in batch if each.conversation is not None]
                encoder = self._encoder
                waiting.append((batch, pool.submit(encode_many, said, encoder.turns, encoder.data.loss_on)))
                if len(waiting) > AHEAD:
                    checked.result()
                    self._write(*waiting.popleft())
                if len(self._problems) >= MOST_PROBLEMS:
                    break
            notes = checked.result()
            while waiting:
                self._write(*waiting.popleft())
        raise_all(self._problems)
        return {"trailing_turns": self._trailing, "bad": self._bad, "largest_id": self._largest, "notes": notes}

    def _batch(self, source: Iterator[SourceRow | Problem]) -> Iterator[_Read]:
        characters = 0
        for item in islice(source, BATCH):
            yield (found := self._read(item))
            characters += characters_of(found.conversation) if found.conversation else 0
            if characters > BATCH_CHARACTERS:
                return

    def _read(self, item: SourceRow | Problem) -> _Read:
        if isinstance(item, Problem):
            return _Read(None, fate=BAD, problem=item)
        place = SourceRow({}, item.file, item.number)  # a dropped row may be huge
        try:
            conversation = self._encoder.conversation(item)
            if self._encoder.surely_too_long(conversation):
                return _Read(place, key=key_of(conversation), fate=self._encoder.too_long)
        except RowError as error:
            return _Read(place, fate=BAD, problem=self._encoder.problem(item, error))
        key = key_of(conversation)
        if conversation.messages[-1].role != "assistant":
            self._trailing += 1
        if any(_is_empty(conversation, turn) for turn in conversation.assistant_turns()):
            return _Read(place, key=key, fate=EMPTY)
        return _Read(item, conversation, key)

    def _write(self, batch: list[_Read], encoded: Future[list[Spans | RowError]]) -> None:
        spans = iter(encoded.result())
        for each in batch:
            sequences = self._sequences(each, next(spans)) if each.conversation is not None else []
            if each.problem is not None:
                self._bad_row(each.problem)
            file, line = (each.row.file, each.row.number) if each.row else _place_of(each.problem)
            self._writer.row(file, line, each.key, each.fate, sequences)
        self._rows += len(batch)
        self._watch(self._rows)

    def _sequences(self, read: _Read, spans: Spans | RowError) -> list[Encoded]:
        assert read.row is not None
        try:
            if isinstance(spans, RowError):
                raise spans
            found, read.fate = self._encoder.fitted(spans, read.row.where)
        except RowError as error:
            read.fate, read.key, read.problem = BAD, NO_KEY, self._encoder.problem(read.row, error)
            return []
        self._largest = max([self._largest, *(int(each.ids.max()) for each in found)])
        return found

    def _bad_row(self, problem: Problem) -> None:
        self._bad += 1
        if self._encoder.data.on_bad_row == "error" or isinstance(problem, RestLost):
            self._problems.append(problem)  # who skips a row does not mean the rest of a file
        self._writer.note(problem.what)


@contextmanager
def _rare_collection() -> Iterator[None]:
    """Python's garbage collector goes through lists of ids over and over, in which it can find nothing: 5% of the
    time, at its usual threshold."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _is_empty(conversation: Conversation, turn: int) -> bool:
    message = conversation.messages[turn]
    return message.train and not message.content.strip() and "tool_calls" not in message.extra


def _place_of(problem: Problem | None) -> tuple[str, int]:
    file, _, line = problem.where.rpartition(":") if problem else ("", "", "")
    return (file, int(line)) if line.isdigit() else (problem.where if problem else "", 0)


def characters_of(conversation: Conversation) -> int:
    """In all its messages."""
    return sum(len(message.content) for message in conversation.messages)


def key_of(conversation: Conversation) -> bytes:
    """16 bytes of the SHA-256 of all that it says."""
    said: list[Any] = [
        (message.role, message.content, *([dict(message.extra)] if message.extra else []))
        for message in conversation.messages
    ]
    if conversation.tools:
        said.append([dict(tool) for tool in conversation.tools])
    return hashlib.sha256(_AS_JSON(said).encode()).digest()[:16]


def window(rows: Iterator[SourceRow | Problem], skip: int, take: int | None) -> Iterator[SourceRow | Problem]:
    """The rows that `skip` and `take` leave."""
    return islice(rows, skip, None if take is None else skip + take)
