"""`qlora chat` answers with exactly what was trained: one conversation, or a batch of prompts."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli.app import main
from qlora_cli.data.conversation import Message
from qlora_cli.data.dataset import Setting, load_data
from qlora_cli.errors import DataError, DiskError, ModelError
from qlora_cli.model.base import load_tokenizer
from qlora_cli.model.folder import find_base
from qlora_cli.recipe.schema import DataSection
from qlora_cli.workflows.chat import Decoding, Talk, open_talk
from qlora_cli.workflows.locate import MERGED
from tests.conftest import RECIPE, TEMPLATE, save_base, write_jsonl

Recipe = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
SHORT = Decoding(max_new_tokens=4)
GIBBERISH: dict[str, Any] = {"tie_word_embeddings": False, "vocab_size": 261, "initializer_range": 0.2}
"""A random base that says something else at each step (with tied embeddings it repeats itself)."""


def ignore(event: Any) -> None:
    """Nobody listens."""


def train(recipe: Path, run: Path, *options: str) -> Path:
    """A finished run in `run`."""
    assert main(["train", str(recipe), "-o", str(run), "-q", *options]) == 0
    return run


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that talks without end."""
    return save_base(tmp_path_factory.mktemp("talkative"), seed=4, **GIBBERISH)


@pytest.fixture
def run(recipe_file: Recipe, tmp_path: Path) -> Path:
    """A finished run that has learned its two answers a little."""
    return train(recipe_file(), tmp_path / "run")


