"""`qlora eval --generate`: a file of answers that is the same, byte by byte, wherever its run was interrupted."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from qlora_cli.cli.app import main
from qlora_cli.errors import DataError, DiskError, ModelError, RunDirectoryError
from qlora_cli.generation.sampling import Decoding
from qlora_cli.workflows.chat import open_talk
from qlora_cli.workflows.events import Event, Notice, Stage
from qlora_cli.workflows.generate import PAPER, Answering, GenerateOutcome, Wanted, run_generate
from qlora_cli.workflows.judge_files import pair
from tests.conftest import RECIPE, chat_rows, save_base, write_jsonl

ROOT = Path(__file__).parents[2]
DRAWN = replace(PAPER, max_new_tokens=10)
GREEDY = Decoding(max_new_tokens=6)
TURNS = [{"role": r, "content": c} for r, c in (("user", "q1"), ("assistant", "b"), ("user", "q2"))]
ROWS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "“writing”", "prompt": "q1"},
    {"question_id": "x", "messages": TURNS, "score": 1.5, "reference": {"answer": ""}},
    *({"question_id": i, "prompt": f"what is {i}?"} for i in range(3, 8)),
]
"""Seven prompts: four batches of two, the last of which has one."""


def ignore(event: Event) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that says something else at each step."""
    folder = tmp_path_factory.mktemp("model") / "talkative"
    return save_base(folder, seed=4, tie_word_embeddings=False, vocab_size=261, initializer_range=0.2)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on that base."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "tiny.yaml"
    data = write_jsonl(folder / "rows.jsonl", chat_rows(24))
    recipe.write_text(RECIPE.format(base=model, data=data), encoding="utf-8")
    assert main(["train", str(recipe), "-o", str(folder / "run"), "-q"]) == 0
    return folder / "run"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The seven prompts in a file."""
    return write_jsonl(tmp_path / "prompts.jsonl", ROWS)


@pytest.fixture
def answer(model: Path, prompts: Path, tmp_path: Path) -> Callable[..., GenerateOutcome]:
    """A function that answers the seven prompts in batches of two, into answers.jsonl unless told otherwise."""

    def call(
        name: str = "answers.jsonl",
        emit: Callable[[Event], None] = ignore,
        target: Path | None = model,
        adapter: Path | None = None,
        questions: Path = prompts,
        **wanted: Any,
    ) -> GenerateOutcome:
        asked = Wanted(**{"decoding": DRAWN, "batch_size": 2, **wanted})
        return run_generate(None if target is None else str(target), adapter, questions, tmp_path / name, asked, emit)

    return call


Answer = Callable[..., GenerateOutcome]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stopping(after: int) -> Callable[[Event], None]:
    """A listener that interrupts behind so many batches (0: before the first one)."""
    seen = -1

    def listen(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, Answering) or (isinstance(event, Stage) and event.text.startswith("answering"))
        if seen == after and not isinstance(event, Notice):
            raise KeyboardInterrupt

    return listen


def test_each_prompt_gets_a_row_in_its_place_with_all_its_own_row_says(answer: Answer, model: Path) -> None:
    outcome = answer(decoding=GREEDY, batch_size=32)
    found = rows_of(outcome.output)
    assert [list(row) for row in found] == [[*row, "made_by", "answer", "stopped", "tokens"] for row in ROWS]
    assert [{key: row[key] for key in asked} for row, asked in zip(found, ROWS, strict=True)] == ROWS
    assert all(row["made_by"] == outcome.made_by for row in found)
    assert {key: outcome.made_by[key] for key in ("model", "adapter", "batch_size")} == {
        "model": "talkative",
        "adapter": None,
        "batch_size": 32,
    }
    assert all((row["tokens"] < 6) if row["stopped"] else (row["tokens"] == 6) for row in found)
    assert (outcome.prompts, outcome.kept, outcome.tokens) == (7, 0, sum(row["tokens"] for row in found))
    assert outcome.as_json()["made_by"]["decoding"]["max_new_tokens"] == 6
    assert "“writing”" in outcome.output.read_text(encoding="utf-8")


def test_greedy_answers_are_those_of_the_same_model_in_chat(answer: Answer, run: Path, tmp_path: Path) -> None:
    texts = ["q1", "q2", "something else"]
    questions = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    answer(target=run, questions=questions, decoding=GREEDY, batch_size=32)
    expected = open_talk(str(run), None, ignore).answer_all(texts, 6)
    assert [row["answer"] for row in rows_of(tmp_path / "answers.jsonl")] == expected
    answer("same.jsonl", target=None, adapter=run / "adapter", questions=questions, decoding=GREEDY, batch_size=32)
    assert (tmp_path / "same.jsonl").read_bytes() == (tmp_path / "answers.jsonl").read_bytes()


def test_a_run_interrupted_between_any_two_batches_goes_on_to_the_very_same_file(answer: Answer) -> None:
    whole = answer("whole.jsonl").output.read_bytes()
    for batches in range(4):
        name = f"{batches}.jsonl"
        told: list[Event] = []
        stop = stopping(batches)

        def listen(event: Event, stop: Callable[[Event], None] = stop, told: list[Event] = told) -> None:
            told.append(event)
            stop(event)

        with pytest.raises(KeyboardInterrupt):
            answer(name, listen)
        if batches:
            assert told[-1].line().startswith(f"note: {2 * batches} of 7 answers are kept in")
        outcome = answer(name)
        assert (outcome.kept, outcome.output.read_bytes() == whole) == (2 * batches, True)
        assert f"({outcome.kept} were there)" in outcome.line() or not batches


KILLED = """\
import os, signal, sys, threading
from pathlib import Path
from qlora_cli.generation.sampling import Decoding
from qlora_cli.workflows.generate import Answering, Wanted, run_generate

