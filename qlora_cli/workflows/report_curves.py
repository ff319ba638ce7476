"""The charts of a report: losses, learning rate, pace, and scores over the steps.

Knows records of runs. Invariant: where points of a line were left out, averaged or are missing, the chart's notes say
so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qlora_cli.workflows.report_blocks import Chart, Line
from qlora_cli.workflows.report_points import Series, series, smoothed, thin
from qlora_cli.workflows.report_read import Record, items
from qlora_cli.workflows.run_files import Values, number, text

HELD_OUT_COLOUR = 1
"""Of the held-out loss beside the training loss of a single run."""
MOST_SCORES = 12
MEAN = "bold is a moving mean over a fortieth of the points, at least 5"


@dataclass(frozen=True)
class Course:
    """A line to be: its name, colour and values; `noisy` ones get a mean beside them."""

    name: str
    colour: int
    values: Series
    noisy: bool = False
    dashed: bool = False


def pace(line: Values) -> float | None:
    """Real tokens a second in a logged step."""
    tokens, seconds = number(line.get("tokens")), number(line.get("seconds"))
    return tokens / seconds if tokens is not None and seconds and seconds > 0 else None


def training(record: Record) -> Series:
    """The training loss."""
    return series(record.steps, "loss")


def held_out(record: Record) -> Series:
    """The held-out loss."""
    return series(record.evals, "loss")


def loss_charts(records: Sequence[Record]) -> list[Chart]:
    """Both losses: of a single run in one chart, of several in one each."""
    if len(records) == 1:
        own = Course("training loss", 0, training(records[0]), noisy=True)
        held = Course("held-out loss", HELD_OUT_COLOUR, held_out(records[0]))
        return _drawn("loss", "Loss", [own, held], wide=True)
    learned = [Course(each.name, each.colour, training(each), noisy=True) for each in records]
    held_by_run = [Course(each.name, each.colour, held_out(each)) for each in records]
    return [
        *_drawn("loss", "Training loss", learned, wide=True),
        *_drawn("held-out", "Held-out loss", held_by_run, wide=True),
    ]


def other_charts(records: Sequence[Record]) -> list[Chart]:
    """Learning rate, pace and gradient norm; none of what no run recorded."""
    kinds: list[tuple[str, str, str | Callable[[Values], object], bool]] = [
        ("rate", "Learning rate", "lr", False),
        ("pace", "Tokens per second", pace, True),
        ("gradient", "Gradient norm", "grad_norm", True),
    ]
    found = []
    for name, title, value, noisy in kinds:
        courses = [Course(each.name, each.colour, series(each.steps, value), noisy) for each in records]
        found += _drawn(name, title, courses)
    return found


def score_charts(records: Sequence[Record]) -> list[Chart]:
    """Scores on held-out rows during the training: a line for each run and metric."""
    courses = [course for record in records for course in _scores(record, len(records) > 1)]
    many = [f"only the first {MOST_SCORES} of {len(courses)} lines are drawn"] if len(courses) > MOST_SCORES else []
    if len(records) == 1:
        courses = [Course(each.name, i, each.values) for i, each in enumerate(courses)]
    return _drawn("scores", "Scores during training (share of rows)", courses[:MOST_SCORES], wide=True, more=many)


def _scores(record: Record, named: bool) -> Iterator[Course]:
    metrics = dict.fromkeys(text(each.get("metric")) or "?" for line in record.evals for each in items(line, "scores"))
    prefix = f"{record.name}: " if named else ""
    for i, metric in enumerate(metrics):
        values = series(record.evals, lambda line, metric=metric: _share(line, metric))  # type: ignore[misc]
        yield Course(f"{prefix}{metric}", record.colour, values, dashed=i % 2 == 1)
    accuracy = series(record.evals, _accuracy)
    if accuracy.points:
        yield Course(f"{prefix}multiple choice", record.colour, accuracy, dashed=len(metrics) % 2 == 1)


def _share(line: Values, metric: str) -> object:
    return next((each.get("share") for each in items(line, "scores") if each.get("metric") == metric), None)


def _accuracy(line: Values) -> object:
    choices = line.get("choices")
    return choices.get("accuracy") if isinstance(choices, dict) else None


def _drawn(
    name: str, title: str, courses: Sequence[Course], wide: bool = False, more: Sequence[str] = ()
) -> list[Chart]:
    """The chart of what has a point; none where nothing has."""
    present = [course for course in courses if course.values.points]
    lines = [line for course in present for line in _lines(course)]
    said: dict[str, list[str]] = {}
    for course in present:
        for note in _notes(course):
            said.setdefault(note, []).append(course.name)
    alone = len(present) == 1
    notes = [note if alone or note == MEAN else f"{', '.join(names)}: {note}" for note, names in said.items()]
    return [Chart(name, title, tuple(lines), (*more, *notes), wide)] if lines else []


def _lines(course: Course) -> Iterator[Line]:
    points = course.values.points
    mean = smoothed(points) if course.noisy else ()
    yield Line(course.name, course.colour, thin(points), pale=bool(mean), dashed=course.dashed)
    if mean:
        yield Line(f"{course.name}, mean", course.colour, thin(mean), dashed=course.dashed)


def _notes(course: Course) -> Iterator[str]:
    """What is to be known of a line: its mean, its gaps, and how many points of it are drawn."""
    points = course.values.points
    if course.noisy and smoothed(points):
        yield MEAN
    if course.values.gaps:
        yield course.values.gaps
    drawn = len(thin(points))
    if drawn < len(points):
        yield f"{drawn:,} of {len(points):,} points are drawn: of every stretch the lowest and the highest"
