"""The file of results, and what is still to be run.

Knows one JSON line per run. Invariant: a line counts for a run only where all that decides its figures is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity_study.design import SIXTEEN, SWEPT_RANK, Comparison, Configuration, Run, Study
from parity_study.figures import Interval, interval


def key(study: Study, run: Run) -> str:
    """All that decides a run's figures, in words."""
    return f"{run.configuration.name}; seed {run.seed}; rate {run.rate:g}; {study.steps} steps; {run.rows}"


@dataclass
class Results:
    """What was measured, by key. Each is on the disk before the next is asked for."""

    path: Path
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Those of an earlier time; a line that was cut by a kill is left out."""
        results = cls(path)
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            results.found[record["key"]] = record
        return results

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Appends a line."""
        self.found[name] = {"key": name, **record}
        with self.path.open("a+b") as file:
            if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write(json.dumps(self.found[name]).encode() + b"\n")

    def missing(self, study: Study, runs: Sequence[Run]) -> list[Run]:
        """Those of `runs` that have not been measured."""
        return [run for run in runs if key(study, run) not in self.found]


def sweep_runs(study: Study) -> list[Run]:
    """Each learning rate with 16-bit weights and the middle rank, for each kind of configuration, on rows and with a
    seed that the study itself does not use."""
    kinds = {each.kind: Configuration(SIXTEEN, each.targets, SWEPT_RANK) for each in study.configurations}
    chosen = {kind: each if each.targets else Configuration(kind) for kind, each in kinds.items()}
    return [Run(chosen[kind], study.sweep_seed, rate, "sweep") for kind in chosen for rate in study.rates[kind]]


def best_rates(study: Study, results: Results) -> dict[str, float]:
    """The rate with the lowest held-out loss, for each kind."""
    swept: dict[str, list[tuple[float, float]]] = {}
    for run in sweep_runs(study):
        swept.setdefault(run.configuration.kind, []).append((results.found[key(study, run)]["loss"], run.rate))
    return {kind: min(tried)[1] for kind, tried in swept.items()}


def study_runs(study: Study, rates: Mapping[str, float]) -> list[Run]:
    """Seed by seed, so that an interrupted study has whole seeds."""
    return [Run(each, seed, rates[each.kind]) for seed in study.seeds for each in study.configurations]


@dataclass(frozen=True)
class Table:
    """One value per configuration and seed, of the seeds that all configurations have."""

    seeds: tuple[int, ...]
    values: Mapping[str, Mapping[Configuration, tuple[float, ...]]]
    """By measure: `loss`, `accuracy`."""
    parameters: Mapping[Configuration, int]

    def interval(self, measure: str, configuration: Configuration) -> Interval:
        """Over the seeds."""
        return interval(self.values[measure][configuration])

    def has(self, comparison: Comparison) -> bool:
        """Whether all that it compares was run."""
        return {*comparison.first, *comparison.second} <= set(self.parameters)

    def difference(self, measure: str, comparison: Comparison) -> Interval:
        """First less second, paired by seed."""
        first, second = (self._mean(measure, group) for group in (comparison.first, comparison.second))
        return interval([a - b for a, b in zip(first, second, strict=True)])

    def _mean(self, measure: str, group: Sequence[Configuration]) -> list[float]:
        columns = [self.values[measure][each] for each in group]
        return [sum(row) / len(row) for row in zip(*columns, strict=True)]


def tabulate(study: Study, rates: Mapping[str, float], results: Results) -> Table:
    """The results of the whole seeds. Raises `SystemExit` where there are fewer than two."""
    runs = {(run.configuration, run.seed): key(study, run) for run in study_runs(study, rates)}
    whole = [s for s in study.seeds if all(runs[each, s] in results.found for each in study.configurations)]
    if len(whole) < 2:
        raise SystemExit(f"{results.path} has {len(whole)} whole seeds; an interval needs at least two")

    def column(each: Configuration, measure: str) -> tuple[float, ...]:
        return tuple(results.found[runs[each, seed]][measure] for seed in whole)

    values = {m: {each: column(each, m) for each in study.configurations} for m in ("loss", "accuracy")}
    sizes = {each: int(column(each, "parameters")[0]) for each in study.configurations}
    return Table(tuple(whole), values, sizes)
