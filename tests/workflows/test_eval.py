"""`qlora eval` on held-out rows: per source, answered, against another model, row by row."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_cli.cli.app import main
from qlora_cli.evaluation.intervals import mcnemar
from qlora_cli.workflows.chat import open_talk
from tests.conftest import RECIPE, chat_rows, make_llama, make_tokenizer, save_base, write_jsonl
from tests.evaluation.test_harness import folder, no_cache

__all__ = ["folder", "no_cache"]  # fixtures

Recipe = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
LEARNS = RECIPE.replace("steps: 6", "steps: 40").replace("eval_split: 4", "eval_split: 8")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter answers `a` or `b`, as its rows do."""
    folder = tmp_path_factory.mktemp("eval")
    data = write_jsonl(folder / "rows.jsonl", chat_rows(24))
    (folder / "tiny.yaml").write_text(LEARNS.format(base=base, data=data))
    assert main(["train", str(folder / "tiny.yaml"), "-o", str(folder / "run"), "-q"]) == 0
    return folder / "run"


def evaluated(capsys: Capture, *arguments: str | Path) -> dict[str, Any]:
    """What an evaluation that must succeed says with --json."""
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--json", "-q"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return value


def refused(capsys: Capture, code: int, *arguments: str | Path) -> str:
    """The error of an evaluation that must end with `code`."""
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "-q"]) == code
    return capsys.readouterr().err


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_figure_is_the_sum_of_the_rows_that_are_written(run: Path, tmp_path: Path, capsys: Capture) -> None:
    rows, result = tmp_path / "rows.jsonl", tmp_path / "result.json"
    found = evaluated(capsys, run, "--metric", "exact", "--metric", "regex:^b", "--rows", rows, "-o", result)
    told = lines(rows)
    assert len(told) == found["rows"] == 8
    assert found["loss"] == pytest.approx(sum(row["loss_sum"] for row in told) / sum(row["targets"] for row in told))
    bits = sum(row["loss_sum"] for row in told) / math.log(2) / sum(row["bytes"] for row in told)
    assert found["bits_per_byte"] == pytest.approx(bits)
    assert found["interval"]["low"] <= found["loss"] <= found["interval"]["high"]
    exact, pattern = found["scores"]
    assert exact["right"] == sum(row["right"]["exact"] for row in told) >= 1
    assert all(row["right"]["exact"] == (row["answer"].strip() == row["wanted"]) for row in told)
    assert pattern["right"] == sum(row["answer"].startswith("b") for row in told)
    assert exact["low"] <= exact["share"] <= exact["high"]
    assert json.loads(result.read_text()) == found


