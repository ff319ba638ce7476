"""The training benchmarks: their workload, their arithmetic, and both scripts on the smallest base."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"
sys.path.insert(0, str(BENCH))  # scripts find each other by their folder

import child  # noqa: E402
import compare  # noqa: E402
import limit  # noqa: E402
import sweep  # noqa: E402
import train_vs_peer  # noqa: E402
import workload  # noqa: E402

SPEC = workload.Spec(
    shape="tiny",
    full=False,
    steps=2,
    batch_size=8,
    micro_batch_size=2,
    max_length=128,
    rank=4,
    optimizer="adamw",
    checkpointing="on",
)
COUNTS = {"linear": 1000, "head": 100, "edges": 10}
COUNTED = [{"tokens": 30, "targets": 10, "loss": 2.0, "seconds": 2.0}, {"tokens": 10, "targets": 10, "seconds": 2.0}]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the workload."""
    folder: Path = tmp_path_factory.mktemp("bench").resolve() / "chat"
    return prepare(folder, SPEC)


def prepare(folder: Path, spec: workload.Spec) -> Path:
    """What `workload.make` does, in this process."""
    workload.write_spec(folder, spec)
    workload.prepare(folder)
    return folder


def facts(folder: Path) -> dict[str, Any]:
    """What the workload says of itself."""
    found: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return found


