"""Judgments of pairs of answers: rows of verdicts and of ten-point scores, and scores as percent of a baseline.

Knows rows and names, no rating. Invariant: a row is read as it stands or is a problem with file and line; no row is
repaired, guessed or lost without a count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.found_files import find_files
from qlora_cli.data.readers import read_file
from qlora_cli.data.rows import Outcome, Position, RestLost, SourceRow, shown
from qlora_cli.data.sources import open_source, raise_all
from qlora_cli.errors import DataError, Problem

POINTS = {"a": 1.0, "b": 0.0, "tie": 0.5}
"""What each `winner` gives the model whose answer stood first."""
LOWEST, HIGHEST = 0, 10
RESAMPLES, RESAMPLED_AT_ONCE = 10_000, 1 << 22
_VERDICT = '{"question_id": 1, "model_a": "x", "model_b": "y", "winner": "a" | "b" | "tie", "judge": "z"}'
_SCORES = '{"question_id": 1, "model_a": "x", "model_b": "y", "score_a": 8, "score_b": 7}'


@dataclass(frozen=True)
class Verdict:
    """A game: `first` and `second` are models in the order in which the judge saw their answers; `points` (1, 0.5, 0)
    are those of the first. Where a row sums up a judgment in both orders, as `qlora judge` writes it, `orders` are the
    points of `first` when its answer was shown first and when it was shown second."""

    question: str
    first: str
    second: str
    judge: str
    where: str
    points: float
    orders: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scored:
    """Two answers graded side by side, in the order in which the judge saw them."""

    question: str
    first: str
    second: str
    judge: str
    where: str
    scores: tuple[float, float]


Row = TypeVar("Row", Verdict, Scored)
T = TypeVar("T")


@dataclass(frozen=True)
class Judgments(Generic[T]):
    """What was read: the rows (at least one), the files, and the rows that were left out, with the reason."""

    rows: tuple[T, ...]
    files: tuple[str, ...]
    bad: tuple[Problem, ...]


@dataclass(frozen=True)
class BothOrders:
    """The scores of one question, by one judge: the row in which the baseline stood first, and the other one."""

    model: str
    question: str
    baseline_first: Scored
    baseline_second: Scored


@dataclass(frozen=True)
class Percent:
    """A model's total score as percent of the baseline's, with the baseline's answer first, second, and the mean of
    both; the 95% interval of that mean is not a number where there are not two questions to draw from."""

    model: str
    questions: int
    pairs: int
    baseline_first: float
    baseline_second: float
    mean: float
    low: float
    high: float


class _BadRowError(ValueError):
    """What is wrong with a row, and how to mend it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def read_verdicts(paths: Sequence[str], skip_bad: bool = False) -> Judgments[Verdict]:
    """The verdicts of all files. `DataError` for rows that are none (with `skip_bad` they are left out), and where no
    row is left."""
    return _read(paths, _verdict, skip_bad)


def read_scores(paths: Sequence[str], skip_bad: bool = False) -> Judgments[Scored]:
    """The ten-point scores of all files; errors as those of `read_verdicts`."""
    return _read(paths, _scored, skip_bad)


def _read(paths: Sequence[str], parse: Callable[[SourceRow], Row], skip_bad: bool) -> Judgments[Row]:
    files = _files(paths)
    rows: list[Row] = []
    bad: list[Problem] = []
    for file in files:
        for outcome in _outcomes(file):
            parsed = outcome if isinstance(outcome, Problem) else _parsed(outcome, parse)
            if isinstance(parsed, Problem):
                bad.append(parsed)
            else:
                rows.append(parsed)
    check_bad(bad, skip_bad)
    if not rows:
        raise_all(bad)
    return Judgments(tuple(rows), tuple(map(shown, files)), tuple(bad))


def check_bad(bad: Sequence[Problem], skip_bad: bool) -> None:
    """Raises one `DataError` for bad rows; with `skip_bad` only for a file of which an unknown number is missing."""
    raise_all([each for each in bad if not skip_bad or isinstance(each, RestLost)])


def _files(paths: Sequence[str]) -> list[Path]:
    """The files that `paths` name, each of which can be read and is named once."""
    found: dict[Path, Path] = {}
    for path in paths:
        for file in find_files(path):
            open_source(f"./{file}" if not file.is_absolute() else str(file))
            if file.resolve() in found:
                what = "the file is named twice, and its games would count twice"
                raise DataError(what, fix="name it once", where=shown(file))
            found[file.resolve()] = file
    return list(found.values())


def _outcomes(file: Path) -> Iterator[Outcome]:
    empty = True
    for outcome in read_file(file, shown(file), Position()):
        empty = False
        yield outcome
    if empty:
        fix = "check that this is the right file and that it is complete, or leave it out"
        yield RestLost("the file has no rows", fix=fix, where=f"{shown(file)}:1")


def _parsed(row: SourceRow, parse: Callable[[SourceRow], Row]) -> Row | Problem:
    try:
        return parse(row)
    except _BadRowError as error:
        return Problem(str(error), fix=error.fix, where=row.where)


def _verdict(row: SourceRow) -> Verdict:
    if "winner" not in row.values and "score_a" in row.values:
        raise _BadRowError("has scores and no winner", "give --baseline MODEL to compare scores")
    head = _head(row, _VERDICT)
    winner = row.values.get("winner")
    if not isinstance(winner, str) or winner not in POINTS:
        raise _BadRowError(f"winner must be a, b or tie ({_got(row, 'winner')})", f"write {_VERDICT}")
    return Verdict(*head, POINTS[winner], _orders(row.values.get("orders")))


def _orders(value: Any) -> tuple[float, float] | None:
    told = isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
    return (POINTS[value[0]], POINTS[value[1]]) if told and set(value) <= set(POINTS) else None


