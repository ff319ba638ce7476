"""`qlora eval --generate`: an answer to every prompt of a file, in a file that an interrupted run goes on with.

Sees what the command line names. Invariant: what is drawn depends on the model, the prompts, the decoding and the batch
size only, so that a file that was interrupted, wherever that was, is the file that a single run writes, byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qlora_cli.data.sources import raise_all
from qlora_cli.errors import ModelError, Problem
from qlora_cli.evaluation.grading import digest
from qlora_cli.files import sha256
from qlora_cli.generation.sampling import Decoding
from qlora_cli.model.base import load_config
from qlora_cli.model.device import compute_dtype, find_machine
from qlora_cli.model.folder import BaseFolder, is_folder
from qlora_cli.workflows.card import RECIPE_FILE
from qlora_cli.workflows.chat import check_prompts, find_all, open_talk
from qlora_cli.workflows.events import Emit, Notice, Stage, duration
from qlora_cli.workflows.generate_files import AnswerFile, Question, check_output, encoded, read_questions
from qlora_cli.workflows.locate import Found, base_folder, tokenizer_of
from qlora_cli.workflows.prepare import local_rank
from qlora_cli.workflows.prompts import Prompt
from qlora_cli.workflows.runlock import locked
from qlora_cli.workflows.talk import SEEDS, Talk, encode, instructed
from qlora_cli.workflows.voice import room
from qlora_cli.workflows.voices import voice_of

PAPER = Decoding(max_new_tokens=1024, temperature=0.7, top_p=0.9)
"""Nucleus sampling as for the answers that the QLoRA paper compares (Dettmers et al. 2023, arXiv:2305.14314);
the limit is this project's."""


@dataclass(frozen=True)
class Wanted:
    """How prompts are to be answered; `quantization` and `allow_changed_base` are those of `open_talk`."""

    decoding: Decoding = PAPER
    batch_size: int = 32
    system: str | None = None
    quantization: str = "auto"
    allow_changed_base: bool = False


@dataclass(frozen=True)
class GenerateOutcome:
    """The file with all answers, what they were made by, and how many tokens they have; `kept` of them were there
    before, and `short` were cut at their limit."""

    output: Path
    made_by: Mapping[str, Any]
    prompts: int
    kept: int
    short: int
    tokens: int

    def line(self) -> str:
        """One line of text."""
        cut = f"; {self.short:,} were cut short at their limit" if self.short else ""
        if self.kept == self.prompts:
            return f"{self.output} has all {self.prompts:,} answers of {self.made_by['model']}: nothing left to do{cut}"
        there = f" ({self.kept:,} were there)" if self.kept else ""
        return f"{self.prompts:,} answers of {self.made_by['model']}{there}, {self.tokens:,} tokens, {self.output}{cut}"

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"event": "result", **asdict(self), "output": str(self.output)}


@dataclass(frozen=True)
class Answering:
    """`done` of `total` prompts are answered; `new` of them and `tokens` in the last `seconds`; `logged` about every
    tenth."""

    done: int
    total: int
    new: int
    tokens: int
    seconds: float
    logged: bool

    def line(self) -> str:
        """See `Event`."""
        left = duration(self.seconds / self.new * (self.total - self.done)) if self.new else "?"
        pace = f"{self.tokens / self.seconds:,.0f} tok/s" if self.seconds > 0 else ""
        return f"answered {self.done:,} of {self.total:,}  {pace}  eta {left}"

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        return {"event": "progress", "what": "answering", **asdict(self)}


def run_generate(
    target: str | None, adapter: Path | None, prompts: Path, output: Path, wanted: Wanted, emit: Emit
) -> GenerateOutcome:
    """Answers the prompts that have no answer in `output`, where `target` (a run, an adapter folder or a model) and
    `adapter` say who answers.

    Raises one `DataError` that names every row that cannot be answered, or what is in `output` and does not belong
    there, before any weight is loaded; `RunDirectoryError` where another process writes `output`.
    """
    output = output.expanduser()
    check_output(output)
    adapters = [adapter] if adapter is not None else []
    rows = read_questions(prompts, output)
    asked = [row.prompt if isinstance(row, Question) else row for row in rows]
    checked = check_prompts(asked, target, adapters, wanted.system)
    name, found = _speaker(target, adapters, wanted.quantization)
    _check_lengths(found, wanted.system, checked)
    questions = [row for row in rows if isinstance(row, Question)]
    made_by = _made_by(name, found, questions, wanted)
    with locked(output) as file:
        answers = AnswerFile(output, file, questions, made_by)
        answers.read(emit)
        kept = len(answers.rows)
        if kept < len(questions):
            talk = open_talk(target, adapters, emit, wanted.quantization, wanted.allow_changed_base)
            _answer_all(talk, questions, wanted, answers, emit)
    short = sum(not row["stopped"] for row in answers.rows)
    tokens = sum(row["tokens"] for row in answers.rows)
    return GenerateOutcome(output, made_by, len(questions), kept, short, tokens)