@pytest.fixture
def other(recipe_file: Recipe, tmp_path: Path, run: Path) -> Path:
    """Another adapter on the same base: half its layers, other answers, and a template of its own."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "xy"[i % 2]}]}
        for i in range(24)
    ]
    text = RECIPE.replace("r: 4", "r: 2, targets: [q_proj, up_proj]").replace("eval_split: 4", "template: alpaca")
    return train(recipe_file(text, rows, "other.yaml"), tmp_path / "other", "-s", "train.lr=5e-2")


def said(talk: Talk, text: str, decoding: Decoding = SHORT) -> str:
    """A whole answer."""
    return "".join(talk.say(text, decoding))


def test_chat_answers_on_stdout_and_only_the_answer(run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(["chat", "--adapter", str(run), "-p", "q1", "--max-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert "loading" in captured.err
    assert main(["chat", str(run), "-p", "q1", "--max-tokens", "4", "-q"]) == 0
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err) == (captured.out, "")


def test_chat_reads_turns_from_stdin_and_remembers_them(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("q1\n\nq2\n"))
    capsys.readouterr()
    assert main(["chat", str(run), "--max-tokens", "3", "-q"]) == 0
    piped = capsys.readouterr().out
    talk = open_talk(str(run), None, ignore)
    said = ["".join(talk.say(turn, Decoding(max_new_tokens=3))) for turn in ("q1", "q2")]
    assert piped == "".join(f"{answer}\n" for answer in said)


def test_streamed_text_equals_the_batched_answer(run: Path) -> None:
    batched = open_talk(str(run), None, ignore).answer_all(["q1", "quite another"], 6)
    for prompt, expected in zip(["q1", "quite another"], batched, strict=True):
        pieces = list(open_talk(str(run), None, ignore).say(prompt, Decoding(max_new_tokens=6)))
        assert "".join(pieces) == expected


def test_the_template_saved_with_the_adapter_wins_over_a_base_that_changed(
    run: Path, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    (moved / "chat_template.jinja").write_text("{{ messages[0].content }}")
    answers = []
    for target in (base, moved):
        capsys.readouterr()
        assert main(["chat", str(target), "--adapter", str(run), "-p", "q1", "--max-tokens", "5", "-q"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_plain_completions_are_prompted_as_they_were_trained(recipe_file: Recipe, tmp_path: Path) -> None:
    rows = [{"input": f"{i} ->", "output": "ab"[i % 2]} for i in range(24)]
    text = RECIPE.replace("eval_split: 4", "format: prompt-completion, columns: {{prompt: input, completion: output}}")
    run = tmp_path / "run"
    assert main(["train", str(recipe_file(text, rows)), "-o", str(run), "-q"]) == 0
    talk = open_talk(str(run), None, ignore)
    assert len(talk.answer_all(["1 ->"], 3)) == 1


def test_a_base_given_by_a_relative_path_is_found_from_elsewhere_and_never_sought_on_the_hub(
    recipe_file: Recipe, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shutil.copytree(base, tmp_path / "out/base")
    run = tmp_path / "run"
    recipe = recipe_file()
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), "-s", "model.base=out/base", "-o", str(run), "-q"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["chat", str(run), "-p", "q1", "--max-tokens", "2", "-q"]) == 0
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    assert main(["chat", str(run), "-p", "q1"]) == 5
    assert "Hub cannot" not in capsys.readouterr().err


def test_a_conversation_ends_at_the_models_last_position(run: Path) -> None:
    talk = open_talk(str(run), None, ignore)
    long = "".join(talk.say("q" * 100, Decoding(max_new_tokens=500)))
    assert len(long) <= 128 - 100
    with pytest.raises(DataError, match="128 positions"):
        list(talk.say("q" * 100, Decoding()))


def test_adapters_of_one_base_answer_as_if_each_were_loaded_alone(run: Path, other: Path, base: Path) -> None:
    prompts = ["q1", "q2", "something else"]
    alone = {
        name: open_talk(str(path), None, ignore).answer_all(prompts, 5)
        for name, path in (("run", run), ("other", other))
    }
    assert alone["run"] != alone["other"]
    talk = open_talk(None, [run, other], ignore)
    assert (talk.voices.names, talk.voices.active) == (("run", "other"), "run")
    for name in ("run", "other", "run"):
        talk.voices.use(name)
        assert talk.answer_all(prompts, 5) == alone[name]
        talk.reset()
        assert said(talk, "q1", Decoding(5)) == alone[name][0]
    talk.voices.use(None)
    bare = open_talk(str(base), None, ignore)
    assert talk.answer_all(prompts, 5) == bare.answer_all(prompts, 5)
    with pytest.raises(KeyError):
        talk.voices.use("none")


def test_a_run_beside_an_adapter_is_one_more_adapter_and_a_model_beside_it_the_base(
    run: Path, other: Path, base: Path
) -> None:
    assert open_talk(str(run), [other, run, other / "adapter"], ignore).voices.names == ("run", "other")
    assert open_talk(str(base), [other, run], ignore).voices.names == ("other", "run")
    assert open_talk(str(base), None, ignore).voices.names == ()


def test_adapters_have_short_names_that_differ_from_each_other_and_from_the_bases(run: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "base"]
    for path in paths:
        shutil.copytree(run, path)
    assert open_talk(None, paths[:2], ignore).voices.names == ("a/run", "b/run")
    assert open_talk(None, [paths[2]], ignore).voices.names == (f"{tmp_path.name}/base",)


def test_adapters_of_other_bases_or_quantizations_are_refused_together_with_what_differs(
    run: Path, recipe_file: Recipe, tmp_path: Path, capsys: Capture
) -> None:
    own = save_base(tmp_path / "own", seed=1)
    apart = train(recipe_file(), tmp_path / "apart", "-s", f"model.base={own}", "-s", "quantization.type=fp4")
    plain = train(recipe_file(), tmp_path / "plain", "-s", "quantization.blocksize=32")
    capsys.readouterr()
    assert main(["chat", "--adapter", str(run), "--adapter", str(apart), "--adapter", str(plain), "-p", "q"]) == 5
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "apart differs from run in quantization.type (nf4 and fp4), its base" in error
    assert f"and {own}: model.safetensors)" in error
    assert "plain differs from run in quantization.blocksize (64 and 32)" in error


def loaded_as(capsys: Capture, *arguments: str) -> str:
    """What chat says of how it loads a model."""
    capsys.readouterr()
    assert main(["chat", *arguments, "-p", "q", "--max-new-tokens", "1"]) == 0
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("model "))


def test_a_merged_or_tuned_model_is_not_quantised_unasked_and_any_other_is(
    recipe_file: Recipe, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert "in 4 bits (nf4 with double quantization)" in loaded_as(capsys, str(base))
    assert "not quantised" in loaded_as(capsys, str(base), "--quantization", "none")
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    (merged / MERGED).write_text("{}")
    assert "not quantised" in loaded_as(capsys, str(merged))
    assert "in 4 bits (fp4 " in loaded_as(capsys, str(merged), "--quantization", "fp4")
    text = RECIPE.replace("lora: {{r: 4, alpha: 8}}", "lora: null").replace("float32}}", "float32, type: none}}")
    full = train(recipe_file(text), tmp_path / "full")
    for target in (full, full / "model"):
        assert "not quantised" in loaded_as(capsys, str(target))


def test_a_model_stored_in_four_bits_is_loaded_as_it_is(base: Path, tmp_path: Path, capsys: Capture) -> None:
    packed = str(tmp_path / "packed")
    assert main(["quantize", str(base), "-o", packed, "-q"]) == 0
    line = loaded_as(capsys, packed)
    assert "in 4 bits (nf4 with double quantization)" in line
    assert line.endswith("as stored in its files")
    assert loaded_as(capsys, packed, "--quantization", "nf4") == line
    assert main(["chat", packed, "--quantization", "fp4", "-p", "q"]) == 5
    assert "already quantised (nf4)" in capsys.readouterr().err


def test_an_adapters_own_quantization_is_not_overruled(run: Path, capsys: Capture) -> None:
    assert main(["chat", str(run), "--quantization", "none", "-p", "q"]) == 5
    assert "in nf4" in capsys.readouterr().err


def test_what_was_merged_speaks_in_the_template_of_its_recipe(
    run: Path, other: Path, base: Path, tmp_path: Path
) -> None:
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    shutil.copy(other / "adapter/recipe.yaml", merged)
    (merged / MERGED).write_text("{}")
    talk = open_talk(str(merged), None, ignore)
    prompt = talk.voices.voice.prompt([Message("user", "q")])
    assert "### Response:" in talk.voices.voice.text(prompt)


def test_a_second_turn_computes_what_is_new_in_it_only_and_a_switch_computes_all(run: Path, other: Path) -> None:
    talk = open_talk(None, [run, other], ignore)
    said(talk, "q1")
    first = talk.last
    assert first is not None and first.finish.reused_tokens == 0
    said(talk, "q2")
    second = talk.last
    assert second is not None
    assert second.finish.reused_tokens >= first.finish.prompt_tokens
    talk.voices.use("other")
    said(talk, "q3")
    assert talk.last is not None and talk.last.finish.reused_tokens == 0


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(run: Path) -> None:
    talk = open_talk(str(run), None, ignore)
    said(talk, "q1")
    before = talk.history
    for bad in ("q" * 200, "half a character: \ud83d"):
        with pytest.raises(DataError):
            said(talk, bad)
        assert talk.history == before
    said(talk, "q2")
    assert talk.history[:2] == before


def test_an_answer_stopped_by_its_reader_stays_as_far_as_it_was_said(talkative: Path) -> None:
    talk = open_talk(str(talkative), None, ignore)
    whole = said(talk, "q", Decoding(20))
    talk.reset()
    pieces = talk.say("q", Decoding(20))
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(begun)
    assert [message.content for message in talk.history] == ["q", begun]
    assert talk.last is not None and talk.last.ended == "interrupted"
    assert "stopped by you" in talk.last.line()
    talk.reset()
    talk.say("q", Decoding(20)).close()
    assert talk.history == ()


def test_the_limit_that_cut_an_answer_is_said(talkative: Path) -> None:
    talk = open_talk(str(talkative), None, ignore)
    said(talk, "q", Decoding(3))
    assert talk.last is not None and talk.last.limit_line() == "stopped at 3 tokens (max_new_tokens)"
    talk.reset()
    said(talk, "q" * 100, Decoding(500))
    assert talk.last is not None and talk.last.ended == "positions"
    assert talk.last.finish.tokens + talk.last.finish.prompt_tokens == 128


def test_retry_draws_anew_and_undo_takes_back(talkative: Path) -> None:
    talk = open_talk(str(talkative), None, ignore)
    hot = Decoding(8, temperature=3.0, seed=1)
    first = said(talk, "q", hot)
    second = "".join(talk.retry(hot))
    assert first != second
    assert [message.content for message in talk.history] == ["q", second]
    talk.reset()
    assert said(talk, "q", hot) == first
    assert talk.undo() == "q"
    assert not talk.history
    for nothing in (talk.undo, lambda: "".join(talk.retry(hot)), lambda: list(talk.compare(hot))):
        with pytest.raises(DataError, match="nothing to"):
            nothing()


def test_compare_answers_with_base_and_every_adapter_and_changes_nothing(run: Path, other: Path) -> None:
    talk = open_talk(None, [run, other], ignore)
    talk.voices.use("other")
    said(talk, "q1")
    before = talk.history
    answers = dict(talk.compare(SHORT))
    assert list(answers) == [None, "run", "other"]
    assert answers["other"].text == before[-1].content
    assert answers["run"].text == open_talk(str(run), None, ignore).answer_all(["q1"], 4)[0]
    assert (talk.history, talk.voices.active) == (before, "other")
    for name in ("run", None):
        talk.voices.use(name)
    spoken = talk.voices.voice
    bare = dict(talk.compare(SHORT))[None].text
    assert (talk.voices.active, talk.voices.voice) == (None, spoken)
    assert "".join(talk.retry(SHORT)) == bare


def test_a_system_message_comes_first_and_one_that_the_template_drops_is_refused(base: Path, tmp_path: Path) -> None:
    talk = open_talk(str(base), None, ignore)
    talk.instruct("be brief")
    said(talk, "q")
    assert [message.role for message in talk.history] == ["system", "user", "assistant"]
    talk.reset()
    assert talk.history == (Message("system", "be brief"),)
    talk.instruct(None)
    assert not talk.history
    for template in (
        TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE,
    ):
        deaf = tmp_path / "deaf"
        shutil.copytree(base, deaf, dirs_exist_ok=True)
        (deaf / "chat_template.jinja").write_text(template)
        talk = open_talk(str(deaf), None, ignore)
        with pytest.raises(DataError, match="system"):
            talk.instruct("be brief")
        assert talk.system is None


def test_a_saved_conversation_is_a_row_that_training_reads(run: Path, base: Path, tmp_path: Path) -> None:
    talk = open_talk(str(run), None, ignore)
    file = tmp_path / "said.jsonl"
    with pytest.raises(DataError, match="nothing was said"):
        talk.save(file)
    assert not file.exists()
    talk.instruct("be brief")
    said(talk, "q1\nand “ü”", Decoding(8))
    said(talk, "q2")
    assert talk.save(file).startswith(f"written to new {file}: 5 messages")
    file.write_text(file.read_text().rstrip("\n"))
    assert talk.save(file).startswith(f"appended to {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [{"role": message.role, "content": message.content} for message in talk.history]
    assert rows == [{"messages": expected}] * 2
    data = load_data(DataSection(train=str(file), max_length=128), Setting(load_tokenizer(find_base(str(base), None))))
    assert (len(data.train), data.receipt.sources[0].kept) == (2, 2)
    for path, error in ((tmp_path / "none/x.jsonl", DiskError), (tmp_path / "x.txt", DataError)):
        with pytest.raises(error):
            talk.save(path)
        assert not path.exists()


def test_an_answer_cut_short_is_saved_with_a_warning_and_an_empty_one_is_not(talkative: Path, tmp_path: Path) -> None:
    talk = open_talk(str(talkative), None, ignore)
    said(talk, "q", Decoding(2))
    assert "1 of its answers were cut short" in talk.save(tmp_path / "x.jsonl")
    talk = open_talk(str(save_base(tmp_path / "silent", seed=0, **GIBBERISH)), None, ignore)
    assert said(talk, "q") == ""
    with pytest.raises(DataError, match="answer 1 is empty"):
        talk.save(tmp_path / "y.jsonl")


def rows_of(capsys: Capture) -> list[dict[str, Any]]:
    """stdout as JSON rows."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_file_of_prompts_is_answered_in_order_each_as_it_would_be_alone(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    turns = [
        {"role": role, "content": content} for role, content in (("user", "q1"), ("assistant", "b"), ("user", "q2"))
    ]
    file = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": "q1", "id": 7}, {"messages": turns}, {"prompt": "quite\nanother"}]
    )
    command = ["chat", str(run), "--prompts", str(file), "--max-new-tokens", "5"]
    capsys.readouterr()
    found = []
    for size in ("1", "2", "32"):
        assert main([*command, "--batch-size", size]) == 0
        found.append(rows_of(capsys))
    assert found[0] == found[1] == found[2]
    keys = ["prompt", "messages", "prompt"]
    assert [list(row) for row in found[0]] == [[key, "answer", "stopped"] for key in keys]
    assert found[0][1]["messages"] == turns
    assert found[0][2]["prompt"] == "quite\nanother"
    talk = open_talk(str(run), None, ignore)
    assert found[0][0]["answer"] == said(talk, "q1", Decoding(5))
    assert main([*command, "--json", "-q"]) == 0
    events = rows_of(capsys)
    answers = [event for event in events if event["event"] == "answer"]
    assert [{key: row[key] for key in found[0][i]} for i, row in enumerate(answers)] == found[0]
    assert all(row["tokens"] == 5 or row["stopped"] for row in answers)


