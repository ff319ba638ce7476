"""The parity study: its arithmetic, its verdicts, and a little of everything on a random base."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import parity
import pytest
from parity_study import verdict
from parity_study.design import (
    ATTENTION,
    DOUBLE,
    FULL,
    LENGTHS,
    LINEAR,
    NF4,
    SIXTEEN,
    Comparison,
    Configuration,
    Run,
    Study,
    claims,
    configurations,
)
from parity_study.document import Findings, document
from parity_study.figures import Interval, interval, quantile
from parity_study.results import Results, best_rates, key, study_runs, sweep_runs, tabulate
from parity_study.verdict import ACCURACY, LOSS
from parity_study.work import RECIPE, overrides

from qlora_cli.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent
LOW, HIGH = (Configuration(DOUBLE, LINEAR, rank) for rank in (4, 16))


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (4, 2.776), (7, 2.365), (29, 2.045), (299, 1.968)])
def test_quantiles_are_those_of_the_printed_table(freedom: int, value: float) -> None:
    assert quantile(freedom) == pytest.approx(value, abs=5e-4)


def test_an_interval_is_the_t_interval() -> None:
    of = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * math.sqrt(2.5) / math.sqrt(5)
    assert (of.mean, of.low, of.high) == pytest.approx((3.0, 3 - half, 3 + half), abs=1e-3)
    assert interval([2.0]).holds_zero
    assert interval([0.0, 0.0]).holds_zero


@pytest.mark.parametrize(
    ("bounds", "measure", "said", "as_same", "as_better"),
    [
        ((-0.2, -0.3, -0.1), LOSS, "better by 0.20000 [0.10000, 0.30000]", "otherwise than claimed", "as claimed"),
        (
            (0.2, 0.1, 0.3),
            LOSS,
            "worse by 0.20000 [0.10000, 0.30000]",
            "otherwise than claimed",
            "otherwise than claimed",
        ),
        ((0.02, 0.01, 0.03), ACCURACY, "better by 2.0 [1.0, 3.0]", "otherwise than claimed", "as claimed"),
        (
            (-0.02, -0.03, -0.01),
            ACCURACY,
            "worse by 2.0 [1.0, 3.0]",
            "otherwise than claimed",
            "otherwise than claimed",
        ),
        ((0.1, -0.1, 0.3), LOSS, "no difference seen: the interval holds 0", "no contradiction", "not seen"),
        ((0.0, 0.0, 0.0), ACCURACY, "no difference seen: the interval holds 0", "no contradiction", "not seen"),
    ],
)
def test_a_verdict_follows_from_the_interval_and_the_measure(
    bounds: tuple[float, float, float], measure: verdict.Measure, said: str, as_same: str, as_better: str
) -> None:
    of = Interval(*bounds)
    assert verdict.sentence(of, measure) == said
    assert verdict.agreement(of, measure, "same") == as_same
    assert verdict.agreement(of, measure, "better") == as_better


def test_the_study_is_every_storage_rank_and_target_and_full_fine_tuning() -> None:
    every = configurations()
    assert len({each.name for each in every}) == len(every) == 4 * 3 * 2 + 1
    assert [each.kind for each in every].count(FULL) == 1


def test_every_comparison_is_of_configurations_that_are_run_and_of_different_ones() -> None:
    every = set(configurations())
    compared = [each for claim in claims() for each in claim.comparisons]
    assert len(compared) > 10
    for each in compared:
        assert {*each.first, *each.second} <= every
        assert not set(each.first) & set(each.second)
        assert each.expected in {"same", "better"}


def test_every_configuration_is_a_valid_recipe_of_what_its_name_says(tmp_path: Path) -> None:
    study = parity.full_study(tmp_path, 5)
    recipes = {each: load_recipe(RECIPE, overrides(study, Run(each, 48, 3, 1e-3))).recipe for each in configurations()}
    assert recipes[Configuration(FULL)].lora is None
    assert recipes[Configuration(FULL)].quantization.type == "none"
    narrow = recipes[Configuration(NF4, ATTENTION, 64)]
    assert narrow.lora is not None
    assert (narrow.lora.r, narrow.lora.targets) == (64, ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert (narrow.quantization.type, narrow.quantization.double_quant) == ("nf4", False)
    assert {(recipe.train.steps, recipe.train.seed) for recipe in recipes.values()} == {(48, 3)}
    kinds = {(r.quantization.type, r.quantization.double_quant, r.lora) for r in recipes.values()}
    assert len(kinds) == len(recipes), "no two configurations are the same recipe"


def test_records_lose_the_town_and_nothing_else() -> None:
    answer = {"role": "assistant", "content": json.dumps({"name": "A B", "age": 3, "job": "cook", "city": "C"})}
    asked = {"role": "user", "content": "A B lives in C."}
    assert parity.without_town({"messages": [asked, answer]}) == {
        "messages": [asked, {"role": "assistant", "content": '{"name": "A B", "age": 3, "job": "cook"}'}]
    }


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two configurations, three seeds, two lengths."""
    return Study(tmp_path, tmp_path / "base", (LOW, HIGH), (0, 1, 2), {LINEAR: (1e-3, 2e-3, 4e-3)}, (5, 15))