def listen(event):
    if isinstance(event, Answering) and event.done == 2:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()

model, prompts, output, decoding = sys.argv[1:]
run_generate(model, None, Path(prompts), Path(output), Wanted(eval(decoding), batch_size=2), listen)
"""
"""Kills itself a little after the first batch, whatever it does then."""


def test_a_killed_process_loses_a_batch_at_most_and_the_next_one_makes_the_same_file(
    answer: Answer, model: Path, tmp_path: Path
) -> None:
    questions = write_jsonl(tmp_path / "many.jsonl", [{"prompt": f"q{i}"} for i in range(24)])
    output, long = tmp_path / "killed.jsonl", replace(DRAWN, max_new_tokens=60)
    command = [sys.executable, "-c", KILLED, str(model), str(questions), str(output), repr(long)]
    assert subprocess.run(command, cwd=ROOT, timeout=200, check=False).returncode == -signal.SIGKILL
    outcome = answer("killed.jsonl", questions=questions, decoding=long)
    whole = answer("whole.jsonl", questions=questions, decoding=long)
    assert 0 < outcome.kept < 24
    assert output.read_bytes() == whole.output.read_bytes()


def test_a_row_cut_short_is_removed_and_answered_again(answer: Answer, tmp_path: Path) -> None:
    whole = answer("whole.jsonl").output.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    quote = whole.index("“".encode()) + 1  # within a character
    for size in (1, quote, ends[0], ends[0] + 1, ends[2] - 3, ends[3] + 2):
        told: list[Event] = []
        path = tmp_path / f"{size}.jsonl"
        path.write_bytes(whole[:size])
        outcome = answer(path.name, told.append)
        assert path.read_bytes() == whole
        number = whole[:size].count(b"\n")
        assert outcome.kept == number
        cut = f"note: {path}:{number + 1}: the last row was cut short when a run was killed; it is removed"
        assert (cut in [event.line() for event in told]) == (size not in {end + 1 for end in ends})


def test_the_papers_draws_are_the_same_with_the_same_seed_and_others_with_another(answer: Answer) -> None:
    assert (PAPER.temperature, PAPER.top_p, PAPER.max_new_tokens) == (0.7, 0.9, 1024)
    said = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2)):
        answer(f"{name}.jsonl", decoding=replace(DRAWN, seed=seed))
        said[name] = [
            row["answer"] for row in rows_of(answer(f"{name}.jsonl", decoding=replace(DRAWN, seed=seed)).output)
        ]
    assert said["a"] == said["b"]
    assert said["a"] != said["c"] != said["d"] != said["a"]


def test_the_same_question_asked_again_is_drawn_anew(answer: Answer, tmp_path: Path) -> None:
    """In the same batch, in another one, and where there is less room than the limit, so that it is answered alone."""
    hot = Decoding(40, temperature=2.0)
    for texts, batch_size in ((["q"] * 4, 2), (["q" * 95, "q"] * 2, 4)):
        questions = write_jsonl(tmp_path / "p.jsonl", [{"question_id": i, "prompt": t} for i, t in enumerate(texts)])
        rows = rows_of(answer(f"{batch_size}.jsonl", questions=questions, decoding=hot, batch_size=batch_size).output)
        said = [(row["prompt"], row["answer"][:6]) for row in rows]
        assert len(set(said)) == len(said) == 4


def test_the_batches_of_one_seed_are_not_those_of_another(answer: Answer, tmp_path: Path) -> None:
    """Nor would they be if seeds counted on from batch to batch: 0 would then come to 2 in the second one."""
    questions = write_jsonl(tmp_path / "p.jsonl", [{"question_id": i, "prompt": "q"} for i in range(4)])
    hot = Decoding(20, temperature=2.0)
    files = [answer(f"{n}.jsonl", questions=questions, decoding=replace(hot, seed=n)).output for n in (0, 2)]
    said = [row["answer"] for file in files for row in rows_of(file)]
    assert len(set(said)) == len(said) == 8


def test_a_finished_file_needs_no_model_and_stays_as_it_is(answer: Answer) -> None:
    whole = answer().output.read_bytes()
    told: list[Event] = []
    outcome = answer(emit=told.append)
    assert (told, outcome.kept, outcome.output.read_bytes()) == ([], 7, whole)
    assert "all 7 answers of talkative: nothing left to do" in outcome.line()


def refused(answer: Answer, where: str, what: str, **changes: Any) -> None:
    """Asserts that the call is refused as told, that nothing was loaded, and that the file is as it was."""
    told: list[Event] = []
    path = Path(where.rpartition(":")[0])
    before = path.read_bytes()
    with pytest.raises(DataError) as error:
        answer(path.name, told.append, **changes)
    problem = error.value.problems[0]
    assert (problem.where, what in problem.what) == (where, True), str(problem)
    assert (told, path.read_bytes()) == ([], before)


def test_another_model_decoding_or_file_of_prompts_is_refused_by_name(
    answer: Answer, model: Path, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        answer(emit=stopping(1))
    where = f"{tmp_path}/answers.jsonl:1"
    tepid, more = replace(DRAWN, temperature=0.5), write_jsonl(tmp_path / "more.jsonl", [*ROWS, {"prompt": "new"}])
    other = save_base(tmp_path / "talkative", seed=5, tie_word_embeddings=False, vocab_size=261)
    refused(answer, where, "made by something else: decoding.temperature (0.7 there, 0.5 now)", decoding=tepid)
    refused(answer, where, "decoding.seed (0 there, 1 now)", decoding=replace(DRAWN, seed=1))
    refused(answer, where, "batch_size (2 there, 3 now)", batch_size=3)
    refused(answer, where, 'system (null there, "be brief" now)', system="be brief")
    refused(answer, where, 'quantization ("auto" there, "none" now)', quantization="none")
    refused(answer, where, "made by something else: base (", target=other)
    refused(answer, where, "adapter (null there, ", target=run)
    refused(answer, where, "made by something else: prompts (", questions=more)
    changed = [{**row, "prompt": "another"} if row["question_id"] == 7 else row for row in ROWS]
    refused(answer, where, "made by something else: prompts (", questions=write_jsonl(tmp_path / "c.jsonl", changed))


def test_another_adapter_of_the_same_name_is_refused(answer: Answer, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    (other / "adapter/manifest.json").unlink()
    weights = other / "adapter/adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(KeyboardInterrupt):
        answer(emit=stopping(1), target=run)
    refused(answer, f"{tmp_path}/answers.jsonl:1", "made by something else: adapter (", target=other)


def test_a_row_that_is_no_answer_to_its_prompt_is_refused_with_its_line(answer: Answer, tmp_path: Path) -> None:
    whole = answer("whole.jsonl").output.read_bytes()
    lines = whole.splitlines(keepends=True)
    path = tmp_path / "bad.jsonl"
    no_row, other = "not a row of answers", "not as the answer to"
    first = json.loads(lines[0])
    cases = [
        (b"not json\n" + whole, 1, no_row),
        (lines[0] + b"\n" + lines[1], 2, no_row),
        (b"[]\n", 1, no_row),
        (b'{"prompt": "q1", "answer": "a"}\n', 1, no_row),
        (json.dumps({**first, "stopped": 0}).encode() + b"\n", 1, no_row),
        (json.dumps({**first, "made_by": "me"}).encode() + b"\n", 1, no_row),
        (lines[0] + lines[2], 2, other),
        (lines[0].replace(b"\n", b"\r\n"), 1, other),
        (lines[0] + lines[1].replace(b"1.5", b"2.5"), 2, other),
        (whole + lines[6], 8, "there are only 7 prompts"),
        (lines[0] + b"oops", 2, "the last row is cut short, and is no answer to the next prompt"),
        (lines[0] + lines[2][:-9], 2, "the last row is cut short"),
        (lines[0] + lines[1].replace(b'"talkative"', b'"other"')[:-9], 2, "the last row is cut short"),
        (whole + lines[6][:9], 8, "the last row is cut short"),
    ]
    for content, number, what in cases:
        path.write_bytes(content)
        refused(answer, f"{path}:{number}", what)


def test_half_a_batch_that_comes_out_otherwise_is_refused(answer: Answer, tmp_path: Path) -> None:
    path = answer().output
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = json.dumps({**json.loads(lines[2]), "answer": "never said"}, ensure_ascii=False) + "\n"
    path.write_text("".join([*lines[:2], changed]), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(DataError) as error:
        answer()
    problem = error.value.problems[0]
    assert (problem.where, "another one" in problem.what) == (f"{path}:3", True)
    assert "remove the last 1 rows" in problem.fix
    assert path.read_bytes() == before


def test_all_prompts_that_cannot_be_answered_are_named_at_once_and_nothing_is_written(
    answer: Answer, tmp_path: Path
) -> None:
    rows = [
        {"question_id": 1, "prompt": "good"},
        {"question_id": 2, "prompt": "q", "answer": "reference", "tokens": 3},
        {"question_id": 1.5, "prompt": "q"},
        {"question_id": 3, "prompt": 3},
        {"question_id": 4, "prompt": "q" * 200},
        {"question_id": "1", "prompt": "comes twice"},
    ]
    for questions, wrong in ((rows, [2, 3, 4, 5, 6]), ([rows[0], rows[4]], [2]), ([{"prompt": "q"}] * 3, [2, 3])):
        file = write_jsonl(tmp_path / "p.jsonl", questions)
        told: list[Event] = []
        with pytest.raises(DataError) as error:
            answer("none.jsonl", told.append, questions=file)
        assert [problem.where for problem in error.value.problems] == [f"{file}:{number}" for number in wrong]
        assert (told, (tmp_path / "none.jsonl").exists()) == ([], False)
    with pytest.raises(DataError, match=r"the same question is at .*:1 already"):
        answer(questions=write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q"}, {"prompt": "q", "question_id": 1}]))


def test_a_field_that_json_has_no_word_for_is_named(answer: Answer, tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["q1", "q2"], "day": [None, date(2023, 5, 23)]}), file)
    with pytest.raises(DataError, match=rf"{file}:2: the row cannot be written as JSON"):
        answer(questions=file)


def test_a_system_message_is_said_to_the_model_and_not_taken_for_the_prompts(answer: Answer) -> None:
    plain, told = answer("a.jsonl", decoding=GREEDY), answer("b.jsonl", decoding=GREEDY, system="be brief")
    one, two = rows_of(plain.output), rows_of(told.output)
    assert [row["answer"] for row in one] != [row["answer"] for row in two]
    assert two[0]["made_by"] == {**one[0]["made_by"], "system": "be brief"}
    assert len(pair((plain.output, told.output))) == 7


def test_bad_prompts_are_named_though_there_is_no_such_model(answer: Answer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl:1"):
        answer(target=tmp_path / "no/model", questions=write_jsonl(tmp_path / "p.jsonl", [{"text": "q"}]))


def test_a_place_where_no_rows_can_be_appended_is_refused(answer: Answer, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "link.jsonl").symlink_to(prompts)
    before = prompts.read_bytes()
    cases = [
        ("answers.txt", r"rows of a \.jsonl file"),
        ("none/answers.jsonl", "is no folder"),
        ("folder.jsonl", "is no regular file"),
        (prompts.name, "holds the prompts"),
        ("link.jsonl", "holds the prompts"),
    ]
    for name, what in cases:
        with pytest.raises(DataError, match=what):
            answer(name)
    assert prompts.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.jsonl", "link.jsonl", prompts.name]


def test_two_runs_never_write_the_same_file_at_once(answer: Answer) -> None:
    errors: list[RunDirectoryError] = []

    def listen(event: Event) -> None:
        if isinstance(event, Answering):
            with pytest.raises(RunDirectoryError, match="in use by another process") as error:
                answer()
            errors.append(error.value)

    whole = answer("whole.jsonl").output.read_bytes()
    assert answer(emit=listen).output.read_bytes() == whole
    assert [error.exit_code for error in errors] == [10] * 4


def test_a_full_disk_keeps_what_is_there_and_the_same_command_goes_on(answer: Answer) -> None:
    whole = answer("whole.jsonl").output.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"answers\.jsonl"):
            answer()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    outcome = answer()
    assert outcome.kept > 0
    assert outcome.output.read_bytes() == whole


def test_answers_of_two_models_pair_for_a_judge(answer: Answer, run: Path, tmp_path: Path) -> None:
    files = (answer("base.jsonl").output, answer("tuned.jsonl", target=run).output)
    questions = pair(files)
    assert [question.id for question in questions] == [row["question_id"] for row in ROWS]
    said = [[row["answer"] for row in rows_of(file)] for file in files]
    assert [question.answers for question in questions] == list(zip(*said, strict=True))
    assert said[0] != said[1]


def test_a_run_beside_another_adapter_is_refused(answer: Answer, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    with pytest.raises(ModelError, match="has an adapter of its own"):
        answer(target=run, adapter=other)
    assert not (tmp_path / "answers.jsonl").exists()


def test_progress_counts_prompts_and_tells_every_tenth(answer: Answer) -> None:
    told: list[Event] = []
    outcome = answer(emit=told.append)
    steps = [event for event in told if isinstance(event, Answering)]
    assert [(step.done, step.total, step.new) for step in steps] == [(2, 7, 2), (4, 7, 4), (6, 7, 6), (7, 7, 7)]
    assert steps[-1].tokens == outcome.tokens
    assert steps[0].line().startswith("answered 2 of 7  ")
    assert steps[0].as_json()["event"] == "progress"
