"""Multiple-choice questions: rows of a prompt and the letter that is right, and both as a tokenizer writes them.

Knows rows and a tokenizer; nothing of models. Invariant: a row is read as it stands or is a problem with file and line,
no prompt is cut, and a letter is the one token that the tokenizer itself puts behind the prompt.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.fields import RowError, quoted, text_of
from qlora_cli.data.pieces import encode_texts, ids_of
from qlora_cli.data.rows import SourceRow
from qlora_cli.data.sources import open_source, raise_all
from qlora_cli.errors import DataError, Problem

Form = Literal["space", "none"]
"""What stands between a prompt and its letter: a space (`Answer: A`), or nothing."""
BETWEEN: Mapping[Form, str] = {"space": " ", "none": ""}
FEWEST_LETTERS = 4
AT_ONCE = 1024
"""Prompts encoded at once; bounds the memory."""
_SHAPE = '{"input": "... Answer:", "output": "A", "subject": "anatomy"}'


@dataclass(frozen=True)
class Question:
    """`prompt` is all that precedes the letter `wanted`, earlier questions with their answers (shots) included."""

    prompt: str
    wanted: str
    subject: str
    where: str


@dataclass(frozen=True)
class Questions:
    """At least one question, and the file or data set that they were read from."""

    file: str
    rows: tuple[Question, ...]

    @cached_property
    def letters(self) -> str:
        """Those that a model chooses from, in every row the same: `ABCD`, and on to the highest that is right in some
        row. A letter that happens to be right nowhere is a choice all the same, so there are no gaps."""
        highest = max(string.ascii_uppercase.index(row.wanted) for row in self.rows)
        return string.ascii_uppercase[: max(FEWEST_LETTERS, highest + 1)]


@dataclass(frozen=True, eq=False)
class EncodedQuestions:
    """Per question: the ids of its prompt ([T] int32, at most `max_length`); and for each form that can be used (at
    least one) the ids of the letters, [rows, letters] int64."""

    questions: Questions
    ids: tuple[NDArray[np.int32], ...]
    letter_ids: Mapping[Form, NDArray[np.int64]]
    max_length: int

    def __len__(self) -> int:
        return len(self.ids)


def read_questions(source: str, split: str = "test") -> Questions:
    """The rows of a file in the shape of the QLoRA repository's data/mmlu (`input`, `output`, `subject`; zero-shot and
    five-shot are two such files); `split` applies to the Hub only. One `DataError` for all rows that are none."""
    parsed = [_parsed(outcome) for outcome in open_source(source, split).rows()]
    raise_all([each for each in parsed if isinstance(each, Problem)])
    return Questions(source, tuple(each for each in parsed if isinstance(each, Question)))


def _parsed(outcome: SourceRow | Problem) -> Question | Problem:
    if isinstance(outcome, Problem):
        return outcome
    try:
        return _question(outcome)
    except RowError as error:
        return Problem(str(error), fix=f"write {_SHAPE}", where=outcome.where)


def _question(row: SourceRow) -> Question:
    prompt, wanted, subject = (text_of(row.values, key) for key in ("input", "output", "subject"))
    if not prompt.strip():
        raise RowError("field `input` is empty: there is no question")
    if len(wanted) != 1 or wanted not in string.ascii_uppercase:
        raise RowError(f"field `output` must be one capital letter, but is {quoted(wanted)}")
    if not subject.strip():
        raise RowError("field `subject` is empty")
    return Question(prompt, wanted, subject, row.where)


def encode_questions(tokenizer: Any, questions: Questions, max_length: int) -> EncodedQuestions:
    """The prompts as plain text, as they stand, without a chat template; BOS before them where the tokenizer has the
    habit and the text does not begin with it. Encode once, evaluate as often as you like.

    `DataError` for prompts of more than `max_length` tokens (positions of the model), and where single letters are not
    single tokens. (The QLoRA repository cuts long prompts at the left, and so loses shots unseen.)
    """
    ids = tuple(_prompt_ids(tokenizer, [row.prompt for row in questions.rows]))
    lengths = zip(questions.rows, map(len, ids), strict=True)
    raise_all([_unfit(row, tokens, max_length) for row, tokens in lengths if not 0 < tokens <= max_length])
    return EncodedQuestions(questions, ids, find_letters(tokenizer, questions), max_length)


def _prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> Iterator[NDArray[np.int32]]:
    bos = tokenizer.bos_token_id
    start = [bos] if bos in tokenizer("").input_ids[:1] else []
    for first in range(0, len(prompts), AT_ONCE):
        some = prompts[first : first + AT_ONCE]
        encoded = encode_texts(tokenizer, some)
        for ids in (encoded[prompt] for prompt in some):
            yield np.array(ids if ids[:1] == start else start + ids, np.int32)


def _unfit(row: Question, tokens: int, max_length: int) -> Problem:
    if tokens == 0:
        return Problem("the prompt has no token in this tokenizer", fix="remove the row", where=row.where)
    return Problem(
        f"the prompt has {tokens:,} tokens, and {max_length:,} fit",
        why="cut, it would be another question, or the same one with fewer shots",
        fix="take a file with fewer shots, or remove the row; a larger maximum helps where the model has the positions",
        where=row.where,
    )


def find_letters(tokenizer: Any, questions: Questions) -> dict[Form, NDArray[np.int64]]:
    """For each form that can be used, the letters' ids [rows, letters]: in every row each letter is one token behind
    the prompt's own, and no two are the same. `DataError` where that holds for no form.

    Which tokens they are depends on how a prompt ends, so that one prompt is asked for all with the same last line.
    """
    endings: dict[str, Question] = {}
    for row in questions.rows:
        ending = _last_line(row.prompt)
        if ending not in endings or len(row.prompt) < len(endings[ending].prompt):
            endings[ending] = row
    found = {ending: _letters_behind(tokenizer, row.prompt, questions.letters) for ending, row in endings.items()}
    usable = [form for form in get_args(Form) if all(_is_usable(each[form]) for each in found.values())]
    if not usable:
        raise _no_form(found, endings, questions.letters)
    lines = [_last_line(row.prompt) for row in questions.rows]
    return {form: np.array([found[line][form] for line in lines], np.int64) for form in usable}


def _last_line(prompt: str) -> str:
    return prompt[prompt.rfind("\n", 0, -1) + 1 :]


def _letters_behind(tokenizer: Any, prompt: str, letters: str) -> dict[Form, list[int | None]]:
    """Per form, the one token that each letter adds to the prompt's; None where that is not one token, an unknown one,
    or where the prompt's own tokens change."""
    before = ids_of(tokenizer, prompt)
    found: dict[Form, list[int | None]] = {}
    for form, between in BETWEEN.items():
        whole = [ids_of(tokenizer, prompt + between + letter) for letter in letters]
        found[form] = [_only(before, ids, tokenizer.unk_token_id) for ids in whole]
    return found


