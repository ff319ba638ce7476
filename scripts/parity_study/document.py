"""docs/parity.md.

Knows the text around the figures. Invariant: every figure and every verdict comes from the results.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from parity_study.design import FULL, SIXTEEN, SWEPT_RANK, Claim, Study, claims
from parity_study.figures import Interval, interval
from parity_study.results import Results, Table, key, study_runs, sweep_runs
from parity_study.text import HEAD, LIMITS, METHOD, SWEEP, UNTRAINED, VERDICTS, prose
from parity_study.verdict import ACCURACY, LOSS, Measure, agreement, sentence, summary


@dataclass(frozen=True)
class Findings:
    """All that the document tells."""

    study: Study
    rates: Mapping[str, float]
    results: Results
    table: Table
    untrained: Mapping[str, Mapping[str, Any]]
    command: str
    workers: int


def document(found: Findings, picture: str) -> str:
    """The whole text."""
    parts = [
        prose(HEAD),
        _method(found),
        "## Learning rates\n",
        _sweep(found),
        "## Results\n",
        f"![Exact match and loss of every configuration]({picture})\n",
        _table(found),
        "## The base before any training\n",
        _untrained(found),
        "## The claims\n",
        prose(VERDICTS),
        *(_claim(found, number, claim) for number, claim in enumerate(claims(), 1)),
        prose(LIMITS),
    ]
    return "\n".join(part for part in parts if part)


def _method(found: Findings) -> str:
    study, table = found.study, found.table
    count = len(table.seeds) * len(study.configurations)
    runs = [*sweep_runs(study), *study_runs(study, found.rates)]
    done = [found.results.found.get(key(study, run)) for run in runs]
    minutes, worked = (sum(record[name] for record in done if record) / 60 for name in ("seconds", "worked"))
    names = ("torch", "transformers", "bitsandbytes")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    facts = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": versions,
        "runs": count,
        "swept": len(sweep_runs(study)),
        "minutes": f"{minutes / found.workers:.0f}",
        "worked": f"{worked / found.workers:.0f}",
        "workers": found.workers,
        "steps": study.steps,
        "heldout": study.heldout,
        "seeds": ", ".join(map(str, table.seeds)),
    }
    return f"    {found.command}\n\n{prose(METHOD, **facts)}"


def _processor() -> str:
    """The kind of processor, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _sweep(found: Findings) -> str:
    study = found.study
    rows = []
    for run in sweep_runs(study):
        kind, record = run.configuration.kind, found.results.found[key(study, run)]
        taken = "taken" if run.rate == found.rates[kind] else ""
        label = kind if kind == FULL else f"LoRA, {kind}"
        rows.append([label, f"{run.rate:g}", f"{record['loss']:.4f}", f"{100 * record['accuracy']:.1f}", taken])
    text = prose(SWEEP, seed=study.sweep_seed, storage=SIXTEEN, rank=SWEPT_RANK)
    return f"{text}\n{_rows(['kind', 'rate', 'loss', 'exact match (%)', ''], rows)}"


def _table(found: Findings) -> str:
    rows = []
    for each, size in found.table.parameters.items():
        told = [measure.told(found.table.interval(measure.name, each)) for measure in (ACCURACY, LOSS)]
        rows.append([each.name, f"{size:,}", f"{found.rates[each.kind]:g}", *told])
    return _rows(["configuration", "trained", "rate", "exact match (%)", "held-out loss"], rows)


def _untrained(found: Findings) -> str:
    plain = found.untrained[SIXTEEN]["losses"]
    rows = []
    for storage, record in found.untrained.items():
        rise = interval([a - b for a, b in zip(record["losses"], plain, strict=True)])
        told = "" if storage == SIXTEEN else rise.text(5)
        name = "16 bits" if storage == SIXTEEN else storage
        rows.append([name, f"{record['bits']:.3f}", f"{interval(record['losses']).mean:.5f}", told])
    text = prose(UNTRAINED, chats=len(plain))
    return f"{text}\n{_rows(['storage', 'bits per weight', 'loss', 'rise'], rows)}"


def _claim(found: Findings, number: int, claim: Claim) -> str:
    tested = [each for each in claim.comparisons if found.table.has(each)]
    rows, said = [], []
    for each in tested:
        for measure in (LOSS, ACCURACY):
            of = found.table.difference(measure.name, each)
            said.append(agreement(of, measure, each.expected))
            rows.append([each.label, *_told(of, measure), said[-1]])
    for first, second in claim.stored:
        if {first, second} <= set(found.untrained):
            of = _stored(found, first, second)
            expected = claim.comparisons[0].expected
            said.append(agreement(of, LOSS, expected))
            rows.append([f"{first} against {second}, before any training", *_told(of, LOSS), said[-1]])
    if not rows:
        return ""
    head = ["comparison", "measure", "difference", "verdict", "the claim"]
    return f"### {number}. {claim.text}\n\n{summary(said).capitalize()} comparisons.\n\n{_rows(head, rows)}"


def _told(of: Interval, measure: Measure) -> list[str]:
    unit = "points" if measure is ACCURACY else "loss"
    return [unit, measure.told(of), sentence(of, measure)]


def _stored(found: Findings, first: str, second: str) -> Interval:
    pairs = zip(found.untrained[first]["losses"], found.untrained[second]["losses"], strict=True)
    return interval([a - b for a, b in pairs])
