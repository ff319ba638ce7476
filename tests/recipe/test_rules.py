"""Keys that contradict each other are refused by name; what has an effect is not."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from qlora_cli.recipe import rules
from qlora_cli.recipe.data_schema import DataSection
from qlora_cli.recipe.nodes import Place, Scalar, Table, merge, nested, plain
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.tree import parse_value

from .conftest import Load, Refuse, heads

BASE = "model: {base: b}\ndata: {train: t}\n"
STEPS = "train.steps=100"

REFUSED: list[tuple[tuple[str, ...], str]] = [
    ((), "mine.yaml:1:1: train.steps: one of train.steps and train.epochs is required (got neither)"),
    (
        (STEPS, "train.epochs=1.5"),
        "--set train.steps: train.steps: only one of train.steps and train.epochs may be set (got 100 and 1.5)",
    ),
    (
        (STEPS, "train.micro_batch_size=3"),
        "--set train.micro_batch_size: train.batch_size: must be a multiple of train.micro_batch_size (got 16 and 3)",
    ),
    ((STEPS, "train.group_by_length=true"), "train.group_by_length: has no use with train.packing (got true and true)"),
    ((STEPS, "train.schedule=constant", "train.warmup_steps=5"), "train.warmup_steps: has no effect"),
    ((STEPS, "train.schedule=constant", "train.warmup_ratio=0.1"), "train.warmup_ratio: has no effect"),
    ((STEPS, "train.schedule=constant_with_warmup"), "train.schedule: constant_with_warmup needs a warm-up"),
    ((STEPS, "train.warmup_steps=5", "train.warmup_ratio=0.1"), "train.warmup_ratio: only one warm-up may be set"),
    ((STEPS, "train.warmup_steps=100"), "train.warmup_steps: must be below train.steps (got 100 and 100)"),
    ((STEPS, "lora=null"), "--set lora: lora: null trains every weight, but quantization.type is nf4 (got null)"),
    ((STEPS, "quantization={type: none, storage_dtype: bfloat16}"), "storage_dtype: has no effect"),
    ((STEPS, "quantization={type: none, double_quant: false}"), "double_quant: has no effect"),
    ((STEPS, "quantization={type: none, blocksize: 128}"), "blocksize: has no effect"),
    ((STEPS, "data.eval=e.jsonl", "data.eval_split=0.1"), "data.eval_split: only one of data.eval and"),
    ((STEPS, "eval.every=10"), "eval.every: needs held-out rows"),
    ((STEPS, "data.eval_split=8", "eval.keep_best=true"), "eval.keep_best: needs eval.every"),
    ((STEPS, "data.eval_split=8", "eval.patience=3"), "eval.patience: needs eval.every"),
    ((STEPS, "log.to=[wandb, mlflow, wandb]"), "--set log.to: log.to: names wandb more than once (got [wandb, mlflow"),
    ((STEPS, "data.format=text", "data.loss_on=last"), "data.loss_on: last needs answers, but data.format is text"),
    ((STEPS, "data.format=text", "data.template=tokenizer"), "data.template: tokenizer needs turns"),
    (
        (STEPS, "data.format=alpaca", "data.columns={outptu: o}"),
        "--set data.columns: data.columns.outptu: data.format alpaca has no field of this name (got 'outptu')",
    ),
    (
        (STEPS, "data.sources={a: {path: t, format: text, columns: {txet: b}}}", "data.train=null"),
        "data.sources.a.columns.txet: data.format text has no field of this name (got 'txet')",
    ),
    ((STEPS, "data.format=auto", "data.columns={text: a}"), "data.columns: needs a data.format that is named"),
    ((STEPS, "data.train=null"), "data.train: one of data.train and data.sources is required (got neither)"),
    ((STEPS, "data.sources={a: {path: t}}"), "data.train: only one of data.train and data.sources may be set (got 't'"),
    ((STEPS, "data.mix=interleave"), "data.mix: interleave needs several sources (got one)"),
    ((STEPS, "data.stop=all_exhausted"), "data.stop: has no effect with data.mix concat (got all_exhausted)"),
    ((STEPS, "eval.metrics=[exact]"), "eval.metrics: needs held-out rows"),
    ((STEPS, "eval.samples=[hello]"), "eval.samples: needs held-out rows"),
    ((STEPS, "eval.choices=mmlu.json"), "eval.choices: needs held-out rows"),
    ((STEPS, "data.eval_split=0.1", "eval.metrics=['regex:(']"), "eval.metrics: is no regular expression"),
    ((STEPS, "data.truncate=start"), "data.truncate: has no effect with data.too_long drop (got start)"),
    ((STEPS, "data.too_long=split"), "data.too_long: split needs data.format text (got split)"),
    ((STEPS, "data.limits.bad=3"), "data.limits.bad: has no effect with data.on_bad_row error (got 3)"),
    ((STEPS, "model.device=cpu", "train.gradient_checkpointing=offload"), "needs a CUDA device"),
    ((STEPS, "model.device=cpu", "model.attention=flash_attention_2"), "needs a CUDA device"),
    ((STEPS, "model.device=cpu", "quantization.compute_dtype=float16"), "needs a CUDA device"),
]
ACCEPTED: list[tuple[str, ...]] = [
    (STEPS,),
    ("train.epochs=0.5",),
    (STEPS, "train.batch_size=12", "train.micro_batch_size=3"),
    (STEPS, "train.group_by_length=true", "train.packing=false"),
    (STEPS, "train.schedule=constant_with_warmup", "train.warmup_steps=99"),
    (STEPS, "train.schedule=linear", "train.warmup_ratio=0.1"),
    (STEPS, "lora=null", "quantization.type=none"),
    (STEPS, "quantization={type: none, double_quant: true, blocksize: 64}"),
    (STEPS, "data.eval=e.jsonl", "eval={every: 10, keep_best: true, patience: 2}"),
    (STEPS, "data.eval_split=0.1"),
    (STEPS, "data.eval_split=0.1", "eval={metrics: [exact, json, 'regex:^a.c$'], samples: [hi], choices: mmlu.json}"),
    (STEPS, "data.format=text", "data.loss_on=all", "data.template=none"),
    (STEPS, "data.format=prompt-completion", "data.columns={prompt: a, completion: b}"),
    (STEPS, "model.device=cpu", "train.optimizer=paged_adamw_32bit"),
    (STEPS, "train.gradient_checkpointing=offload", "model.attention=flash_attention_2"),
    (STEPS, "data.too_long=truncate", "data.truncate=start", "data.limits={dropped: 1%, cut: 0}"),
    (STEPS, "data.format=text", "data.too_long=split", "data.on_bad_row=skip", "data.limits.bad=2.5%"),
    (STEPS, "data.template='{{ messages }}'"),
]


@pytest.mark.parametrize(("overrides", "head"), REFUSED)
def test_a_contradiction_is_one_problem_with_a_way_out(refuse: Refuse, overrides: tuple[str, ...], head: str) -> None:
    (problem,) = refuse(BASE, *overrides)
    assert head in heads([problem])[0]
    assert "(got " in problem.what
    assert problem.why
    assert problem.fix


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_keys_that_go_together_are_accepted(load: Load, overrides: tuple[str, ...]) -> None:
    assert load(BASE, *overrides).recipe.data.train == "t"


def test_every_rule_has_a_case_that_it_refuses() -> None:
    recipes = [Recipe.model_validate(tree) for tree in map(_tree, REFUSED)]
    fired = {rule for rule in rules.RULES for recipe in recipes if list(rule(recipe))}
    assert len(fired) == len(rules.RULES) == 22


def _tree(case: tuple[tuple[str, ...], str]) -> dict[str, Any]:
    """What a case's overrides set, without the loader, which would refuse it."""
    table = nested(("model", "base"), Scalar(Place(""), "b"))
    table = merge(table, nested(("data",), Table(Place(""), {})))
    for text in ("data.train=t", *case[0]):
        key, _, value = text.partition("=")
        parts = tuple(key.split("."))
        table = merge(table, nested(parts, parse_value(value, "", parts).root or table))
    return dict(plain(table))


