"""lm-evaluation-harness on a real 4-bit model with an adapter: figures as by hand, and nothing left behind."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from qlora_cli.errors import DataError, MachineError, NonFiniteError
from qlora_cli.evaluation.harness import Harness, HarnessResult, Score, TaskScores, run_tasks
from qlora_cli.evaluation.harness_tasks import check_harness, check_tasks
from qlora_cli.model.engine import build_engine
from qlora_cli.model.lora import LoraLinear
from qlora_cli.model.nf4 import four_bit_layers
from qlora_cli.model.segments import ATTENTION, set_attention
from tests.conftest import make_tokenizer, write_jsonl
from tests.model.test_lora import adapted, loss_of

QUESTIONS: list[dict[str, Any]] = [
    {"question": f"{i} and {i % 3}?", "choices": [f"{i}a", f"b{i}", f"{i % 5}c"], "answer": i * 7 % 3}
    for i in range(12)
]
COPIES = [{"text": "abc"[i % 3] * 3, "copy": "abc"[i % 3]} for i in range(5)]
TEXTS = [{"page": text} for text in ("a b c", "some words of one page", "the last of these pages is longer")]
CHOOSE = """\
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
REPEAT = """\
task: repeat
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/copies.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: copy
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
PAGES = """\
task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pages.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: page
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
GROUP = "group: both\ntask: [choose, pages]\n"
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HOW = Harness(batch_size=4, max_length=96)