def script(name: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a benchmark."""
    command = [sys.executable, str(BENCH / name), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


def test_row_lengths_have_the_median_and_both_tenths_that_the_benchmark_names() -> None:
    lengths = sorted(workload.row_lengths(2000, Random(0)))
    assert lengths[1000] == pytest.approx(1216, rel=0.01)
    assert sum(length < 304 for length in lengths) == pytest.approx(200, abs=2)
    assert sum(length > 2776 for length in lengths) == pytest.approx(200, abs=2)


def test_few_rows_have_the_lengths_of_many() -> None:
    lengths = workload.row_lengths(96, Random(1))
    assert lengths != sorted(lengths)
    low, median, high = workload.deciles(lengths)
    assert (low, median, high) == pytest.approx((304, 1216, 2776), rel=0.07)


def test_text_has_exactly_the_characters_asked_for_and_is_the_same_for_the_same_seed() -> None:
    texts = [workload.Writer(Random(3)).text(500) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 500


def test_a_product_of_the_linear_layers_counts_three_times_with_checkpointing_and_twice_without() -> None:
    counts = limit.Counts(linear=1000, head=0, edges=0)
    assert limit.flop_per_token(counts, 8, True, 1.0) == 6 * 1000
    assert limit.flop_per_token(counts, 8, False, 1.0) == 4 * 1000


def test_adapters_add_eight_flop_per_rank_and_edge_and_the_head_counts_at_targets_only() -> None:
    counts = limit.Counts(linear=0, head=100, edges=10)
    assert limit.flop_per_token(counts, 8, True, 0.0) == 8 * 8 * 10
    assert limit.flop_per_token(counts, 8, True, 0.25) == 8 * 8 * 10 + 4 * 100 * 0.25


def test_rates_are_sums_over_sums_and_the_rest_of_the_process_is_told_apart() -> None:
    ran = compare.Ran(child.Finished(10.0, 4096), SPEC.checkpointing != "off")
    found = compare.figures(COUNTED, ran, SPEC, COUNTS, gemm=1e6)
    assert found["tokens_per_second"] == 10.0
    assert found["supervised_per_second"] == 5.0
    assert found["excluded_seconds"] == 6.0
    work = 6 * 1000 + 8 * 4 * 10 + 4 * 100 * 0.5
    assert found["fraction"] == pytest.approx(10.0 * work / 1e6)
    assert found["fraction"] == pytest.approx(found["tokens_per_second"] / found["limit_tokens_per_second"])


def run_of(rate: float, memory: float, losses: list[float]) -> dict[str, Any]:
    return dict.fromkeys(compare.NUMBERS, rate) | {"peak_rss": memory, "losses": losses}


def test_ratios_are_of_medians_and_above_one_where_we_are_better() -> None:
    ours = [run_of(rate, 1e9, [3.0, 2.0]) for rate in (10.0, 40.0, 12.0)]
    peer = [run_of(rate, 3e9, [3.0, 2.1]) for rate in (4.0, 3.0, 1.0)]
    found = compare.summary({"ours": ours, "peer": peer}, {"tokens_per_second": 4.5, "peak_rss": 2.0}, same_rows=True)
    assert found["ratio"] == {"tokens_per_second": 4.0, "supervised_per_second": 4.0, "peak_rss": 3.0}
    assert {key: bar["met"] for key, bar in found["bars"].items()} == {
        "fraction": True,
        "tokens_per_second": False,
        "peak_rss": True,
    }


def test_curves_are_compared_step_by_step_only_where_steps_hold_the_same_rows() -> None:
    assert compare.losses([3.0, 2.0], [2.0, 3.0], same_rows=True)["difference"] == 1.0
    assert compare.losses([3.0, 2.0], [2.0, 3.0, 2.5], same_rows=False)["difference"] == 0.0


def place(case: str, tokens: int) -> train_vs_peer.Place:
    facts = {"tokens": tokens, "step_tokens": [tokens - 10, 10], "step_targets": [5, 5]}
    chosen = train_vs_peer.CASES[case]
    spec = replace(SPEC, micro_batch_size=chosen.micro_batch_size, max_length=chosen.max_length, batch_size=16)
    return train_vs_peer.Place(Path(), chosen, spec, facts)


def test_the_peer_takes_as_many_packs_a_step_as_hold_our_rows() -> None:
    assert place("padded", 9_000).accumulation == 4
    assert place("packed", 2 * 5_300).accumulation == 5
    assert place("packed", 100).accumulation == 1


def test_a_run_on_other_rows_ends_the_benchmark() -> None:
    steps: list[dict[str, float]] = [{"tokens": 90, "targets": 5}, {"tokens": 10, "targets": 5}]
    train_vs_peer.check_same("peer", steps, place("padded", 100))
    with pytest.raises(SystemExit, match="peer: tokens per step"):
        train_vs_peer.check_same("peer", steps[::-1], place("padded", 100))
    train_vs_peer.check_same("peer", steps[::-1], place("packed", 100))
    with pytest.raises(SystemExit, match="ours: tokens per step"):
        train_vs_peer.check_same("ours", steps[::-1], place("packed", 100))
    with pytest.raises(SystemExit, match="peer: tokens per step"):
        train_vs_peer.check_same("peer", steps[1:], place("packed", 100))


def test_a_child_is_measured_apart_from_its_parent(tmp_path: Path) -> None:
    small = child.run([sys.executable, "-c", "pass"], tmp_path / "log")
    large = child.run([sys.executable, "-c", "x = bytes(300_000_000); y = bytearray(x)"], tmp_path / "log")
    assert large.peak_rss - small.peak_rss >= 0 and large.peak_rss > 300_000_000
    assert large.seconds > 0


def test_a_child_that_fails_ends_the_benchmark_with_the_end_of_its_output(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)ended with 3:.*because of this"):
        child.run([sys.executable, "-c", "print('because of this'); raise SystemExit(3)"], tmp_path / "log")


def test_the_prepared_rows_are_masked_up_to_the_answer_and_counted_per_step(prepared: Path) -> None:
    rows = [json.loads(line) for line in (prepared / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 16
    for row in rows:
        assert row["labels"][0] == -100
        assert row["labels"][-1] == row["input_ids"][-1]
        assert {b for a, b in zip(row["input_ids"], row["labels"], strict=True) if a != b} == {-100}
    found = facts(prepared)
    assert found["step_tokens"] == [sum(len(row["input_ids"]) for row in part) for part in (rows[:8], rows[8:])]
    assert found["targets"] == sum(label != -100 for row in rows for label in row["labels"])
    assert 0.4 < found["targets"] / found["tokens"] < 0.9


def test_the_counts_of_the_limit_are_those_of_the_model(prepared: Path) -> None:
    hidden, wide, layers, vocabulary = 64, 128, 2, 1024
    shapes = [(hidden, hidden)] * 4 + [(hidden, wide)] * 3
    assert facts(prepared)["counts"] == {
        "linear": layers * sum(a * b for a, b in shapes),
        "edges": layers * sum(a + b for a, b in shapes),
        "head": vocabulary * hidden,
    }


def test_full_rows_have_the_same_length_and_every_token_is_a_target(tmp_path: Path) -> None:
    found = facts(prepare(tmp_path.resolve() / "full", replace(SPEC, full=True, steps=1)))
    assert found["step_tokens"] == [8 * 128]
    assert found["step_targets"] == [8 * 127]  # the first token of a row is never predicted


def test_our_side_runs_on_the_prepared_rows_and_is_held_against_the_limit(tmp_path: Path) -> None:
    options = ["--case", "padded", "--shape", "tiny", "--steps", "2", "--repeat", "1", "--ours-only", "--json"]
    done = script("train_vs_peer.py", *options, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    run, result = map(json.loads, done.stdout.splitlines())
    assert (run["event"], run["who"], result["event"]) == ("run", "ours", "result")
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8")) == result
    case = result["cases"]["padded"]
    assert case["median"]["ours"]["fraction"] > 0
    assert len(run["losses"]) == 2
    assert run["losses"][0] == pytest.approx(6.93, abs=0.3)  # of a random base: about ln 1024


def test_a_missing_peer_is_named_with_what_to_install(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    done = script("train_vs_peer.py", "--peer-python", bare / "bin" / "python")
    assert done.returncode == 1
    assert "lacks trl, peft, bitsandbytes" in done.stderr
    assert "pip install trl peft bitsandbytes" in done.stderr


@pytest.mark.skipif("trl" in child.versions(sys.executable, ["trl"])[1], reason="the peer is not installed")
def test_the_peers_losses_are_ours_on_the_same_rows() -> None:
    options = ["--case", "padded", "--shape", "tiny", "--steps", "3", "--repeat", "1", "--json"]
    done = script("train_vs_peer.py", *options)
    assert done.returncode == 0, done.stderr
    loss = json.loads(done.stdout.splitlines()[-1])["cases"]["padded"]["loss"]
    assert loss["difference"] < 0.002


def test_the_sweep_leaves_its_middle_on_one_axis_at_a_time() -> None:
    middle = sweep.Point()
    found = list(sweep.points(list(sweep.AXES)))
    assert len(found) == 15
    for axis, point in found:
        assert replace(point, **{axis: getattr(middle, axis)}) == middle


def test_memory_per_token_is_what_the_second_half_of_a_micro_batch_adds() -> None:
    rest = {"tokens_per_second": 5.0, "gemm_flops": 1.0, "fraction": 0.5, "flop_per_token": 7.0}
    found = sweep.cost({**rest, "peak_rss": 700}, {**rest, "peak_rss": 1000}, tokens=100, idle=200)
    assert found == rest | {"micro_batch_tokens": 100, "rss_growth": 500, "bytes_per_token": 3.0}


def test_a_point_of_the_sweep_is_measured_and_leaves_nothing_behind(tmp_path: Path) -> None:
    options = ["--shape", "tiny", "--tokens", "1", "--accumulation", "1", "--steps", "2"]
    point = sweep.Point(rank=4, length=64, vocabulary=1024, layers=1)
    found = sweep.measure(point, 100, tmp_path.resolve() / "point", sweep.arguments(options))
    assert found["micro_batch_tokens"] == 64
    assert found["rss_growth"] > 50e6
    assert found["tokens_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_table_has_a_line_for_each_point() -> None:
    numbers = dict.fromkeys(("tokens_per_second", "flop_per_token", "fraction", "rss_growth", "bytes_per_token"), 1.0)
    lines = sweep.show([{"axis": "rank", "point": {"rank": rank}, **numbers} for rank in (8, 64)]).splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [["rank", "8"], ["rank", "64"]]
    assert "not measured" in lines[-1]