def test_answers_are_those_of_chat_and_the_wanted_ones_those_of_the_rows(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = write_jsonl(tmp_path / "new.jsonl", chat_rows(5))
    rows = tmp_path / "out.jsonl"
    evaluated(capsys, run, "--data", data, "--metric", "exact", "--rows", rows)
    told = lines(rows)
    assert [row["where"] for row in told] == [f"{data}:{i}" for i in range(1, 6)]
    assert [row["wanted"] for row in told] == [each["messages"][1]["content"] for each in chat_rows(5)]
    prompts = [each["messages"][0]["content"] for each in chat_rows(5)]
    assert [row["answer"] for row in told] == open_talk(str(run), None, lambda event: None).answer_all(prompts, 256)


def test_several_turns_ask_for_the_last_answer(run: Path, tmp_path: Path, capsys: Capture) -> None:
    turns = [("user", "q1"), ("assistant", "a"), ("user", "q2"), ("assistant", "zz")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    data, rows = write_jsonl(tmp_path / "two.jsonl", [row]), tmp_path / "out.jsonl"
    evaluated(capsys, run, "--data", data, "--metric", "contains", "--rows", rows)
    assert lines(rows)[0]["wanted"] == "zz"


def test_against_the_base_the_difference_is_that_of_both_runs_alone(run: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = tmp_path / "rows.jsonl"
    both = evaluated(capsys, run, "--metric", "exact", "--against", "base", "--rows", rows)
    base = evaluated(capsys, run.parent / "tiny.yaml", "--metric", "exact")
    other = both["against"]
    assert other["loss"] == pytest.approx(base["loss"], rel=1e-6)
    assert other["adapter"] is None
    gap = other["difference"]
    assert gap["mean"] == pytest.approx(both["loss"] - base["loss"])
    assert gap["low"] < gap["mean"] < gap["high"] < 0
    assert (gap["unit"], gap["rows"], gap["unpaired"]) == ("nats per token", 8, 0)
    told = lines(rows)
    here = np.array([row["right"]["exact"] for row in told])
    there = np.array([row["against"]["right"]["exact"] for row in told])
    mine, theirs = int((here & ~there).sum()), int((there & ~here).sum())
    expected = {"only_first": mine, "only_second": theirs, "p": mcnemar(mine, theirs)}
    assert other["scores"][0]["mcnemar"] == expected
    assert other["scores"][0]["difference"]["mean"] == pytest.approx((mine - theirs) / 8)


def test_a_model_against_itself_does_not_differ(run: Path, capsys: Capture) -> None:
    gap = evaluated(capsys, run, "--against", run)["against"]["difference"]
    assert (gap["mean"], gap["low"], gap["high"]) == (0, 0, 0)


def test_models_without_common_tokens_are_compared_by_bytes(run: Path, tmp_path: Path, capsys: Capture) -> None:
    other = save_base(tmp_path / "other", seed=3)
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = template + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    (other / "chat_template.jinja").unlink(missing_ok=True)
    found = evaluated(capsys, run, "--against", other)
    gap, there = found["against"]["difference"], found["against"]
    assert gap["unit"] == "bits per byte"
    assert gap["mean"] == pytest.approx(found["bits_per_byte"] - there["bits_per_byte"])


def test_each_source_has_its_figures(recipe_file: Recipe, base: Path, tmp_path: Path, capsys: Capture) -> None:
    one, two = (write_jsonl(tmp_path / f"{i}.jsonl", chat_rows(40)[20 * i : 20 * i + 20]) for i in (0, 1))
    sources = f"sources: {{short: {{path: {one}}}, other: {{path: {two}}}}}"
    text = RECIPE.replace("train: {data}, max_length", sources.replace("{", "{{").replace("}", "}}") + ", max_length")
    recipe = recipe_file(text.replace("eval_split: 4", "eval_split: 12"))
    found = evaluated(capsys, recipe)
    assert [each["name"] for each in found["sources"]] == ["short", "other"]
    assert sum(each["rows"] for each in found["sources"]) == found["rows"] == 12
    total = sum(each["loss"] * each["targets"] for each in found["sources"])
    assert total / found["targets"] == pytest.approx(found["loss"])
    assert main(["eval", str(recipe), "-q"]) == 0
    assert "source" in capsys.readouterr().out


def test_a_run_keeps_its_evaluations(run: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "evaluations", ignore_errors=True)
    found = evaluated(capsys, copy)
    (kept,) = (copy / "evaluations").iterdir()
    assert json.loads(kept.read_text()) == found
    assert len(kept.stem.partition(".")[2]) == 6  # of a second: another one that ends in it has its own name


def test_a_limit_takes_the_first_rows(run: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = tmp_path / "all.jsonl"
    evaluated(capsys, run, "--rows", rows)
    first = lines(rows)[:3]
    found = evaluated(capsys, run, "--limit", "3")
    assert found["rows"] == 3
    total = sum(row["loss_sum"] for row in first) / sum(row["targets"] for row in first)
    assert found["loss"] == pytest.approx(total, rel=1e-5)


def test_a_bare_model_is_measured_on_rows_that_are_named(
    run: Path, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert "--data FILE" in refused(capsys, 5, base)
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(4))
    assert evaluated(capsys, base, "--data", data)["rows"] == 4


def test_choices_are_measured_alone_unless_rows_are_asked_for_too(run: Path, tmp_path: Path, capsys: Capture) -> None:
    asked = [
        {"input": f"Question {i}?\nAnswer:", "output": "ABCD"[i % 4], "subject": "s" + "xy"[i % 2]} for i in range(8)
    ]
    file, rows = write_jsonl(tmp_path / "mmlu.jsonl", asked), tmp_path / "out.jsonl"
    found = evaluated(capsys, run, "--choices", file, "--against", "base", "--rows", rows)
    assert "loss" not in found
    told = lines(rows)
    assert [row["kind"] for row in told] == ["choice"] * 8
    assert found["choices"]["right"] == sum(row["right"] for row in told)
    apart = found["against"]["choices"]
    only = [(row["right"], row["against"]["right"]) for row in told]
    assert apart["mcnemar"]["only_first"] == only.count((True, False))
    assert evaluated(capsys, run, "--choices", file, "--metric", "exact")["rows"] == 8


def test_what_exists_is_not_overwritten_unless_asked(run: Path, tmp_path: Path, capsys: Capture) -> None:
    result, rows = tmp_path / "result.json", tmp_path / "rows.jsonl"
    evaluated(capsys, run, "-o", result, "--rows", rows)
    before = result.read_bytes(), rows.read_bytes()
    for option, file in (("-o", result), ("--rows", rows)):
        error = refused(capsys, 8, run, option, file)
        assert "exists" in error
        assert "--overwrite" in error
    assert (result.read_bytes(), rows.read_bytes()) == before
    found = evaluated(capsys, run, "--limit", "2", "-o", result, "--rows", rows, "--overwrite")
    assert json.loads(result.read_text()) == found
    assert len(lines(rows)) == 2
    assert "is a folder" in refused(capsys, 8, run, "-o", tmp_path)


@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "adapter/adapter_model.safetensors"])
def test_overwriting_takes_no_file_that_an_evaluation_did_not_write(
    run: Path, tmp_path: Path, capsys: Capture, name: str
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    before = (copy / name).read_bytes()
    for option in ("-o", "--rows"):
        assert "no result of an evaluation" in refused(capsys, 8, copy, option, copy / name, "--overwrite")
    assert (copy / name).read_bytes() == before


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_loaded(run: Path, capsys: Capture) -> None:
    assert main(["eval", str(run), "-o", "x" * 250, "--json"]) == 8  # a temporary name beside it is longer
    assert '"stage"' not in capsys.readouterr().out


def test_rows_without_prompts_are_refused_for_metrics_alone(base: Path, tmp_path: Path, capsys: Capture) -> None:
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"some text {i}"} for i in range(4)])
    assert evaluated(capsys, base, "--data", data)["rows"] == 4
    assert "no held-out row has a prompt" in refused(capsys, 4, base, "--data", data, "--metric", "exact")