def test_three_idle_evaluation_keys_are_three_problems(refuse: Refuse) -> None:
    text = BASE + "train: {steps: 1}\neval:\n  every: 1\n  keep_best: true\n  patience: 2\n"
    assert [problem.where for problem in refuse(text)] == ["mine.yaml:5:10", "mine.yaml:6:14", "mine.yaml:7:13"]


def test_rules_are_checked_beside_other_mistakes_but_not_on_keys_that_are_wrong(refuse: Refuse) -> None:
    text = (
        "lrr: 1\ntrain:\n  stepz: 5\n  batch_size: 7\n  micro_batch_size: 2\n  warmup_steps: no\n  schedule: constant\n"
    )
    assert [head.split(" (got")[0] for head in heads(refuse(text))] == [
        "mine.yaml:1:1: lrr: unknown key",
        "mine.yaml:1:1: model.base: this key is required",
        "mine.yaml:1:1: data.train: one of data.train and data.sources is required",
        "mine.yaml:3:3: train.stepz: unknown key",
        "mine.yaml:4:15: train.batch_size: must be a multiple of train.micro_batch_size",
        "mine.yaml:6:17: train.warmup_steps: must be a whole number of at least 0",
    ]


def test_a_rule_points_at_the_key_that_is_written_down(refuse: Refuse) -> None:
    (problem,) = refuse(BASE + "train:\n  steps: 5\nlora: null\n")
    assert problem.where == "mine.yaml:5:7"


def test_every_format_has_fields() -> None:
    formats = get_args(DataSection.model_fields["format"].annotation)
    assert {*rules.FIELDS, "auto"} == set(formats)