def test_answers_cut_short_are_counted_on_stderr_and_marked_in_their_rows(
    talkative: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q1"}, {"prompt": "q2"}, {"prompt": "q" * 110}])
    assert main(["chat", str(talkative), "--prompts", str(file), "--max-new-tokens", "9"]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    short = sum(not row["stopped"] for row in rows)
    assert short >= 1
    assert f"note: {short} of 3 answers were cut short at their limit (max_new_tokens is 9)" in captured.err


def test_draws_are_the_same_with_the_same_seed_and_others_with_another(
    talkative: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{i}"} for i in range(4)])
    command = ["chat", str(talkative), "--prompts", str(file), "--max-new-tokens", "6", "--temperature", "2"]
    found = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]
    assert main(["chat", str(talkative), "-p", "q", "--max-new-tokens", "6", "--temperature", "2", "-q"]) == 0
    assert (
        main(["chat", str(talkative), "-p", "q", "--max-new-tokens", "6", "--temperature", "2", "--seed", "0", "-q"])
        == 0
    )
    one, two = capsys.readouterr().out.split("\n")[:2]
    assert one == two


def test_all_bad_rows_are_named_at_once_before_the_model_is_loaded(tmp_path: Path, capsys: Capture) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "good"}, {"text": "a"}, {"prompt": 3}, {"messages": turns}, {"messages": [], "prompt": "x"}, [1]]
    file = write_jsonl(tmp_path / "p.jsonl", rows[:5])
    assert main(["chat", "no/such/model", "--prompts", str(file)]) == 4
    error = capsys.readouterr().err
    assert [line.split(": ")[1] for line in error.splitlines() if line.startswith("error")] == [
        f"{file}:{n}" for n in (2, 3, 4, 5)
    ]
    assert "there is nothing to answer" in error
    write_jsonl(file, rows)
    assert main(["chat", "no/such/model", "--prompts", str(file)]) == 4
    assert main(["chat", "no/such/model", "--prompts", str(tmp_path / "none.jsonl")]) == 4
    assert main(["chat", "no/such/model", "--prompts", str(file), "-p", "q"]) == 2