def test_against_the_base_of_a_base_is_refused(base: Path, tmp_path: Path, capsys: Capture) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(4))
    assert "is a base itself" in refused(capsys, 5, base, "--data", data, "--against", "base")


USAGE = [
    ("--metric", "exactly"),
    ("--metric", "regex:("),
    ("--task-dir", "."),
    ("--seed", "0"),
    ("--format", "text"),
    ("--limit", "3", "--choices", "c.jsonl"),
    ("--decoding", "greedy"),
    ("--max-new-tokens", "5"),
    ("--overwrite",),
    ("--data", ""),
    ("--against", ""),
    ("--rows", "r.jsonl", "--lm-eval", "task"),
    ("--output", "same.json", "--rows", "./same.json"),
    ("--generate", "p.jsonl"),
    ("--generate", "p.jsonl", "-o", "a.jsonl", "--metric", "exact"),
    ("--generate", "p.jsonl", "-o", "a.jsonl", "--against", "base"),
]


@pytest.mark.parametrize("options", USAGE)
def test_options_that_say_nothing_together_are_usage_errors(
    run: Path, capsys: Capture, options: tuple[str, ...]
) -> None:
    error = refused(capsys, 2, run, *options)
    assert options[0] in error


def test_prompts_are_answered_into_a_file_and_gone_on_with(run: Path, tmp_path: Path, capsys: Capture) -> None:
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"question_id": i, "prompt": f"q{i}"} for i in range(3)])
    answers = tmp_path / "a.jsonl"
    options = ("--generate", prompts, "-o", answers, "--decoding", "greedy", "--max-new-tokens", "8")
    evaluated(capsys, run, *options)
    before = answers.read_bytes()
    found = evaluated(capsys, run, *options)
    assert found["kept"] == found["prompts"] == 3
    assert answers.read_bytes() == before
    said = open_talk(str(run), None, lambda event: None).answer_all([f"q{i}" for i in range(3)], 8)
    assert [row["answer"] for row in lines(answers)] == said