@pytest.fixture(autouse=True, scope="module")
def no_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` keeps what it reads in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three tasks and a group of two of them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("questions", QUESTIONS), ("copies", COPIES), ("pages", TEXTS)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    for name, text in (("choose", CHOOSE), ("repeat", REPEAT), ("pages", PAGES), ("both", GROUP)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """4-bit, with an adapter that does something."""
    return adapted(base)[0].eval()


def run(model: Any, folder: Path, *names: str, how: Harness = HOW, tokenizer: Any = None) -> HarnessResult:
    """The tasks of `folder`, loaded anew."""
    return run_tasks(model, tokenizer or make_tokenizer(), check_tasks(names, folder), how)


@torch.no_grad()
def log_likelihood(model: Any, prompt: str, answer: str) -> float:
    """By hand: every token from a forward of its own over what comes before it; a text begins with <s>."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(prompt + answer) if prompt else [1, *tokenizer.encode(answer)]
    start = len(tokenizer.encode(prompt)) if prompt else 1
    rows = [model(torch.tensor([ids[:end]])).logits[0, -1].double() for end in range(start, len(ids))]
    return float(sum(row.log_softmax(-1)[token] for row, token in zip(rows, ids[start:], strict=True)))


@torch.no_grad()
def greedy(model: Any, prompt: str, count: int) -> str:
    """By hand: the likeliest token `count` times, up to a line break or </s>."""
    ids = make_tokenizer().encode(prompt)
    start = len(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    text: str = make_tokenizer().decode(ids[start:], skip_special_tokens=True)
    return text.split("\n", maxsplit=1)[0]


def task_file(folder: Path, text: str, name: str = "task", rows: Sequence[Any] | None = None) -> Path:
    """A directory with one task, whose rows are `rows`."""
    if rows is not None:
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def choosing(name: str, file: Path, more: str = "") -> str:
    """`CHOOSE` under another name, with other rows."""
    lines = CHOOSE.format(folder="?").replace("?/questions.jsonl", str(file)).replace("task: choose", f"task: {name}")
    return lines + more


def test_accuracy_is_that_of_the_likeliest_choice_computed_by_hand(model: Any, folder: Path) -> None:
    sums = [[log_likelihood(model, f"Q: {q['question']}\nA:", f" {c}") for c in q["choices"]] for q in QUESTIONS]
    chosen = [int(np.argmax(row)) for row in sums]
    right = [choice == q["answer"] for choice, q in zip(chosen, QUESTIONS, strict=True)]
    assert len(set(chosen)) > 1
    assert 0 < sum(right) < len(right)
    share = sum(right) / len(right)
    error = (share * (1 - share) / (len(right) - 1)) ** 0.5
    found = run(model, folder, "choose").as_json()["choose"]
    assert found == {"acc": pytest.approx(share), "acc_stderr": pytest.approx(error), "samples": 12}


@pytest.mark.parametrize("size", [1, 3])
def test_perplexity_of_whole_texts_is_the_one_computed_by_hand(model: Any, folder: Path, size: int) -> None:
    total = sum(log_likelihood(model, "", row["page"]) for row in TEXTS)
    words = sum(len(row["page"].split()) for row in TEXTS)
    found = run(model, folder, "pages", how=replace(HOW, batch_size=size)).tasks[0]
    assert [(score.metric, score.error) for score in found.scores] == [("word_perplexity", None)]
    assert found.scores[0].value == pytest.approx(math.exp(-total / words), rel=1e-4)


@pytest.mark.parametrize("engine", [False, True])
def test_generated_answers_are_the_greedy_ones_computed_by_hand(base: Path, tmp_path: Path, engine: bool) -> None:
    model = adapted(base)[0].eval()
    prompts = ["a", "some more of it", "bc" * 9, "q?", "the last one:"]  # of different lengths, so that rows are padded
    answers = [greedy(model, prompt, 6) for prompt in prompts]
    assert len(set(answers)) > 1
    rows = [{"text": p, "copy": a if i % 2 else f"{a}!"} for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
    write_jsonl(tmp_path / "copies.jsonl", rows)
    if engine:  # whose attention computes whole rows only
        assert build_engine(model, (), compiled=False).packs
    attention = model.config._attn_implementation
    found = run(model, task_file(tmp_path, REPEAT.format(folder=tmp_path)), "repeat")
    assert found.as_json()["repeat"]["exact_match"] == pytest.approx(2 / 5)
    assert model.config._attn_implementation == attention


def test_a_model_without_sdpa_generates_with_eager_attention(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=320, head_dim=16, **SMALL)).eval()
    answers = [greedy(model, row["text"], 6) for row in COPIES]
    write_jsonl(tmp_path / "copies.jsonl", [row | {"copy": a} for row, a in zip(COPIES, answers, strict=True)])
    set_attention(model, ATTENTION)
    found = run(model, task_file(tmp_path, REPEAT.format(folder=tmp_path)), "repeat")
    assert found.as_json()["repeat"]["exact_match"] == 1
    assert model.get_decoder().config._attn_implementation == ATTENTION


def test_a_group_has_the_scores_of_its_tasks(model: Any, folder: Path) -> None:
    group = run(model, folder, "both")
    assert group.as_json() == run(model, folder, "choose", "pages").as_json()


def test_the_same_call_gives_the_same_figures_though_the_model_drops_out(base: Path, folder: Path) -> None:
    model = adapted(base, dropout=0.5)[0].train()
    assert run(model, folder, "choose", "pages") == run(model, folder, "choose", "pages")


POINTS = "def f(doc, results):\n    return {'points': -sum(map(ord, results[0])) / 1000}\n"


def test_sampled_answers_and_resampled_errors_are_the_same_each_time_in_this_process(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(POINTS, encoding="utf-8")
    text = REPEAT.format(folder=folder).replace("do_sample: false", "do_sample: true, temperature: 1.0")
    text = text.replace("exact_match, aggregation: mean", "points, aggregation: perplexity")
    task_file(tmp_path, text + "process_results: !function mine.f\n")
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(run(model, tmp_path, "repeat").tasks[0].scores)
    assert results[0] == results[1]
    assert [(score.metric, score.error is not None) for score in results[0]] == [("points", True)]
    assert results[0] != run(model, tmp_path, "repeat", how=replace(HOW, batch_size=1)).tasks[0].scores  # drawn anew
    assert forks == []


def state_of(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Whatever a run could leave behind."""
    names = sorted(n for n, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger))
    loggers = {n: (logging.getLogger(n).level, logging.getLogger(n).handlers[:]) for n in names if "lm_eval" in n}
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "own": sorted(model.__dict__),
        "config": (model.config.to_dict(), model.generation_config.to_dict()),
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "weights": {name: stored.clone() for name, stored in model.state_dict().items()},
        "tokenizer": (tokenizer.padding_side, tokenizer.pad_token, len(tokenizer), tokenizer.chat_template),
        "padding": (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation),
        "drawn": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
        "environment": dict(os.environ),
        "loggers": (loggers, logging.root.level, logging.root.handlers[:]),
        "warnings": warnings.filters[:],
    }


def same(a: Any, b: Any) -> bool:
    """Deep equality, tensors and arrays included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


def test_nothing_is_left_behind_and_nothing_is_printed_or_logged(
    base: Path,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(base)[0].train()
    model.model.layers[1].eval()  # modes that no single call of train() or eval() brings back
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "right"  # lm_eval needs one, and pads prompts at the left
    check_harness()
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    caplog.set_level(17, "lm_eval")
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    before = state_of(model, tokenizer)
    capfd.readouterr()
    run(model, folder, "choose", "repeat", "pages", tokenizer=tokenizer)
    after = state_of(model, tokenizer)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def repacks(base: Path) -> bool:
    """Whether bitsandbytes rewrites weights in evaluation mode on this machine."""
    model = adapted(base, torch.bfloat16)[0].eval()
    before = bytes_of(model)
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    return not same(before, bytes_of(model))


def bytes_of(model: Any) -> dict[str, list[torch.Tensor]]:
    """Codes and constants of every 4-bit layer."""
    return {
        name: [layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()]
        for name, layer in four_bit_layers(model).items()
    }


def gradients(model: Any) -> list[torch.Tensor]:
    """Of the adapter, for one step."""
    factors = [x for layer in model.modules() if isinstance(layer, LoraLinear) for x in (layer.lora_a, layer.lora_b)]
    return list(torch.autograd.grad(loss_of(model.train()), factors))


def test_weights_are_not_repacked_and_the_next_step_of_training_is_the_same(base: Path, folder: Path) -> None:
    model = adapted(base, torch.bfloat16)[0]
    before, expected = bytes_of(model), gradients(model)
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = True  # as bitsandbytes has it, where nobody turned it off
    run(model, folder, "choose", "repeat")
    assert same(before, bytes_of(model))
    assert same(expected, gradients(model))
    if not repacks(base):
        pytest.skip("this machine does not repack: the weights could not have been")


def test_a_head_that_only_the_configuration_ties_stays_apart(base: Path, folder: Path) -> None:
    model = adapted(base)[0]
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    before = model.lm_head.weight.detach().clone()
    run(model, folder, "choose", how=replace(HOW, limit=1))
    assert torch.equal(model.lm_head.weight, before)


def test_examples_are_the_same_each_time_and_their_number_is_said(model: Any, folder: Path, tmp_path: Path) -> None:
    text = choosing("few", folder / "questions.jsonl", "num_fewshot: 2\nfewshot_split: test\n")
    task_file(tmp_path, text.replace("metric: acc, aggregation: mean", "metric: brier_score, aggregation: brier_score"))
    results = [run(model, tmp_path, "few") for _ in range(2)]
    assert results[0] == results[1]
    assert results[0].setting_json()["shots"] == {"few": 2}
    assert "12 rows, 2-shot" in results[0].lines()[1]
    assert run(model, folder, "choose", how=replace(HOW, limit=1)).setting_json()["shots"] == {"choose": 0}


def test_a_limit_takes_the_first_rows_and_is_said(model: Any, folder: Path) -> None:
    result = run(model, folder, "choose", how=replace(HOW, limit=5))
    assert (result.tasks[0].samples, result.setting_json()["limit"]) == (5, 5)
    assert "at most 5 rows of each task" in result.lines()[0]


def test_a_chat_template_is_applied_where_asked_for_and_said(model: Any, folder: Path) -> None:
    plain, templated = (run(model, folder, "choose", how=replace(HOW, chat_template=c)) for c in (False, True))
    assert (plain.setting_json()["chat_template"], templated.setting_json()["chat_template"]) == (False, True)
    sums = []
    for q in QUESTIONS:
        turn = {"role": "user", "content": f"Q: {q['question']}\nA:"}
        asked = make_tokenizer().apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        sums.append([log_likelihood(model, asked, choice) for choice in q["choices"]])
    right = [int(np.argmax(row)) == q["answer"] for row, q in zip(sums, QUESTIONS, strict=True)]
    assert templated.as_json()["choose"]["acc"] == pytest.approx(sum(right) / len(right))


def test_a_chat_template_that_the_tokenizer_lacks_is_an_error(model: Any, folder: Path) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        run(model, folder, "choose", how=replace(HOW, chat_template=True), tokenizer=make_tokenizer(None))


def test_what_lm_eval_cuts_is_said(model: Any, folder: Path) -> None:
    short = run(model, folder, "choose", how=replace(HOW, max_length=8))
    assert any("exceeds model's maximum length" in text and "times alike" in text for text in short.remarks)
    assert not any("exceeds" in text for text in run(model, folder, "choose").remarks)


def test_progress_reaches_every_request_and_may_print(
    model: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        sys.stdout.write(f"{done} of {total}\n")

    run_tasks(model, make_tokenizer(), check_tasks(["choose", "repeat"], folder), HOW, tell)
    assert (36, 36) in told
    assert told[-1] == (5, 5)
    assert len(told) > 6
    assert capsys.readouterr().out.splitlines() == [f"{done} of {total}" for done, total in told]


def test_unknown_tasks_are_one_error_with_near_names_and_what_there_is(folder: Path) -> None:
    with pytest.raises(DataError, match="has no task chose, xyz") as caught:
        check_tasks(["chose", "pages", "xyz"], folder)
    text = str(caught.value)
    assert "it holds both, choose, pages, repeat" in text
    assert "chose: did you mean choose?" in text
    assert "xyz: did" not in text


def test_a_group_whose_tasks_are_not_in_the_directory_is_an_error_that_names_them(folder: Path, tmp_path: Path) -> None:
    task_file(tmp_path, "group: outer\ntask: [near, inner]\n", "outer")
    task_file(tmp_path, "group: inner\ntask: [near, arc_easy]\n", "inner")
    task_file(tmp_path, choosing("near", folder / "questions.jsonl"), "near")
    with pytest.raises(DataError, match="has no task arc_easy\n"):
        check_tasks(["outer"], tmp_path)
    assert check_tasks(["near"], tmp_path).names == ("near",)


def test_an_unknown_task_is_told_from_those_that_come_with_lm_eval() -> None:
    with pytest.raises(DataError, match="lm-eval knows no task arc_esy") as caught:
        check_tasks(["arc_challenge", "arc_esy"], None)
    assert "did you mean arc_easy" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("task: a\n"), "is not a directory"),
        (lambda path: path.mkdir(), "holds no .yaml file"),
        (lambda path: (path.mkdir(), (path / "a.yaml").write_text("task: [a\n")), "a.yaml is no YAML"),
        (lambda path: (path.mkdir(), (path / "a.yaml").write_bytes(b"task: \xff\n")), "a.yaml is no YAML"),
    ],
)
def test_a_task_directory_that_is_none_is_an_error(
    tmp_path: Path, make: Callable[[Path], object], expected: str
) -> None:
    make(tmp_path / "tasks")
    with pytest.raises(DataError, match=expected):
        check_tasks(["choose"], tmp_path / "tasks")


@pytest.mark.parametrize("names", [[], [""], ["choose", ""]])
def test_no_name_is_an_error(folder: Path, names: list[str]) -> None:
    with pytest.raises(DataError, match="names no task"):
        check_tasks(names, folder)


def test_rows_that_are_not_there_are_an_error_that_says_where_they_were_looked_for(tmp_path: Path) -> None:
    task_file(tmp_path, choosing("lost", Path("nowhere.jsonl")))
    with pytest.raises(DataError, match="cannot load lost") as caught:
        check_tasks(["lost"], tmp_path)
    assert f"looked up from {Path.cwd()}" in str(caught.value)


def test_relative_rows_are_looked_up_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    write_jsonl(tmp_path / "here.jsonl", QUESTIONS[:3])
    task_file(tmp_path / "tasks", choosing("near", Path("here.jsonl")))
    monkeypatch.chdir(tmp_path)
    assert len(check_tasks(["near"], Path("tasks")).loaded["tasks"]["near"].eval_docs) == 3


@pytest.mark.parametrize(
    ("rows", "expected"),
    [("", "cannot load bad"), ("not JSON\n", "JSON parse error"), ('{"other": 1}\n', "'question' is undefined")],
)
def test_rows_without_use_are_an_error_before_any_model(tmp_path: Path, rows: str, expected: str) -> None:
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    task_file(tmp_path, choosing("bad", tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=expected):
        check_tasks(["bad"], tmp_path)


def test_a_task_that_keeps_no_row_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def none(docs):\n    return docs.select([])\n", encoding="utf-8")
    task_file(
        tmp_path, choosing("none", tmp_path / "none.jsonl", "process_docs: !function mine.none\n"), "none", QUESTIONS
    )
    with pytest.raises(DataError, match="cannot load none"):
        check_tasks(["none"], tmp_path)


def test_a_data_set_of_the_hub_is_an_error_where_there_is_no_network(tmp_path: Path) -> None:
    task_file(
        tmp_path, "task: far\ndataset_path: nobody/nothing-at-all\ntest_split: test\noutput_type: multiple_choice\n"
    )
    with pytest.raises(MachineError, match="cannot fetch what task far needs"):
        check_tasks(["far"], tmp_path)


def test_a_task_that_needs_a_package_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import package_that_is_not_there\n", encoding="utf-8")
    task_file(
        tmp_path, choosing("more", tmp_path / "more.jsonl", "process_docs: !function mine.f\n"), "more", QUESTIONS
    )
    with pytest.raises(MachineError, match="package_that_is_not_there"):
        check_tasks(["more"], tmp_path)


FAILING = "def f(doc, results):\n    print('said by a task')\n    return {'acc': 1 / len(doc['answers'])}\n"


def test_a_task_that_fails_is_one_error_and_leaves_nothing_behind(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(FAILING, encoding="utf-8")
    task_file(
        tmp_path, choosing("sad", tmp_path / "sad.jsonl", "process_results: !function mine.f\n"), "sad", QUESTIONS
    )
    tokenizer = make_tokenizer()
    before = state_of(model, tokenizer)
    with pytest.raises(DataError, match="cannot run sad: KeyError: 'answers'"):
        run(model, tmp_path, "sad", tokenizer=tokenizer)
    after = state_of(model, tokenizer)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", ["RuntimeError('CUDA out of memory')", "MemoryError()"])
def test_running_out_of_memory_is_not_blamed_on_the_task(model: Any, tmp_path: Path, error: str) -> None:
    (tmp_path / "mine.py").write_text(f"def f(doc, results):\n    raise {error}\n", encoding="utf-8")
    text = choosing("big", tmp_path / "big.jsonl", "process_results: !function mine.f\n")
    task_file(tmp_path, text, "big", QUESTIONS)
    with pytest.raises((RuntimeError, MemoryError), match=r"^CUDA out of memory$|^$"):
        run(model, tmp_path, "big")


def test_a_task_that_runs_what_the_model_wrote_is_refused(folder: Path, tmp_path: Path) -> None:
    task_file(tmp_path, choosing("wild", folder / "questions.jsonl", "unsafe_code: true\n"))
    with pytest.raises(DataError, match="runs code that the model wrote"):
        check_tasks(["wild"], tmp_path)


def test_a_task_whose_metric_nobody_knows_is_an_error_that_says_so(model: Any, tmp_path: Path) -> None:
    text = choosing("odd", tmp_path / "odd.jsonl").replace("metric: acc", "metric: nonsense")
    with pytest.raises(DataError, match=r"no metric for odd\n  why: .*nonsense"):
        run(model, task_file(tmp_path, text, "odd", QUESTIONS), "odd")


def test_an_answer_longer_than_the_model_is_an_error(model: Any, folder: Path) -> None:
    with pytest.raises(DataError, match="cannot run repeat"):
        run(model, folder, "repeat", how=replace(HOW, max_length=6))


def test_logits_that_are_not_finite_are_an_error(base: Path, folder: Path) -> None:
    model = adapted(base)[0].train()
    model.model.norm.weight.data[3] = torch.nan
    for task in ("choose", "repeat", "pages"):
        with pytest.raises(NonFiniteError):
            run(model, folder, task)
    assert model.training
    assert not model._forward_hooks


def test_a_package_that_is_missing_is_said_with_the_command_that_brings_it() -> None:
    program = (
        "import sys\n"
        "from qlora_cli.errors import MachineError\n"
        "from qlora_cli.evaluation.harness_tasks import check_tasks\n"
        "for name in ('lm_eval', 'requests'):\n"
        "    sys.modules[name] = None\n"
        "    try:\n        check_tasks(['arc_easy'], None)\n"
        "    except MachineError as error:\n        print(str(error).replace('\\n', ' '))\n"
        "    del sys.modules[name]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    lines = done.stdout.splitlines()
    assert [name in line for name, line in zip(("lm_eval", "requests"), lines, strict=True)] == [True, True]
    assert all("pip install 'qlora-cli[lm-eval]'" in line for line in lines)


def test_json_has_a_key_for_each_metric_and_its_error_and_no_number_that_json_lacks() -> None:
    scores = (Score("acc", 0.5, 0.25), Score("exact_match,strict", math.inf, None))
    result = HarnessResult((TaskScores("one", 4, 0, scores),), HOW, "0.4.13", ("cut (2 times alike)",))
    assert json.loads(json.dumps(result.as_json(), allow_nan=False)) == {
        "one": {
            "acc": 0.5,
            "acc_stderr": 0.25,
            "exact_match,strict": None,
            "exact_match_stderr,strict": None,
            "samples": 4,
        }
    }
    assert result.lines() == [
        "lm-eval 0.4.13, without chat template, at most 96 tokens",
        "one: acc 0.5000 (standard error 0.2500); exact_match,strict inf over 4 rows, 0-shot",
        "note: lm-eval: cut (2 times alike)",
    ]