def test_prompts_longer_than_the_models_positions_are_all_named_before_any_answer(
    base: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q"}, {"prompt": "q" * 200}, {"prompt": "q" * 300}])
    assert main(["chat", str(base), "--prompts", str(file)]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{file}:2: the conversation has" in captured.err
    assert f"{file}:3: the conversation has" in captured.err


def test_malformed_and_too_long_rows_are_named_together_before_any_weight_is_loaded(
    base: Path, tmp_path: Path, capsys: Capture
) -> None:
    rows = [{"prompt": "q"}, {"prompt": "q" * 200}, {"prompt": 3}, {"prompt": "q" * 90}]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    for system, wrong in (([], (2, 3)), (["--system", "s" * 40], (2, 3, 4))):
        assert main(["chat", str(base), "--prompts", str(file), *system]) == 4
        error = capsys.readouterr().err
        assert [line.split(": ")[1] for line in error.splitlines() if line.startswith("error")] == [
            f"{file}:{n}" for n in wrong
        ]
        assert "loading" not in error


def test_all_of_stdin_is_one_prompt_with_a_dash(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert main(["chat", str(base), "--prompt", "-", "--json", "--max-new-tokens", "3", "--system", "be brief"]) == 0
    answer = rows_of(capsys)[-2]
    assert [message["content"] for message in answer["messages"]] == ["be brief", "two\nlines"]
    assert (answer["event"], answer["tokens"], answer["stopped"]) == ("answer", 3, False)


def test_stdin_that_is_not_utf8_is_a_data_error(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for options in ([], ["-p", "-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"q\xff\n"), encoding="utf-8"))
        assert main(["chat", str(base), *options]) == 4
        assert "stdin is not UTF-8" in capsys.readouterr().err


def test_decoding_is_what_the_models_generation_config_says_unless_given(
    base: Path, tmp_path: Path, capsys: Capture
) -> None:
    own = Path(shutil.copytree(base, tmp_path / "own"))
    config = {"do_sample": True, "temperature": 0.7, "top_k": 3, "eos_token_id": 2}
    (own / "generation_config.json").write_text(json.dumps(config))
    found = open_talk(str(own), None, ignore).voices.defaults()
    assert (found.temperature, found.top_k, found.max_new_tokens) == (0.7, 3, 512)
    assert main(["chat", str(base), "-p", "q", "--top-k", "4", "--max-new-tokens", "1"]) == 0
    assert "top_k without effect" in capsys.readouterr().err
    assert main(["chat", str(own), "-p", "q", "--top-k", "4", "--max-new-tokens", "1"]) == 0
    assert "without effect" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [("--temperature", "nan"), ("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "1.1"), ("--top-k", "x")],
)
def test_settings_out_of_range_are_wrong_usage(option: tuple[str, str], capsys: Capture) -> None:
    assert main(["chat", "no/such/model", "-p", "q", *option]) == 2
    assert f"{option[1]}" in capsys.readouterr().err


def test_a_model_beside_the_adapters_must_be_their_base(run: Path, tmp_path: Path) -> None:
    own = save_base(tmp_path / "own", seed=1)
    with pytest.raises(ModelError, match=r"model\.safetensors changed"):
        open_talk(str(own), [run], ignore)
    assert open_talk(str(own), [run], ignore, allow_changed_base=True).voices.names == ("run",)