RATES = {5: {LINEAR: 1e-3}, 15: {LINEAR: 2e-3}}


def record(results: Results, run: Run, loss: float) -> None:
    results.add(key(run), {"loss": loss, "accuracy": 1 - loss, "parameters": 7, "seconds": 1.0, "worked": 1.0})


def test_the_rate_taken_at_a_length_is_the_one_with_the_lowest_loss_of_the_sweep_at_it(study: Study) -> None:
    results = Results(study.work / "results.jsonl")
    losses = {(5, 1e-3): 0.2, (5, 2e-3): 0.3, (5, 4e-3): 0.4, (15, 1e-3): 0.1, (15, 2e-3): 0.05, (15, 4e-3): 0.3}
    runs = sweep_runs(study)
    assert {(run.steps, run.rate) for run in runs} == set(losses)
    assert {run.seed for run in runs}.isdisjoint(study.seeds)
    for run in runs:
        record(results, run, losses[run.steps, run.rate])
    assert best_rates(study, results) == RATES


def test_differences_are_paired_by_seed_within_a_length_and_a_seed_that_is_not_whole_is_left_out(study: Study) -> None:
    results = Results(study.work / "results.jsonl")
    losses = {5: {0: (0.1, 0.2), 1: (0.5, 0.6)}, 15: {0: (0.9, 0.6), 1: (0.4, 0.1), 2: (0.3, 0.3)}}
    for steps, seeds in losses.items():
        for seed, pair in seeds.items():
            for each, loss in zip((LOW, HIGH), pair, strict=True):
                record(results, Run(each, steps, seed, RATES[steps][LINEAR]), loss)
    record(results, Run(LOW, 5, 2, 1e-3), 9.0)
    tables = tabulate(study, RATES, results)
    assert [table.seeds for table in tables.values()] == [(0, 1), (0, 1)], "seed 2 is whole at 15 steps only"
    for steps, wanted in {5: 0.1, 15: -0.3}.items():
        of = tables[steps].difference("loss", Comparison("", (HIGH,), (LOW,), "same"))
        assert (of.mean, of.low, of.high) == pytest.approx((wanted,) * 3), "the seeds differ by far more"