def test_a_tuned_model_is_compared_with_the_base_it_was_tuned_from(
    recipe_file: Recipe, tmp_path: Path, capsys: Capture
) -> None:
    text = RECIPE.replace("lora: {{r: 4, alpha: 8}}", "lora: null").replace("float32}}", "float32, type: none}}")
    tuned = tmp_path / "tuned"
    assert main(["train", str(recipe_file(text)), "-o", str(tuned), "-q"]) == 0
    both = evaluated(capsys, tuned, "--against", "base")
    base = evaluated(capsys, tmp_path / "tiny.yaml")
    assert both["against"]["loss"] == pytest.approx(base["loss"], rel=1e-6)
    assert both["against"]["difference"]["mean"] == pytest.approx(both["loss"] - base["loss"])
    assert both["against"]["base"] == base["base"] != both["base"]


def test_loss_on_completion_asks_for_the_first_answer_of_several_turns(
    recipe_file: Recipe, tmp_path: Path, capsys: Capture
) -> None:
    turns = [("user", "q1"), ("assistant", "first"), ("user", "q2"), ("assistant", "second")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    data, rows = write_jsonl(tmp_path / "two.jsonl", [row]), tmp_path / "out.jsonl"
    recipe = recipe_file(RECIPE.replace("eval_split: 4", "eval_split: 4, loss_on: completion"))
    evaluated(capsys, recipe, "--data", data, "--metric", "exact", "--max-new-tokens", "4", "--rows", rows)
    assert lines(rows)[0]["wanted"] == "first"


def test_tasks_of_the_harness_run_on_the_adapter_and_on_what_it_is_compared_with(
    run: Path, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = ("--lm-eval", "choose,repeat", "--task-dir", folder)
    found = evaluated(capsys, run, *options, "--against", "base")
    assert "loss" not in found
    assert set(found["lm_eval"]) == {"choose", "repeat"}
    assert 0 <= found["lm_eval"]["choose"]["acc"] <= 1
    assert found["lm_eval"]["choose"]["samples"] == 12
    assert evaluated(capsys, run.parent / "tiny.yaml", *options)["lm_eval"] == found["against"]["lm_eval"]
    assert "choose" in refused(capsys, 4, run, "--lm-eval", "chose", "--task-dir", folder)


def test_rows_that_are_dropped_or_cut_are_counted(run: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = [
        *chat_rows(3),
        *({"messages": [{"role": "user", "content": "q" * 70}, row["messages"][1]]} for row in chat_rows(2)),
    ]
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    found = evaluated(capsys, run, "--data", data)
    assert (found["rows"], found["lost"]) == (3, {"longer than 64 tokens": 2})
    assert main(["eval", str(run), "--data", str(data), "-q"]) == 0
    assert "2 longer than 64 tokens" in capsys.readouterr().out
    assert evaluated(capsys, run)["lost"] == {}


def test_a_text_that_is_split_is_one_row(recipe_file: Recipe, tmp_path: Path, capsys: Capture) -> None:
    texts = [{"text": f"{i} some text " * 8} for i in range(6)]
    recipe = recipe_file(RECIPE.replace("eval_split: 4", "eval_split: 3, too_long: split, format: text"), texts)
    rows = tmp_path / "out.jsonl"
    found = evaluated(capsys, recipe, "--rows", rows)
    told = lines(rows)
    assert found["rows"] == len(told) == 3
    assert found["tokens"] > 2 * 64
    first = evaluated(capsys, recipe, "--limit", "1")
    assert (first["rows"], first["targets"], first["bytes"]) == (1, told[0]["targets"], told[0]["bytes"])


def test_a_file_in_two_sources_is_measured_for_each(recipe_file: Recipe, tmp_path: Path, capsys: Capture) -> None:
    same = write_jsonl(tmp_path / "same.jsonl", chat_rows(12))
    sources = f"sources: {{one: {{path: {same}}}, two: {{path: {same}}}}}".replace("{", "{{").replace("}", "}}")
    recipe, rows = recipe_file(RECIPE.replace("train: {data}", sources)), tmp_path / "out.jsonl"
    found = evaluated(capsys, recipe, "--metric", "exact", "--max-new-tokens", "2", "--rows", rows)
    told = lines(rows)
    assert found["rows"] == found["scores"][0]["rows"] == len(told) == 8
    for each in found["sources"]:
        mine = [row for row in told if row["source"] == each["name"]]
        assert (each["rows"], each["targets"]) == (len(mine), sum(row["targets"] for row in mine)) == (4, 8)


REWRITES = (
    "<s>{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and not loop.last %}said{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_of_a_row_that_became_several_sequences_the_last_answer_is_asked(tmp_path: Path, capsys: Capture) -> None:
    model = tmp_path / "model"
    make_llama().save_pretrained(model)
    make_tokenizer(REWRITES).save_pretrained(model)
    turns = [("user", "q1"), ("assistant", "first"), ("user", "q2"), ("assistant", "second")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    data, rows = write_jsonl(tmp_path / "two.jsonl", [row, row]), tmp_path / "out.jsonl"
    options = ("--metric", "exact", "--max-new-tokens", "2", "--against", model, "--rows", rows)
    found = evaluated(capsys, model, "--data", data, *options)
    assert [each["wanted"] for each in lines(rows)] == ["second", "second"]
    assert found["rows"] == found["scores"][0]["rows"] == found["against"]["difference"]["rows"] == 2
    assert found["bytes"] == 2 * len("firstsecond")


def test_a_text_behind_bos_is_no_question(tmp_path: Path, capsys: Capture) -> None:
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tmp_path / "model", make_tokenizer(None)
    start = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = start
    make_llama().save_pretrained(model)
    tokenizer.save_pretrained(model)
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"some text {i}"} for i in range(2)])
    assert "no held-out row has a prompt" in refused(capsys, 4, model, "--data", data, "--metric", "exact")


def test_an_adapter_goes_on_the_model_that_is_named_if_it_is_its_base(
    run: Path, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    found = evaluated(capsys, moved, "--adapter", run)
    assert found["base"] == str(moved)
    assert found["loss"] == evaluated(capsys, run)["loss"]
    other, data = save_base(tmp_path / "other", seed=3), write_jsonl(tmp_path / "rows.jsonl", chat_rows(4))
    assert "is not the one" in refused(capsys, 5, other, "--adapter", run, "--data", data)
    assert evaluated(capsys, other, "--adapter", run, "--data", data, "--allow-changed-base")["base"] == str(other)


def test_a_checkpoint_of_a_run_without_an_adapter_is_measured_on_its_rows(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "adapter")
    checkpoint = max((copy / "checkpoints").iterdir())
    found = evaluated(capsys, copy, "--adapter", checkpoint)
    assert found["adapter"] == str(checkpoint)
    assert found["loss"] == evaluated(capsys, checkpoint)["loss"] == evaluated(capsys, run)["loss"]


def test_rows_that_one_model_cannot_read_leave_the_unit_of_the_others(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    short = save_base(tmp_path / "short", max_position_embeddings=24)
    rows = [
        {"messages": [{"role": "user", "content": "q" * i}, {"role": "assistant", "content": "a"}]} for i in (2, 5, 30)
    ]
    data, told = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    gap = evaluated(capsys, run, "--data", data, "--against", short, "--rows", told)["against"]["difference"]
    assert (gap["unit"], gap["rows"], gap["unpaired"]) == ("nats per token", 2, 1)
    both = [row for row in lines(told) if row["against"]]
    here, there = (sum(row["loss_sum"] for row in side) for side in (both, [row["against"] for row in both]))
    assert gap["mean"] == pytest.approx((here - there) / sum(row["targets"] for row in both))


def test_answers_that_say_nothing_in_bytes_are_not_compared_by_them(run: Path, tmp_path: Path, capsys: Capture) -> None:
    other = save_base(tmp_path / "other", seed=3)
    (other / "chat_template.jinja").write_text(REWRITES)
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<|user|>"}]}
    data = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert evaluated(capsys, run, "--data", data, "--against", other)["against"]["difference"] is None
    more = write_jsonl(tmp_path / "more.jsonl", [row, *chat_rows(3)])
    gap = evaluated(capsys, run, "--data", more, "--against", other)["against"]["difference"]
    assert (gap["unit"], gap["rows"], gap["unpaired"]) == ("bits per byte", 3, 0)
    assert math.isfinite(gap["low"])


def test_a_loss_that_is_no_number_names_its_rows(tmp_path: Path, capsys: Capture) -> None:
    import torch

    broken, tokenizer = tmp_path / "broken", make_tokenizer()
    model = make_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.encode("Z")[-1]] = math.nan
    model.save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    rows = chat_rows(4)
    rows[2]["messages"][0]["content"] = "Z"
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    error = refused(capsys, 9, broken, "--data", data, "-o", tmp_path / "result.json")
    assert f"1 of 4 held-out rows is not a finite number: {data}:3" in error
    assert not (tmp_path / "result.json").exists()
    train = write_jsonl(tmp_path / "train.jsonl", chat_rows(8))
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.format(base=broken, data=train).replace("eval_split: 4", f"eval: {data}"))
    assert main(["train", str(recipe), "-o", str(out), "-q"]) == 9
    assert f"{data}:3" in capsys.readouterr().err


def test_tasks_put_prompts_through_the_template_of_the_recipe(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    bare, data, recipe = tmp_path / "bare", write_jsonl(tmp_path / "rows.jsonl", chat_rows(8)), tmp_path / "tiny.yaml"
    make_llama().save_pretrained(bare)
    make_tokenizer(None).save_pretrained(bare)
    recipe.write_text(RECIPE.format(base=bare, data=data).replace("eval_split: 4", "eval_split: 4, template: alpaca"))
    options = ("--lm-eval", "choose", "--task-dir", folder, "--chat-template")
    alone, beside = (evaluated(capsys, recipe, *options, *more) for more in ((), ("--metric", "json")))
    assert alone["lm_eval"] == beside["lm_eval"]
    assert "no chat template" in refused(capsys, 4, bare, *options)


def test_a_format_is_named_where_rows_could_be_read_in_several_ways(
    run: Path, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    text = "### Human: q1### Assistant: a"
    data = write_jsonl(tmp_path / "both.jsonl", [{"input": "q1", "output": "a", "text": text}])
    assert "can be read as" in refused(capsys, 4, base, "--data", data)
    rows = tmp_path / "rows.jsonl"
    for target in (base, run):
        options = ("--format", "longform", "--metric", "json", "--rows", rows, "--overwrite")
        evaluated(capsys, target, "--data", data, *options)
        assert lines(rows)[0]["wanted"] == "a"
    assert "longform" in refused(capsys, 4, run, "--data", data, "--format", "longfrom")
