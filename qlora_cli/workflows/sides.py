"""One model, measured on all that was asked of it.

Sees a recipe and the command's wishes. Invariant: whatever can be refused is, before a weight is read; and the figures
are those that training itself would have measured.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_cli.data.batches import Batching
from qlora_cli.data.counting import fates
from qlora_cli.data.dataset import load_held_out
from qlora_cli.data.encode import Encoded
from qlora_cli.data.store import KEPT, Store
from qlora_cli.data.templates import apply_template
from qlora_cli.data.turns import encoder_of
from qlora_cli.evaluation.choice_rows import EncodedQuestions, encode_questions, read_questions
from qlora_cli.evaluation.choices import ChoiceResult, evaluate_choices
from qlora_cli.evaluation.harness import Harness, HarnessResult, run_tasks
from qlora_cli.evaluation.harness_tasks import Tasks, check_harness, check_tasks
from qlora_cli.evaluation.paired import RowLosses
from qlora_cli.evaluation.perplexity import EvalResult, Floats, HeldOut, check_finite, sequence_losses
from qlora_cli.generation.sampling import Decoding
from qlora_cli.model.base import load_config
from qlora_cli.model.engine import build_engine
from qlora_cli.model.ranks import Ranks
from qlora_cli.model.tokens import make_room
from qlora_cli.recipe.schema import DataSection
from qlora_cli.training.guard import memory_guard
from qlora_cli.workflows.events import Emit, Stage
from qlora_cli.workflows.locate import Found, Loaded, base_folder, load_model, tell_changes, tokenizer_of
from qlora_cli.workflows.questions import Answers, Question, answers, questions_of
from qlora_cli.workflows.rows import setting_of
from qlora_cli.workflows.voice import Voice, positions

BATCHED = 16
"""Prompts that are answered at once, where nothing else was said."""
MOST_POSITIONS = 1 << 20
"""For models without a limit of their own."""


@dataclass(frozen=True)
class Measures:
    """What to measure: the loss of held-out rows (at most `limit`), answers to them by `metrics`, multiple-choice rows
    of a file, tasks of lm-evaluation-harness."""

    held_out: bool = True
    metrics: tuple[str, ...] = ()
    max_new_tokens: int = 256
    limit: int | None = None
    choices: str | None = None
    tasks: tuple[str, ...] = ()
    task_dir: Path | None = None
    chat_template: bool = False
    batch_size: int | None = None


@dataclass(frozen=True, eq=False)
class Side:
    """What was measured of one model; None for what was not asked."""

    name: str
    found: Found
    data: str = ""
    held: HeldOut | None = None
    sums: Floats | None = None
    answers: Answers | None = None
    lost: Mapping[str, int] = field(default_factory=dict)
    """How many of the rows that were read for it were dropped, or cut, and why."""
    left_out: int = 0
    """Rows that are no question."""
    choices: ChoiceResult | None = None
    tasks: HarnessResult | None = None

    @property
    def result(self) -> EvalResult | None:
        """The figures of the held-out rows."""
        return self.held.result(self.sums) if self.held is not None and self.sums is not None else None

    @property
    def losses(self) -> RowLosses | None:
        """Those of each row."""
        if self.held is None or self.sums is None:
            return None
        return RowLosses.of(self.held.listed, self.sums, self.held.bytes)


@dataclass(frozen=True, eq=False)
class _Asked:
    """Everything but the model."""

    tokenizer: Any
    data: str = ""
    held: HeldOut | None = None
    lost: Mapping[str, int] = field(default_factory=dict)
    voice: Voice | None = None
    questions: Sequence[Question] = ()
    left_out: int = 0
    choices: EncodedQuestions | None = None
    tasks: Tasks | None = None
    longest: int = 0


def measure(name: str, found: Found, wanted: Measures, emit: Emit, allow_changed_base: bool) -> Side:
    """Reads what is asked, then loads the model and asks it. Data and base are read anew."""
    asked = _asked(found, wanted, emit)
    emit(Stage(f"loading {found.recipe.model.base}"))
    with memory_guard("loading the model"):
        loaded = load_model(found, emit, allow_changed_base)
        if found.adapter is None:  # a bare base has no embeddings yet of the tokens that the recipe adds
            make_room(loaded.model, len(asked.tokenizer))
    side = Side(name, found, asked.data, asked.held, lost=asked.lost, left_out=asked.left_out)
    for part in (_losses, _answers, _choices, _tasks):
        with memory_guard("evaluating"):
            side = part(side, asked, loaded, wanted, emit)
    del loaded
    gc.collect()
    return side


def _asked(found: Found, wanted: Measures, emit: Emit) -> _Asked:
    if wanted.tasks:
        check_harness()
    config, tokenizer = load_config(base_folder(found)), tokenizer_of(found)
    asked = _Asked(tokenizer, longest=positions(config))
    if wanted.choices is not None:
        questions = encode_questions(tokenizer, read_questions(wanted.choices), asked.longest)
        asked = replace(asked, choices=questions)
    if wanted.held_out:
        asked = _with_rows(asked, found, wanted, emit)
    if wanted.tasks:
        emit(Stage("reading the tasks of lm-evaluation-harness"))
        if wanted.chat_template:
            _set_template(tokenizer, found.recipe.data)
        asked = replace(asked, tasks=check_tasks(wanted.tasks, wanted.task_dir))
    return asked


def _with_rows(asked: _Asked, found: Found, wanted: Measures, emit: Emit) -> _Asked:
    data = found.recipe.data
    data = data.model_copy(update={"max_length": min(data.max_length, asked.longest)})
    rows, digests, chosen = load_held_out(data, setting_of(found.recipe, asked.tokenizer, emit))
    if found.adapter is not None:
        tell_changes("data", digests, found.adapter, emit)
    voice = Voice(asked.tokenizer, encoder_of(asked.tokenizer, chosen))
    count = len(rows) if wanted.limit is None else _sequences(rows, wanted.limit)
    held = HeldOut(rows[:count], rows.sources[:count], rows.names, voice.text)
    asked = replace(asked, data=data.eval or data.title, held=held, lost=_lost(rows.stores), voice=voice)
    if not wanted.metrics:
        return asked
    questions, left_out = questions_of(held, voice)
    return replace(asked, questions=questions, left_out=left_out)


def _sequences(rows: Sequence[Encoded], limit: int) -> int:
    """How many sequences the first `limit` rows became."""
    seen = set[str]()
    for count, row in enumerate(rows):
        seen.add(row.where)
        if len(seen) > limit:
            return count
    return len(rows)


def _lost(stores: Sequence[Store]) -> dict[str, int]:
    met = Counter[str]()
    for store in stores:
        met.update(fates(store))
    return {fate: count for fate, count in met.items() if fate != KEPT}


def _set_template(tokenizer: Any, data: DataSection) -> None:
    """The recipe's, where it names one: a base's tokenizer has its own."""
    apply_template(tokenizer, data.template, "messages" if data.format == "auto" else data.format, data.new_tokens)


def _losses(side: Side, asked: _Asked, loaded: Loaded, wanted: Measures, emit: Emit) -> Side:
    held = asked.held
    if held is None:
        return side
    emit(Stage(f"evaluating on {held.count:,} held-out rows"))
    recipe = loaded.recipe
    engine = build_engine(loaded.model, (), compiled=False)
    batching = Batching(wanted.batch_size or recipe.eval.batch_size, recipe.data.max_length, engine.packs)
    sums = sequence_losses(loaded.model, engine.losses, held.listed, batching, Ranks(loaded.device))
    check_finite(held, sums)
    return replace(side, sums=sums)


def _answers(side: Side, asked: _Asked, loaded: Loaded, wanted: Measures, emit: Emit) -> Side:
    if not asked.questions or asked.voice is None:
        return side
    emit(Stage(f"answering {len(asked.questions):,} held-out prompts"))
    how = Decoding(wanted.max_new_tokens), wanted.batch_size or BATCHED
    return replace(side, answers=answers(loaded.model, asked.questions, asked.voice, wanted.metrics, how))


def _choices(side: Side, asked: _Asked, loaded: Loaded, wanted: Measures, emit: Emit) -> Side:
    if asked.choices is None:
        return side
    emit(Stage(f"choosing in {len(asked.choices):,} multiple-choice rows"))
    size = wanted.batch_size or loaded.recipe.eval.batch_size
    return replace(side, choices=evaluate_choices(loaded.model, asked.choices, size, Ranks(loaded.device)))


def _tasks(side: Side, asked: _Asked, loaded: Loaded, wanted: Measures, emit: Emit) -> Side:
    if asked.tasks is None:
        return side
    emit(Stage(f"running {', '.join(asked.tasks.names)}"))
    size = wanted.batch_size or loaded.recipe.eval.batch_size
    longest = min(asked.longest, MOST_POSITIONS)
    how = Harness(size, longest, wanted.limit, wanted.chat_template)
    return replace(side, tasks=run_tasks(loaded.model, asked.tokenizer, asked.tasks, how, _meter(emit)))


def _meter(emit: Emit) -> Callable[[int, int], None]:
    told = [0]

    def tell(done: int, total: int) -> None:
        if done * 10 // total > told[0] or done < told[0]:
            told[0] = done * 10 // total
            emit(Stage(f"lm-eval: {done:,} of {total:,} requests"))

    return tell
