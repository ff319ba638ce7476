"""Arithmetic and tables of `train_vs_peer.py`: what a run's steps come to, and two sides beside each other.

Knows numbers only. Invariant: a ratio above 1 means that we are better.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from child import Finished
from limit import Counts, flop_per_token
from workload import Spec

LEAST_FRACTION = 0.35
"""Of the limit, that ours should reach."""
NUMBERS = ("tokens_per_second", "supervised_per_second", "peak_rss", "excluded_seconds", "gemm_flops", "fraction")
Steps = Sequence[Mapping[str, float]]
Runs = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Ran:
    """A process that trained, and whether it computed activations again in the backward pass."""

    finished: Finished
    again: bool


def figures(steps: Steps, ran: Ran, spec: Spec, counts: Mapping[str, int], gemm: float) -> dict[str, Any]:
    """What the counted steps of one run come to, on a machine of `gemm` FLOP/s."""
    tokens, targets, seconds = (sum(step[key] for step in steps) for key in ("tokens", "targets", "seconds"))
    work = flop_per_token(Counts(**counts), spec.rank, ran.again, targets / tokens)
    return {
        "tokens_per_second": tokens / seconds,
        "supervised_per_second": targets / seconds,
        "peak_rss": ran.finished.peak_rss,
        "excluded_seconds": ran.finished.seconds - seconds,
        "checkpointing": ran.again,
        "flop_per_token": work,
        "gemm_flops": gemm,
        "limit_tokens_per_second": gemm / work,
        "fraction": tokens / seconds * work / gemm,
        "step_seconds": [step["seconds"] for step in steps],
    }


def summary(runs: Runs, bars: Mapping[str, float], same_rows: bool) -> dict[str, Any]:
    """Medians of both, their ratios, the losses side by side, and the bars."""
    medians = {
        who: {key: statistics.median(run[key] for run in found) for key in NUMBERS} for who, found in runs.items()
    }
    mine = medians["ours"]
    result: dict[str, Any] = {"median": medians, "bars": {"fraction": bar(mine["fraction"], LEAST_FRACTION)}}
    if "peer" not in medians:
        return result
    theirs = medians["peer"]
    ratio = {key: mine[key] / theirs[key] for key in ("tokens_per_second", "supervised_per_second")}
    ratio["peak_rss"] = theirs["peak_rss"] / mine["peak_rss"]
    met = {key: bar(ratio[key], least) for key, least in bars.items()}
    curves = losses(runs["ours"][0]["losses"], runs["peer"][0]["losses"], same_rows)
    return {"median": medians, "ratio": ratio, "bars": result["bars"] | met, "loss": curves}


def bar(found: float, least: float) -> dict[str, Any]:
    """A figure beside what it should reach."""
    return {"found": found, "least": least, "met": found >= least}


def losses(mine: Sequence[float], theirs: Sequence[float], same_rows: bool) -> dict[str, Any]:
    """Both curves and how far they are apart: the largest difference of a step where its rows are the same, else the
    difference of the means."""
    if same_rows:
        difference = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    else:
        difference = abs(statistics.mean(mine) - statistics.mean(theirs))
    return {"ours": list(mine), "peer": list(theirs), "same_rows": same_rows, "difference": difference}


def show(result: Mapping[str, Any]) -> str:
    """The whole result as text."""
    machine, versions = result["machine"], result["versions"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']:.2f}; {result['date']}"]
    lines += [f"{who}: " + ", ".join(f"{k} {v}" for k, v in found.items()) for who, found in versions.items() if found]
    for name, case in result["cases"].items():
        lines += ["", *_case(name, case, result["repeat"])]
    return "\n".join(lines)


HEADER = ("", "tokens/s", "supervised/s", "peak RSS", "of limit", "GEMM TFLOP/s", "excluded")


def _case(name: str, case: Mapping[str, Any], repeat: int) -> list[str]:
    facts, spec = case["workload"], case["spec"]
    low, median, high = facts["tokens_deciles"]
    share = facts["targets"] / facts["tokens"]
    about = (
        f"{name}: {facts['rows']} rows, {facts['tokens']:,} tokens ({share:.0%} supervised), tokens per row: a tenth"
    )
    about += (
        f" under {low:.0f}, median {median:.0f}, a tenth over {high:.0f}; rank {spec['rank']}, {spec['optimizer']},"
    )
    about += f" checkpointing {spec['checkpointing']}; medians of {repeat}"
    lines = [about, "".join(f"{word:>14}" for word in HEADER)]
    lines += [_side(who, found) for who, found in case["median"].items()]
    if "ratio" in case:
        ratio = case["ratio"]
        cells = (f"{ratio[key]:.2f}x" for key in ("tokens_per_second", "supervised_per_second", "peak_rss"))
        lines += [f"{'ratio':>14}" + "".join(f"{cell:>14}" for cell in cells), *_curves(case["loss"])]
    met = (
        f"{key} {b['found']:.2f} of {b['least']} {'met' if b['met'] else 'NOT MET'}" for key, b in case["bars"].items()
    )
    return [*lines, "bars: " + "; ".join(met)]


def _side(who: str, found: Mapping[str, float]) -> str:
    cells = (
        f"{found['tokens_per_second']:.0f}",
        f"{found['supervised_per_second']:.0f}",
        f"{found['peak_rss'] / 1e9:.2f} GB",
        f"{found['fraction']:.1%}",
        f"{found['gemm_flops'] / 1e12:.2f}",
        f"{found['excluded_seconds']:.0f} s",
    )
    return f"{who:>14}" + "".join(f"{cell:>14}" for cell in cells)


def _curves(loss: Mapping[str, Any]) -> list[str]:
    curves = [f"loss {who}: " + " ".join(f"{value:.4f}" for value in loss[who]) for who in ("ours", "peer")]
    kind = "largest difference of a step" if loss["same_rows"] else "steps hold other rows; difference of the means"
    return [*curves, f"{kind}: {loss['difference']:.4f}"]