def _speaker(target: str | None, adapters: Sequence[Path], quantization: str) -> tuple[str, Found]:
    """Who answers, and what it is called."""
    found = find_all(target, adapters, quantization)
    if len(found) > 1:
        raise ModelError(
            f"{target} has an adapter of its own, and {adapters[0]} is another one",
            fix="name one of them, or the base before --adapter",
        )
    name, speaker = next(iter(found.items()))
    return name or _model_name(speaker.recipe.model.base), speaker


def _model_name(base: str) -> str:
    """A Hub id as it is; of a folder its own name, behind the run's where it is that of a full fine-tuning."""
    folder = Path(base).expanduser()
    if not is_folder(folder):
        return base
    parts = folder.resolve().parts
    return "/".join(parts[-2:] if parts[-1] == "model" else parts[-1:])


def _check_lengths(found: Found, system: str | None, prompts: Sequence[Prompt]) -> None:
    """Raises one `DataError` that names every prompt that leaves no room for an answer, or that the template refuses:
    the last one may else be reached after hours."""
    voice, space = voice_of(found, tokenizer_of(found)), partial(room, load_config(base_folder(found)))
    outcomes = [encode(voice, space, each.where, instructed(each.messages, system)) for each in prompts]
    raise_all([outcome for outcome in outcomes if isinstance(outcome, Problem)])


def _made_by(name: str, found: Found, questions: Sequence[Question], wanted: Wanted) -> dict[str, Any]:
    """All that decides what is answered, as plain values; of files and prompts a hash."""
    base, section = base_folder(found), found.recipe.model
    machine = find_machine(section.device, local_rank())
    dtype = str(compute_dtype(found.recipe.quantization.compute_dtype, machine)).removeprefix("torch.")
    return {
        "model": name,
        "base": _known(base, base.fingerprint),
        "adapter": _adapter(found.adapter) if found.adapter is not None else None,
        "quantization": found.quantization or "auto",
        "computing": f"{machine.device.type}, {dtype}",
        "prompts": digest(*(encoded(question.fields).decode() for question in questions)),
        "system": wanted.system,
        "batch_size": wanted.batch_size,
        "decoding": asdict(wanted.decoding),
    }


def _adapter(path: Path) -> str:
    folder = BaseFolder(path.name, path, None)
    return _known(folder, folder.hashes())


def _known(folder: BaseFolder, hashes: Mapping[str, str]) -> str:
    """What a folder's weights, configuration, tokenizer and template are known by, with the recipe beside them, which
    says how they are used."""
    recipe = folder.path / RECIPE_FILE
    return digest(json.dumps(hashes, sort_keys=True), sha256(recipe) if recipe.is_file() else "")


def _answer_all(talk: Talk, questions: Sequence[Question], wanted: Wanted, answers: AnswerFile, emit: Emit) -> None:
    """Answers what is missing, in batches that are the same whatever is there; of one that is there in part, the rows
    must come out as they are. Each is on the disk before the next begins."""
    talk.instruct(wanted.system)
    total, kept, started, tokens = len(questions), len(answers.rows), time.monotonic(), 0
    more = "more " if kept else ""
    emit(Stage(f"answering {total - kept:,} {more}of {total:,} prompts, {_shown(wanted.decoding)}"))
    try:
        for start in range(0, total, wanted.batch_size):
            end, before = min(start + wanted.batch_size, total), len(answers.rows)
            if end <= before:
                continue
            rows = _answered(talk, questions[start:end], wanted, start)
            new = answers.take(start, rows)
            tokens += sum(row["tokens"] for row in rows[-new:])
            logged = before * 10 // total != end * 10 // total
            emit(Answering(end, total, end - kept, tokens, time.monotonic() - started, logged))
    except BaseException:
        emit(Notice(f"{len(answers.rows):,} of {total:,} answers are kept in {answers.path}; the same command goes on"))
        raise


def _answered(talk: Talk, batch: Sequence[Question], wanted: Wanted, start: int) -> list[dict[str, Any]]:
    seeded = replace(wanted.decoding, seed=_seed(wanted.decoding.seed, start))
    said = talk.answers([question.prompt for question in batch], seeded, wanted.batch_size)
    return [{"answer": each.text, "stopped": each.stopped, "tokens": each.finish.tokens} for each in said]


def _seed(seed: int, start: int) -> int:
    """Of the batch that begins at row `start`: a hash, since seed + start of one seed is that of another one."""
    return int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:8], "big") % SEEDS


def _shown(decoding: Decoding) -> str:
    most = f"at most {decoding.max_new_tokens:,} tokens each"
    if decoding.temperature == 0:
        return f"greedy, {most}"
    return f"temperature {decoding.temperature:g}, top_p {decoding.top_p:g}, seed {decoding.seed}, {most}"
