"""Run directories as training, evaluation and merging leave them, with figures made up."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from tests.conftest import write_jsonl

MB = 1_000_000
NOW = 1_790_000_000.0


def write_run(run: Path, steps: int = 120, every: int = 1, seed: int = 0, **changes: Any) -> Path:
    """A whole run of `steps`, of which every `every`th is logged. Changes: base, lr, rank, state, floor."""
    options: dict[str, Any] = {
        "base": "meta-llama/Llama-3.1-8B",
        "lr": 2e-4,
        "rank": 64,
        "state": "finished",
        "floor": 1.0,
    } | changes
    run.mkdir(parents=True)
    pick = random.Random(seed)
    lines = [line for step in range(1, steps + 1) for line in _lines(step, steps, every, options, pick)]
    write_jsonl(run / "metrics.jsonl", lines)
    status = {"state": options["state"], "step": steps, "total_steps": steps, "reason": "", "pid": 1, "host": "h"}
    write_object(run / "status.json", {**status, "started": NOW, "updated": NOW + 7384})
    (run / "resolved.yaml").write_text(_recipe(options, steps))
    write_object(run / "plan.json", _plan(seed))
    write_object(run / "data_receipt.json", _receipt())
    write_object(run / "lock.json", _lock(options["base"], seed))
    return run


def write_object(path: Path, value: Any) -> None:
    """A JSON file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _lines(step: int, steps: int, every: int, options: dict[str, Any], pick: random.Random) -> list[dict[str, Any]]:
    share = step / steps
    ideal = options["floor"] + 1.6 * math.exp(-5 * share)
    found = []
    if step % every == 0 or step in (1, steps):
        figures = {"loss": ideal * (1 + pick.gauss(0, 0.06)), "grad_norm": 0.3 + abs(pick.gauss(0, 0.08))}
        figures |= {"lr": options["lr"] * min(1, share / 0.03) * (1 + math.cos(math.pi * share)) / 2, "seconds": 4.1}
        counts = {"rows": 16, "tokens": round(8192 * (1 + pick.gauss(0, 0.04))), "targets": 5000, "positions": 9000}
        found.append({"kind": "step", "step": step, "total": steps, "memory_bytes": 9_100 * MB, **figures, **counts})
    if step % max(1, steps // 12) == 0:
        loss = ideal * 1.04 + 0.05 * share**2
        figures = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 3}
        score: dict[str, Any] = {
            "metric": "exact",
            "right": round(160 * share),
            "rows": 200,
            "share": round(160 * share) / 200,
        }
        score |= {"low": max(0, score["share"] - 0.06), "high": min(1, score["share"] + 0.06)}
        counts = {"rows": 200, "tokens": 9000, "targets": 4000, "best": True}
        found.append({"kind": "eval", "step": step, **figures, **counts, "scores": [score]})
    return found


def _recipe(options: dict[str, Any], steps: int) -> str:
    return (
        "# Every value of this run, and where it came from.\n"
        f"model:\n  base: {json.dumps(options['base'])}  # mine.yaml:1\n  revision: null  # default\n"
        "quantization:\n  type: nf4  # default\n  double_quant: true  # default\n"
        f"lora:\n  r: {options['rank']}  # mine.yaml:4\n  alpha: 16  # mine.yaml:5\n  targets: all-linear  # default\n"
        "data:\n  train: chat.jsonl  # mine.yaml:7\n  max_length: 2048  # mine.yaml:8\n"
        f"train:\n  steps: {steps}  # mine.yaml:10\n  lr: {options['lr']}  # --set\n  betas: [0.9, 0.999]  # default\n"
        f"output: out/r{options['rank']}  # default\n"
    )


def _plan(seed: int) -> dict[str, Any]:
    memory = {"4-bit weights": 3490 * MB, "quantization constants": 111 * MB, "other weights": 2101 * MB}
    memory |= {"trained weights": 671 * MB, "gradients": 671 * MB, "optimizer": 336 * MB, "layer inputs": 537 * MB}
    memory |= {"one layer at work": 820 * MB, "loss chunk": 960 * MB, "evaluation": 410 * MB}
    total = sum(memory.values()) - (820 + 410) * MB
    return {"memory": memory, "memory_bytes": total, "measured_memory_bytes": total - (190 + 400 * seed) * MB}


