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

from parity_study.design import FULL, SIXTEEN, SWEPT_RANK, Claim, Run, Study, claims
from parity_study.figures import Interval, interval
from parity_study.results import Rates, Results, Table, key, study_runs, sweep_runs
from parity_study.text import HEAD, LIMITS, METHOD, SWEEP, UNTRAINED, VERDICTS, prose
from parity_study.verdict import ACCURACY, LOSS, Measure, agreement, sentence, summary

BEFORE = "before any training"


@dataclass(frozen=True)
class Findings:
    """All that the document tells."""

    study: Study
    rates: Rates
    results: Results
    tables: Mapping[int, Table]
    untrained: Mapping[str, Mapping[str, Any]]
    command: str
    workers: int

    @property
    def first(self) -> Table:
        """That of the shorter length, for what is the same at every length: seeds, sizes, comparisons."""
        return self.tables[self.study.lengths[0]]


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
        prose(LIMITS, longest=max(found.study.lengths)),
    ]
    return "\n".join(part for part in parts if part)


def _method(found: Findings) -> str:
    study = found.study
    count = len(found.first.seeds) * len(study.lengths) * len(study.configurations)
    runs = [*sweep_runs(study), *study_runs(study, found.rates)]
    done = [found.results.found.get(key(run)) for run in runs]
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
        "shorter": study.lengths[0],
        "longer": study.lengths[-1],
        "times": f"{study.lengths[-1] / study.lengths[0]:g}",
        "heldout": study.heldout,
        "seeds": ", ".join(map(str, found.first.seeds)),
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
        kind, record = run.configuration.kind, found.results.found[key(run)]
        label = kind if kind == FULL else f"LoRA, {kind}"
        told = [f"{record['loss']:.5f}", f"{100 * record['accuracy']:.1f}", _taken(found, run)]
        rows.append([str(run.steps), label, f"{run.rate:g}", *told])
    text = prose(SWEEP, seed=study.sweep_seed, storage=SIXTEEN, rank=SWEPT_RANK)
    return f"{text}\n{_rows(['steps', 'kind', 'rate', 'loss', 'exact match (%)', ''], rows)}"


def _taken(found: Findings, run: Run) -> str:
    """Whether the sweep chose it, and whether a rate outside of those tried might have been better."""
    kind = run.configuration.kind
    if run.rate != found.rates[run.steps][kind]:
        return ""
    tried = found.study.rates[kind]
    return "taken, at the edge of those tried" if run.rate in (min(tried), max(tried)) else "taken"


def _table(found: Findings) -> str:
    rows = []
    for each, size in found.first.parameters.items():
        told = [
            measure.told(table.interval(measure.name, each))
            for measure in (ACCURACY, LOSS)
            for table in found.tables.values()
        ]
        rates = " / ".join(f"{kinds[each.kind]:g}" for kinds in found.rates.values())
        rows.append([each.name, f"{size:,}", rates, *told])
    titles = [f"{title}, {n} steps" for title in ("exact match (%)", "held-out loss") for n in found.tables]
    return _rows(["configuration", "trained", "rates", *titles], rows)


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
    """Its comparisons at each length, and how they came out at each."""
    rows = [*_trained_rows(found, claim), *_stored_rows(found, claim)]
    if not rows:
        return ""
    lengths = dict.fromkeys(row[1] for row in rows)
    came = {steps: summary([row[-1] for row in rows if row[1] == steps]) for steps in lengths}
    said = "".join(f"- {BEFORE if steps == '0' else f'{steps} steps'}: {told}.\n" for steps, told in came.items())
    head = ["comparison", "steps", "measure", "difference", "verdict", "the claim"]
    return f"### {number}. {claim.text}\n\n{said}\n{_rows(head, rows)}"


def _trained_rows(found: Findings, claim: Claim) -> list[list[str]]:
    return [
        _row(each.label, steps, table.difference(measure.name, each), measure, each.expected)
        for each in claim.comparisons
        if found.first.has(each)
        for measure in (LOSS, ACCURACY)
        for steps, table in found.tables.items()
    ]


def _stored_rows(found: Findings, claim: Claim) -> list[list[str]]:
    expected = claim.comparisons[0].expected
    return [
        _row(f"{first} against {second}, {BEFORE}", 0, _stored(found, first, second), LOSS, expected)
        for first, second in claim.stored
        if {first, second} <= set(found.untrained)
    ]


def _row(label: str, steps: int, of: Interval, measure: Measure, expected: str) -> list[str]:
    unit = "points" if measure is ACCURACY else "loss"
    told = [unit, measure.told(of), sentence(of, measure)]
    return [label, str(steps), *told, agreement(of, measure, expected)]


def _stored(found: Findings, first: str, second: str) -> Interval:
    pairs = zip(found.untrained[first]["losses"], found.untrained[second]["losses"], strict=True)
    return interval([a - b for a, b in pairs])