def _scored(row: SourceRow) -> Scored:
    if "score_a" not in row.values and "winner" in row.values:
        raise _BadRowError("has a winner and no scores", "leave --baseline out to rate games")
    head = _head(row, _SCORES)
    return Scored(*head, (_score(row, "score_a"), _score(row, "score_b")))


def _head(row: SourceRow, shape: str) -> tuple[str, str, str, str, str]:
    """What both kinds of rows begin with: question, first model, second model, judge, place."""
    question, judge = row.values.get("question_id"), row.values.get("judge")
    if isinstance(question, bool) or not isinstance(question, str | int) or question == "":
        raise _BadRowError(f"question_id must be text or a whole number ({_got(row, 'question_id')})", f"write {shape}")
    for key in ("model_a", "model_b"):
        if not isinstance(row.values.get(key), str) or not row.values[key].strip():
            raise _BadRowError(f"{key} must be the name of a model ({_got(row, key)})", f"write {shape}")
    if not isinstance(judge, str | None):
        raise _BadRowError(f"judge must be text ({_got(row, 'judge')})", f"write {shape}")
    first, second = row.values["model_a"], row.values["model_b"]
    if first == second:
        raise _BadRowError(f"model_a and model_b are both {first[:60]}", "a game needs two models; remove the row")
    return str(question), first, second, judge or "", row.where


def _score(row: SourceRow, key: str) -> float:
    value = row.values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not LOWEST <= value <= HIGHEST:
        what = f"{key} must be a number from {LOWEST} to {HIGHEST} ({_got(row, key)})"
        raise _BadRowError(what, f"write {_SCORES}")
    return float(value)


def _got(row: SourceRow, key: str) -> str:
    return f"got {str(row.values[key])[:40]!r}" if key in row.values else "it is missing"


def both_orders(rows: Sequence[Scored], baseline: str) -> tuple[list[BothOrders], list[Problem]]:
    """Pairs of rows that grade the same model against `baseline` on the same question by the same judge, once in each
    order; and a problem for each row that has no such partner."""
    pairs: dict[tuple[str, str, str], list[Scored | None]] = {}
    problems: list[Problem] = []
    for row in rows:
        if baseline not in (row.first, row.second):
            what = f"neither model is the baseline {baseline} (got {row.first} and {row.second})"
            problems.append(Problem(what, fix="remove the row, or choose another --baseline", where=row.where))
            continue
        place = int(row.second == baseline)
        model = row.first if place else row.second
        pair = pairs.setdefault((model, row.question, row.judge), [None, None])
        if (earlier := pair[place]) is not None:
            what = f"question {row.question} of {model} is graded in this order before, at {earlier.where}"
            problems.append(Problem(what, fix="remove one of the rows", where=row.where))
        else:
            pair[place] = row
    whole = [BothOrders(key[0], key[1], one, two) for key, (one, two) in pairs.items() if one and two]
    return whole, problems + [_unpaired(*key[:2], pair) for key, pair in pairs.items() if None in pair]


def _unpaired(model: str, question: str, pair: Sequence[Scored | None]) -> Problem:
    row = pair[0] or pair[1]
    assert row is not None, "a pair starts with a row"
    what = f"question {question} of {model} is graded with the baseline {'first' if pair[0] else 'second'} only"
    why = "judges favour a position, so that only both orders together say how good an answer is"
    return Problem(what, why, f"grade model_a {row.second}, model_b {row.first} too", row.where)


def percent_of_baseline(pairs: Sequence[BothOrders], seed: int = 0) -> list[Percent]:
    """Total score as percent of the baseline's, best model first, as Dettmers et al. 2023 give theirs (QLoRA,
    arXiv:2305.14314); the interval is that of a bootstrap over questions (Efron and Tibshirani 1993, percentile
    method, 10,000 resamples), each drawn with both of its orders and all its judges."""
    models = sorted({pair.model for pair in pairs})
    found = [_percent(model, [pair for pair in pairs if pair.model == model], seed) for model in models]
    return sorted(found, key=lambda each: (-each.mean, each.model))


def _percent(model: str, pairs: Sequence[BothOrders], seed: int) -> Percent:
    questions = {question: i for i, question in enumerate(sorted({pair.question for pair in pairs}))}
    sums = np.zeros((len(questions), 4))
    for pair in pairs:
        (base, own), (own_again, base_again) = pair.baseline_first.scores, pair.baseline_second.scores
        sums[questions[pair.question]] += (own, base, own_again, base_again)
    totals = sums.sum(0)
    if totals[1] == 0 or totals[3] == 0:
        what = f"the baseline's scores against {model} add up to 0, and there is no percent of that"
        raise DataError(what, fix="check the judge's scores", where=pairs[0].baseline_first.where)
    first, second = _percents(totals)
    low, high = _interval(sums, seed)
    return Percent(model, len(questions), len(pairs), float(first), float(second), float(first + second) / 2, low, high)


def _percents(sums: NDArray[np.float64]) -> tuple[Any, Any]:
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold nothing but zeros
        return 100 * sums[..., 0] / sums[..., 1], 100 * sums[..., 2] / sums[..., 3]


def _interval(sums: NDArray[np.float64], seed: int) -> tuple[float, float]:
    count = len(sums)
    if count < 2:
        return float("nan"), float("nan")
    generator, means, at_once = np.random.default_rng(seed), np.empty(RESAMPLES), max(1, RESAMPLED_AT_ONCE // count)
    for start in range(0, RESAMPLES, at_once):
        drawn = generator.integers(0, count, (min(at_once, RESAMPLES - start), count))
        first, second = _percents(sums[drawn].sum(1))
        means[start : start + len(drawn)] = (first + second) / 2
    low, high = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)
