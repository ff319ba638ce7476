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

Rates = Mapping[int, Mapping[str, float]]
"""By length and kind of configuration."""


def key(run: Run) -> str:
    """All that decides a run's figures, in words."""
    return f"{run.configuration.name}; seed {run.seed}; rate {run.rate:g}; {run.steps} steps; {run.rows}"


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

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Those of `runs` that have not been measured."""
        return [run for run in runs if key(run) not in self.found]


def sweep_runs(study: Study) -> list[Run]:
    """Each learning rate with 16-bit weights and the middle rank, for each length and each kind of configuration, on
    rows and with a seed that the study itself does not use."""
    kinds = {each.kind: Configuration(SIXTEEN, each.targets, SWEPT_RANK) for each in study.configurations}
    chosen = {kind: each if each.targets else Configuration(kind) for kind, each in kinds.items()}
    return [
        Run(chosen[kind], steps, study.sweep_seed, rate, "sweep")
        for steps in study.lengths
        for kind in chosen
        for rate in study.rates[kind]
    ]


def best_rates(study: Study, results: Results) -> dict[int, dict[str, float]]:
    """The rate with the lowest held-out loss, for each length and each kind."""
    swept: dict[int, dict[str, list[tuple[float, float]]]] = {steps: {} for steps in study.lengths}
    for run in sweep_runs(study):
        tried = swept[run.steps].setdefault(run.configuration.kind, [])
        tried.append((results.found[key(run)]["loss"], run.rate))
    return {steps: {kind: min(tried)[1] for kind, tried in kinds.items()} for steps, kinds in swept.items()}


def study_runs(study: Study, rates: Rates) -> list[Run]:
    """Seed by seed, so that an interrupted study has whole seeds."""
    return [
        Run(each, steps, seed, rates[steps][each.kind])
        for seed in study.seeds
        for steps in study.lengths
        for each in study.configurations
    ]


@dataclass(frozen=True)
class Table:
    """One length: a value per configuration and seed, of the seeds that all configurations have at every length."""

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


def tabulate(study: Study, rates: Rates, results: Results) -> dict[int, Table]:
    """The results of the whole seeds, by length. Raises `SystemExit` where there are fewer than two."""
    runs = study_runs(study, rates)
    cut = {run.seed for run in results.missing(runs)}
    whole = tuple(seed for seed in study.seeds if seed not in cut)
    if len(whole) < 2:
        raise SystemExit(f"{results.path} has {len(whole)} whole seeds; an interval needs at least two")
    found = {(run.steps, run.configuration, run.seed): results.found[key(run)] for run in runs if run.seed in whole}

    def table(steps: int) -> Table:
        values = {
            measure: {each: tuple(found[steps, each, seed][measure] for seed in whole) for each in study.configurations}
            for measure in ("loss", "accuracy")
        }
        sizes = {each: int(found[steps, each, whole[0]]["parameters"]) for each in study.configurations}
        return Table(whole, values, sizes)

    return {steps: table(steps) for steps in study.lengths}
