"""Where the answers of a conversation stand among the ids of its text, for many texts that are encoded at once.

Knows the tokenizer's added tokens; nothing of messages or loss. Invariant: what is found is what encoding every prompt
alone would find. A fast tokenizer takes the added tokens out of a text first and encodes what lies between them each by
itself: what precedes such a token (a "mark") does not depend on what follows it. So of a prompt only the tail since its
last mark has to be encoded alone, and to be found again behind that mark in the whole. The tail is nearly always the
same, so nearly nothing is encoded twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int, int]
"""Of an answer: the position of its message, its first token, and the place behind its last."""


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without anything added. A long one is no cause for a warning: limits are the recipe's."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def encode_texts(tokenizer: Any, texts: Iterable[str], proven: bool = False) -> dict[str, list[int]]:
    """The ids of each text, without anything added. One call, outside of Python's lock, for a fast tokenizer; `proven`:
    it was seen to do no more than its backend."""
    wanted = list(dict.fromkeys(texts))
    if not wanted:
        return {}
    if proven:
        found = tokenizer.backend_tokenizer.encode_batch_fast(wanted, add_special_tokens=False)
        return {text: each.ids for text, each in zip(wanted, found, strict=True)}
    first = ids_of(tokenizer, wanted[0])  # also ends a truncation set before
    if tokenizer.is_fast:
        found = [each.ids for each in tokenizer.backend_tokenizer.encode_batch_fast(wanted, add_special_tokens=False)]
        if found[0] == first:  # it does no more than its backend
            return dict(zip(wanted, found, strict=True))
    return {text: ids_of(tokenizer, text) for text in wanted}


@dataclass(frozen=True, eq=False)
class Marks:
    """Added tokens, the one that ends a turn among them, that neither their neighbours nor a normalizer have a say in.
    `known` [V] is True for their ids."""

    end: str
    ids: Mapping[str, int]
    known: NDArray[np.bool_]

    @classmethod
    def of(cls, tokenizer: Any, end_id: int, sample: str) -> Marks | None:
        """Of the tokens that the template wrote into `sample` (a vocabulary may have hundreds more). None where nothing
        is known of how the tokenizer works, or where the end of a turn is no mark."""
        if not tokenizer.is_fast or tokenizer.split_special_tokens:
            return None
        added = tokenizer.added_tokens_decoder
        marks = {token.content: i for i, token in added.items() if _is_plain(token) and token.content in sample}
        end = added[end_id].content if end_id in added else ""
        known = np.zeros(max(len(tokenizer), *marks.values(), 0) + 1 if marks else 0, np.bool_)
        known[list(marks.values())] = True
        return cls(end, marks, known) if end in marks else None

    def last(self, text: str, start: int) -> int:
        """Where the last of them behind `start` begins, or -1."""
        return max(text.rfind(mark, start) for mark in self.ids)

    def count(self, text: str, start: int, stop: int) -> int:
        """How many of them lie within a span."""
        return sum(text.count(mark, start, stop) for mark in self.ids)


def _is_plain(token: Any) -> bool:
    text: str = token.content
    return bool(text) and text == text.strip() and not (token.single_word or token.normalized)


@dataclass(frozen=True)
class _Place:
    """An answer's place: how many marks precede its prompt's tail (which begins with the last of them, if any) and how
    many there are with its end-of-turn; and what a template writes behind that when the answer is the last."""

    message: int
    before: int
    tail: str
    through: int
    rest: str


@dataclass
class Layout:
    """A conversation's text, and the places of its answers in it, as they are added one by one."""

    marks: Marks
    text: str = ""
    """Up to the end-of-turn token of the last answer that was added."""

    _places: list[_Place] = field(default_factory=list)

    def add(self, message: int, head: str, whole: str) -> bool:
        """Adds the answer behind `head` in `whole`, which begins with it. False where the text so far does not go on in
        this one, or where the answer does not end as a turn."""
        marks, done = self.marks, len(self.text)
        end = whole.rfind(marks.end, len(head))
        if end < 0 or not head.startswith(self.text):
            return False
        stop, counted = end + len(marks.end), self._places[-1].through if self._places else 0
        at = marks.last(head, done)
        if at < 0:  # no mark in this prompt: its tail begins with the end of the answer before, or is all of it
            at, before = (done - len(marks.end), counted) if counted else (0, 0)
        else:
            before = counted + marks.count(head, done, len(head))
        through = counted + marks.count(whole, done, stop)
        self._places.append(_Place(message, before, head[at:], through, whole[end:]))
        self.text = whole[:stop]
        return True

    @property
    def texts(self) -> Iterable[str]:
        """Every text whose ids `find` needs."""
        yield self.text
        for place in self._places:
            yield place.tail
            yield place.rest

    def find(self, encoded: Mapping[str, list[int]]) -> tuple[NDArray[np.int32], list[Span]] | None:
        """Ids of the text, and its answers. None where a token straddles the border to one."""
        listed = encoded[self.text]
        ids = np.array(listed, np.int32)
        marked = np.flatnonzero(self.marks.known[ids]).tolist()
        if len(marked) != self._places[-1].through:  # the text of one is part of another token here
            return None
        spans, end = list[Span](), self.marks.ids[self.marks.end]
        ends = [place for place in marked if listed[place] == end]
        for place in self._places:
            tail, at = encoded[place.tail], marked[place.before - 1] if place.before else 0
            start, stop = at + len(tail), marked[place.through - 1] + 1
            inside = any(start <= each < stop - 1 for each in ends)
            if inside or listed[at:start] != tail or end in encoded[place.rest][1:]:
                return None
            spans.append((place.message, start, stop))
        return ids, spans