def _receipt() -> dict[str, Any]:
    source = {"source": "chat.jsonl", "read": 10_000, "kept": 9_700, "held_out": 200, "left_out": 0, "cut": 41}
    source |= {
        "duplicate": 12,
        "overlap": 0,
        "bad": 3,
        "trailing_turns": 0,
        "dropped": {"too long": 88, "duplicate": 12},
    }
    lengths = {"0%": 12, "50%": 311, "90%": 1402, "100%": 2048}
    train = {"rows": 9_700, "tokens": 4_812_331, "supervised_tokens": 2_911_204, "length_quantiles": lengths}
    held_out = {"rows": 200, "tokens": 98_411, "supervised_tokens": 60_120, "length_quantiles": lengths}
    return {"sources": [source], "train": train, "held_out": held_out, "packing": 0.947, "notes": []}


def _lock(base: str, seed: int) -> dict[str, Any]:
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "bitsandbytes": "0.50.2"}
    known = {
        "qlora": "0.1.0",
        "base": {"name": base, "revision": "d04e592bb4f6"},
        "data": {"chat.jsonl": "64ff0df8" * 8},
    }
    return {**known, "versions": versions, "python": "3.11.7", "device": "NVIDIA A10G", "seed": seed}


PROMPTS = {
    "Explain to a child why the sky is blue.": [
        "The sky the sky is the the sky blue is",
        "The sky is blue because the light is blue.",
        "Sunlight is made of many colours. Air scatters the blue ones most, so blue comes to us from everywhere.",
    ],
    "Write a JSON object for: Ada Lovelace, born 1815.": [
        "Ada Lovelace was",
        '{"name": "Ada Lovelace"',
        '{"name": "Ada Lovelace", "born": 1815}',
    ],
}


def add_samples(run: Path, steps: int = 120) -> None:
    """samples.jsonl: three answers to each of `PROMPTS`."""
    rows = [
        {
            "step": steps * (i + 1) // 3,
            "prompt": prompt,
            "answer": answers[i],
            "ended": ["max tokens", "stop token"][i > 0],
        }
        for i in range(3)
        for prompt, answers in PROMPTS.items()
    ]
    write_jsonl(run / "samples.jsonl", rows)


def add_evaluation(run: Path, right: int = 190) -> None:
    """evaluations/: a result with all that `qlora eval` can be asked for."""
    share = right / 200
    score = {"metric": "exact", "right": right, "rows": 200, "share": share, "low": share - 0.04, "high": share + 0.02}
    source = {"loss": 1.1, "perplexity": 3.0, "bits_per_byte": 0.8, "rows": 100, "targets": 2000}
    subjects = [
        {
            "name": name,
            "right": 50 + i,
            "rows": 100,
            "accuracy": (50 + i) / 100,
            "low": 0.4 + i / 100,
            "high": 0.6 + i / 100,
        }
        for i, name in enumerate(("anatomy", "astronomy", "virology"))
    ]
    choices = {"file": "mmlu.jsonl", "accuracy": 0.51, "low": 0.45, "high": 0.57, "rows": 300, "right": 153}
    against = {
        "model": "base",
        "loss": 1.73,
        "choices": {"accuracy": 0.31, "difference": {"mean": 0.2, "low": 0.14, "high": 0.26}, "mcnemar": {"p": 0.0004}},
        "difference": {"mean": -0.5, "low": -0.6, "high": -0.4, "unit": "nats per token"},
        "scores": [
            {
                "metric": "exact",
                "share": 0.15,
                "difference": {"mean": 0.8, "low": 0.74, "high": 0.86},
                "mcnemar": {"p": 1e-9},
            }
        ],
    }
    result = {
        "event": "result",
        "data": "rows.jsonl",
        "created": "2026-11-22T10:00:00+00:00",
        **{"loss": 1.23, "perplexity": 3.42, "bits_per_byte": 0.9, "rows": 200, "tokens": 9000, "targets": 4000},
        "interval": {"low": 1.19, "high": 1.27},
        "sources": [{"name": "chat.jsonl", **source}, {"name": "code.jsonl", **source}],
        "scores": [score],
        "against": against,
        "choices": {
            **choices,
            "mean_of_subjects": 0.52,
            "mean_of_subjects_low": 0.46,
            "mean_of_subjects_high": 0.58,
            "subjects": subjects,
        },
        "lm_eval": {"arc_easy": {"acc,none": 0.61, "acc_stderr,none": 0.0123, "samples": 2376}},
    }
    write_object(run / "evaluations" / "2026-11-22T10-00-00.json", result)


def add_merge(run: Path, **changes: Any) -> None:
    """merged/: the receipt of a merge."""
    receipt = {"base": "dequantized", "dtype": "bf16", "verified": True, "passed": True, "delta_survived": 0.9991}
    receipt |= {"kl": 2.4e-4, "kl_without_adapter": 0.61, "top1_agreement": 0.9962, "reference_loss": 1.0312}
    write_object(run / "merged" / "merge_receipt.json", {**receipt, "other_loss": 1.0317, "rows": 64, **changes})