def _only(before: list[int], ids: list[int], unknown: int | None) -> int | None:
    adds_one = len(ids) == len(before) + 1 and ids[:-1] == before
    return ids[-1] if adds_one and ids[-1] != unknown else None


def _is_usable(tokens: list[int | None]) -> bool:
    return None not in tokens and len(set(tokens)) == len(tokens)


def _no_form(
    found: Mapping[str, Mapping[Form, list[int | None]]], endings: Mapping[str, Question], letters: str
) -> DataError:
    """Names, for each form, the letters in the first row that speaks against it."""
    said, first = [], ""
    for form in get_args(Form):
        ending = next(ending for ending, each in found.items() if not _is_usable(each[form]))
        tokens, first = found[ending][form], first or ending
        pairs = zip(letters, tokens, strict=True)
        bad = [letter for letter, token in pairs if token is None or tokens.count(token) > 1]
        said.append(f"{'without' if form == 'none' else 'with'} a space before them ({', '.join(bad)})")
    return DataError(
        f"behind {quoted(first[-40:])} letters are not single tokens of their own, neither {' nor '.join(said)}",
        why="the answer is read from one position, where each letter must be one token",
        fix="let prompts end in `Answer:` with nothing behind it; where the tokenizer splits letters even so, compare "
        "generated answers instead",
        where=endings[first].where,
    )
