"""Held-out rows as questions with known answers, and prompts to be answered now and then.

Sees encoded rows and who speaks. Invariant: a question is asked with the very tokens that stand before the answer in
the row as it is trained on, and ends where a training row's answer ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qlora_cli.data.encode import Encoded
from qlora_cli.errors import DataError
from qlora_cli.evaluation.matching import Score, scores
from qlora_cli.evaluation.perplexity import HeldOut
from qlora_cli.generation.decoder import Completion
from qlora_cli.generation.sampling import Decoding
from qlora_cli.model.ranks import Ranks
from qlora_cli.recipe.schema import EvalSection
from qlora_cli.workflows.voice import Ended, Voice, complete, how_ended


@dataclass(frozen=True)
class Question:
    """What stands before the last answer of a row, and that answer."""

    where: str
    prompt: tuple[int, ...]
    wanted: str


@dataclass(frozen=True)
class Reply:
    """An answer, and what ended it."""

    text: str
    tokens: int
    ended: Ended


@dataclass(frozen=True, eq=False)
class Answers:
    """Questions, what was answered, and what a metric makes of it each."""

    questions: tuple[Question, ...]
    replies: tuple[Reply, ...]
    scores: tuple[Score, ...]

    @property
    def unended(self) -> int:
        """Answers that a limit ended."""
        return sum(reply.ended != "stop token" for reply in self.replies)


def questions_of(held: HeldOut, voice: Voice, most: int | None = None) -> tuple[tuple[Question, ...], int]:
    """(the questions of the first `most` rows that are some, how many rows before are none). Of a row that became
    several sequences, the last is asked. `DataError` where no row is one."""
    found: list[Question] = []
    left_out = 0
    for row in {row.where: row for row in held.listed}.values():
        question = _question(row, voice)
        if question is None:
            left_out += 1
        else:
            found.append(question)
        if len(found) == most:
            break
    if not found:
        raise DataError(
            "no held-out row has a prompt with an answer, so there is nothing to generate",
            why="texts without turns, answers cut off at data.max_length, or loss on the prompts too",
            fix="leave the metrics out (loss and perplexity need no prompts), or hold out rows with turns whose "
            "answers alone carry loss (data.loss_on)",
        )
    return tuple(found), left_out


def _question(row: Encoded, voice: Voice) -> Question | None:
    """The last run of tokens that carry loss, and all before it; None where that is no answer to a prompt: nothing but
    BOS stands before it, or no stop token ends it. (With `loss_on: completion` it may hold several turns; the first
    one counts.)"""
    marked = np.flatnonzero(row.loss)
    gaps = np.flatnonzero(np.diff(marked) > 1)
    start = int(marked[gaps[-1] + 1 if len(gaps) else 0])
    prompt, answer = row.ids[:start].tolist(), row.ids[start : int(marked[-1]) + 1].tolist()
    end = next((i for i, token in enumerate(answer) if token in voice.turns.stop_ids), None)
    if end is None or {voice.turns.bos_id}.issuperset(prompt):
        return None
    return Question(row.where, tuple(prompt), voice.answer(answer[:end]))


def ask(
    model: Any, questions: Sequence[Question], voice: Voice, decoding: Decoding, batch_size: int
) -> tuple[Reply, ...]:
    """Answers in the order of the questions, computed longest prompt first."""
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt))
    completions = complete(model, [questions[i].prompt for i in order], voice, decoding, batch_size)
    placed = dict(zip(order, completions, strict=True))
    return tuple(_reply(placed[i], voice, decoding) for i in range(len(questions)))


def _reply(completion: Completion, voice: Voice, decoding: Decoding) -> Reply:
    ended = how_ended(completion.stopped, len(completion.ids), decoding)
    return Reply(voice.answer(completion.ids), len(completion.ids), ended)


def answers(
    model: Any, asked: Sequence[Question], voice: Voice, metrics: Sequence[str], how: tuple[Decoding, int]
) -> Answers:
    """Asks, as `how` (decoding, batch size) says, and scores the replies."""
    replies = ask(model, asked, voice, *how)
    wanted = [question.wanted for question in asked]
    return Answers(tuple(asked), replies, scores(metrics, [reply.text for reply in replies], wanted))


def scored(
    model: Any, asked: Sequence[Question], voice: Voice, section: EvalSection, ranks: Ranks
) -> tuple[Score, ...]:
    """The scores of greedy answers, shared among the processes; every process has the result."""
    mine = ranks.mine(asked)
    how = Decoding(section.max_new_tokens), section.batch_size
    found = answers(model, [question for _, question in mine], voice, section.metrics, how).scores
    right = torch.zeros(len(section.metrics), len(asked), device=ranks.device)
    for number, score in enumerate(found):
        right[number, [place for place, _ in mine]] = torch.from_numpy(score.right).to(right)
    whole = ranks.sum(right).cpu().numpy() > 0
    return tuple(Score(metric, whole[number]) for number, metric in enumerate(section.metrics))