def test_a_claim_has_a_verdict_for_each_length_and_a_rate_at_the_edge_is_told(study: Study) -> None:
    results = Results(study.work / "results.jsonl")
    for run in sweep_runs(study):
        record(results, run, abs(run.rate - RATES[run.steps][LINEAR]) + 0.1)
    better_by = {5: {LOW: 0.0, HIGH: 0.25}, 15: {LOW: 0.0, HIGH: 0.0}}
    for run in study_runs(study, RATES):
        record(results, run, 0.5 + 0.01 * run.seed - better_by[run.steps][run.configuration])
    untrained = {name: {"bits": 4.5, "losses": [0.1, 0.2]} for name in (SIXTEEN, DOUBLE)}
    tables = tabulate(study, RATES, results)
    lines = document(Findings(study, RATES, results, tables, untrained, "command", 2), "picture.png").splitlines()
    compared = f"| {DOUBLE}, {LINEAR}: rank 16 against rank 4"
    same = "no difference seen: the interval holds 0"
    better = {"loss": "better by 0.25000 [0.25000, 0.25000]", "points": "better by 25.0 [25.0, 25.0]"}
    rows = [line.split(" | ") for line in lines if line.startswith(compared)]
    assert [(row[1], row[2], row[4]) for row in rows] == [
        *(("5", "loss", better["loss"]), ("15", "loss", same)),
        *(("5", "points", better["points"]), ("15", "points", same)),
    ]
    assert "- 5 steps: otherwise than claimed in 2 of 2." in lines
    assert "- 15 steps: no contradiction in 2 of 2." in lines
    assert "| 5 | LoRA, all-linear | 0.001 | 0.10000 | 90.0 | taken, at the edge of those tried |" in lines
    assert "| 15 | LoRA, all-linear | 0.002 | 0.10000 | 90.0 | taken |" in lines
    assert f"| {LOW.name} | 7 | 0.001 / 0.002 |" in "\n".join(lines)


def test_results_outlive_a_line_that_was_cut_and_only_what_is_missing_is_run(study: Study) -> None:
    path = study.work / "results.jsonl"
    runs = study_runs(study, RATES)
    assert len({key(run) for run in runs}) == len(runs) == 2 * 3 * 2
    record(Results(path), runs[0], 0.1)
    path.write_bytes(path.read_bytes() + b'{"key": "half')
    again = Results.read(path)
    assert again.missing(runs) == runs[1:]
    record(again, runs[1], 0.2)
    assert Results.read(path).missing(runs) == runs[2:]
    others = study_runs(study, {5: {LINEAR: 4e-3}, 15: {LINEAR: 4e-3}})
    assert Results.read(path).missing(others) == others


def test_results_of_the_time_when_there_was_one_length_count_for_that_length(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    name = "QLoRA NF4 + DQ, all-linear, rank 16; seed 0; rate 0.004; 16 steps; heldout"
    path.write_text(json.dumps({"key": name, "loss": 0.01, "accuracy": 0.9, "parameters": 7}) + "\n", encoding="utf-8")
    study = parity.full_study(tmp_path, 2)
    assert study.lengths == LENGTHS == (16, 48)
    runs = study_runs(study, {steps: dict.fromkeys((FULL, LINEAR, ATTENTION), 4e-3) for steps in LENGTHS})
    missing = Results.read(path).missing(runs)
    assert set(runs) - set(missing) == {Run(HIGH, 16, 0, 4e-3)}


def test_smoke_run_makes_table_picture_and_verdicts_and_a_second_one_runs_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "parity.py"), "--smoke", "--workers", "1"]
    command += ["--work", str(tmp_path / "work"), "--docs", str(tmp_path / "docs")]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    text = (tmp_path / "docs" / "parity.md").read_text(encoding="utf-8")
    picture = (tmp_path / "docs" / "parity.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 120_000
    assert f"| {LOW.name} |" in text
    rows = [line for line in text.splitlines() if line.startswith(f"| {DOUBLE}, {LINEAR}: rank 16 against rank 4 |")]
    assert [row.split(" | ")[1] for row in rows] == ["2", "4", "2", "4"]
    assert all("no difference seen" in row or "better by" in row or "worse by" in row for row in rows)
    results = (tmp_path / "work" / "results.jsonl").read_bytes()
    assert len(results.splitlines()) == 2 * 2 + 2 + 2 * 4, "sweep, untrained bases, runs"
    assert list((tmp_path / "work" / "runs").iterdir()) == []

    again = subprocess.run([*command, "--report"], capture_output=True, text=True, check=False)
    assert again.returncode == 2, "a mode is one of them"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "work" / "results.jsonl").read_bytes() == results
