"""What is measured at every evaluation of a run.

Sees the whole recipe. Invariant: what is asked is settled before a weight is read; measuring leaves the model, its mode
and every random state as they were, and all processes come to the same figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.batches import Batching
from qlora_cli.data.conversation import Message
from qlora_cli.data.dataset import TokenData
from qlora_cli.data.turns import encoder_of
from qlora_cli.evaluation.choice_rows import EncodedQuestions, encode_questions, read_questions
from qlora_cli.evaluation.choices import ChoiceResult, evaluate_choices
from qlora_cli.evaluation.matching import Score
from qlora_cli.evaluation.perplexity import EvalResult, HeldOut, evaluate
from qlora_cli.generation.sampling import Decoding
from qlora_cli.model.loss import TargetLosses
from qlora_cli.model.ranks import Ranks
from qlora_cli.recipe.schema import EvalSection, Recipe
from qlora_cli.workflows.questions import Question, Reply, ask, questions_of, scored
from qlora_cli.workflows.voice import Voice, positions, room


@dataclass(frozen=True, eq=False)
class Asked:
    """Held-out rows; those that are asked as questions, prompts of the recipe, and multiple-choice questions, where the
    recipe wants them."""

    held: HeldOut
    voice: Voice
    questions: Sequence[Question] = ()
    samples: Sequence[Question] = ()
    choices: EncodedQuestions | None = None


@dataclass(frozen=True, eq=False)
class Measurement:
    """One evaluation; `samples` only where this process wrote them."""

    result: EvalResult
    scores: Sequence[Score] = ()
    choices: ChoiceResult | None = None
    samples: Sequence[tuple[Question, Reply]] = ()

    def lines(self) -> Iterator[str]:
        """Text beside that of the result."""
        yield from (score.line() for score in self.scores)
        if self.choices is not None:
            yield next(self.choices.lines())

    def as_json(self) -> dict[str, Any]:
        """Plain values; what was not asked for is left out."""
        found = self.result.as_json()
        found |= {"scores": [score.as_json() for score in self.scores]} if self.scores else {}
        return found | ({"choices": self.choices.as_json()} if self.choices is not None else {})


def asked_of(recipe: Recipe, data: TokenData, tokenizer: Any, config: Any) -> Asked:
    """What a run is to be asked. Raises `DataError` for questions that cannot be."""
    section = recipe.eval
    voice = Voice(tokenizer, encoder_of(tokenizer, data.chosen))
    held = HeldOut.of(data.held_out, voice.text)
    questions = questions_of(held, voice, section.metric_rows)[0] if section.metrics else ()
    samples = [Question(text, tuple(voice.prompt([Message("user", text)])), "") for text in section.samples]
    for sample in samples:
        room(config, len(sample.prompt))
    choices = None
    if section.choices is not None:
        choices = encode_questions(tokenizer, read_questions(section.choices), positions(config))
    return Asked(held, voice, questions, samples, choices)


@dataclass(frozen=True, eq=False)
class Measuring:
    """Measures a model as it is at the moment."""

    model: Any
    losses: TargetLosses
    asked: Asked
    batching: Batching
    section: EvalSection
    ranks: Ranks

    def __call__(self) -> Measurement:
        """One evaluation."""
        asked, section = self.asked, self.section
        result = evaluate(self.model, self.losses, asked.held, self.batching, self.ranks)
        with self.ranks.autocast():
            scores = scored(self.model, asked.questions, asked.voice, section, self.ranks) if asked.questions else ()
            samples = self._samples() if self.ranks.is_main else ()
        choices = None
        if asked.choices is not None:
            choices = evaluate_choices(self.model, asked.choices, section.batch_size, self.ranks)
        return Measurement(result, scores, choices, samples)

    def _samples(self) -> list[tuple[Question, Reply]]:
        how = Decoding(self.section.max_new_tokens), self.section.batch_size
        replies = ask(self.model, self.asked.samples, self.asked.voice, *how)
        return list(zip(self.asked.samples, replies, strict=True))
