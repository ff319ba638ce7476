"""What was measured of a run's model, as tables and intervals; and what it answered while it learned.

Knows records of evaluations as `qlora eval` and a run write them. Invariant: a figure that a record lacks is shown as
unknown, never as zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qlora_cli.workflows.report_blocks import (
    UNKNOWN,
    Block,
    Note,
    Sample,
    Span,
    Spans,
    Table,
    Told,
    by_run,
    count,
    figure,
    loss_text,
    percent,
    spread,
)
from qlora_cli.workflows.report_read import Record, dig, items
from qlora_cli.workflows.run_files import Values, number, text

MOST_RESULTS, MOST_PROMPTS, MOST_ANSWERS, LONGEST = 20, 20, 6, 2000
"""Of a run: newest results, prompts, steps of a prompt, characters of a text."""
INTERVAL, MEAN, STDERR = "95% interval", "mean of subjects", "_stderr"
OTHER = ("against", "difference", "p (McNemar)")
OF_MEAN = ("mean_of_subjects", "mean_of_subjects_")
"""The key of that mean, and how those of its bounds begin."""


@dataclass(frozen=True)
class Measured:
    """An evaluation: of which run, when, and its figures. `several`: it stands among those of other runs."""

    run: str
    colour: int
    when: str
    values: Values
    several: bool


def measured(record: Record, several: bool) -> list[Measured]:
    """The last evaluation of the training, and what `qlora eval` kept, in the order of time."""
    kept = [(_when(name, values), values) for name, values in record.evaluations[-MOST_RESULTS:]]
    during = [(f"training, step {each.get('step', '?')}", each) for each in record.evals[-1:]]
    return [Measured(record.name, record.colour, when, values, several) for when, values in (*during, *kept)]


def _when(name: str, values: Values) -> str:
    created = text(values.get("created"))
    return created[:16].replace("T", " ") if created else name.rpartition("/")[2].removesuffix(".json")


def evaluation_blocks(records: Sequence[Record]) -> list[Block]:
    """All tables that have a row."""
    results = [each for record in records for each in measured(record, len(records) > 1)]
    left = [
        Note(f"{each.name}: the newest {MOST_RESULTS} of {len(each.evaluations)} kept evaluations are shown")
        for each in records
        if len(each.evaluations) > MOST_RESULTS
    ]
    found: list[Block | None] = [_losses(results), _sources(results), *_score_blocks(results), *_choices(results)]
    found += [_lm_eval(results), *left]
    return [block for block in found if block is not None]


def _table(
    title: str, head: Sequence[str], rows: Sequence[tuple[Measured, tuple[str, ...]]], text: int
) -> Table | None:
    """A table that begins with when it was; None where it has no row."""
    told = [(each.run, each.colour, (each.when, *cells)) for each, cells in rows]
    return by_run(title, ("when", *head), told, text + 1, any(each.several for each, _ in rows))


def _losses(results: Sequence[Measured]) -> Table | None:
    has_base = any(dig(each.values, "against") for each in results)
    head = ["data", "loss", INTERVAL, "perplexity", "bits/byte", "rows", "tokens with loss"]
    head += ["against", "its loss", f"difference ({INTERVAL})"] if has_base else []
    rows = []
    for each in results:
        v, against = each.values, dig(each.values, "against")
        if number(v.get("loss")) is None and "targets" not in v:
            continue
        loss, *others = _loss_cells(v)
        other = (_name(against, "model"), loss_text(number(against.get("loss"))), _difference(against))
        cells = (text(v.get("data")) or "held-out rows", loss, _bounds(dig(v, "interval")), *others)
        rows.append((each, (*cells, *(other if has_base else ()))))
    return _table("Loss on held-out rows", head, rows, 1)


def _bounds(v: Values) -> str:
    low, high = number(v.get("low")), number(v.get("high"))
    return UNKNOWN if low is None or high is None else f"{low:.4f} to {high:.4f}"


def _loss_cells(v: Values) -> tuple[str, ...]:
    known = [number(v.get(name)) for name in ("loss", "perplexity", "bits_per_byte", "rows", "targets")]
    return (loss_text(known[0]), figure(known[1]), loss_text(known[2]), count(known[3]), count(known[4]))


def _name(v: Values, key: str) -> str:
    return text(v.get(key)) or UNKNOWN


def _difference(v: Values) -> str:
    """Mean, interval and unit, with their signs: `-0.5120 (-0.6010 to -0.4330) nats per token`."""
    d = dig(v, "difference")
    mean, low, high = (number(d.get(name)) for name in ("mean", "low", "high"))
    if mean is None:
        return UNKNOWN
    within = f" ({low:+.4f} to {high:+.4f})" if low is not None and high is not None else ""
    return f"{mean:+.4f}{within} {text(d.get('unit')) or ''}".rstrip()


def _sources(results: Sequence[Measured]) -> Table | None:
    rows = [(each, (_name(s, "name"), *_loss_cells(s))) for each in results for s in items(each.values, "sources")]
    shown = [row for row in rows if len(items(row[0].values, "sources")) > 1]
    return _table("By source", ["source", "loss", "perplexity", "bits/byte", "rows", "tokens with loss"], shown, 1)


def _interval(v: Values, prefix: str = "") -> str:
    low, high = number(v.get(f"{prefix}low")), number(v.get(f"{prefix}high"))
    return UNKNOWN if low is None or high is None else f"{low:.1%} to {high:.1%}"


def _of(v: Values) -> str:
    return f"{count(number(v.get('right')))} of {count(number(v.get('rows')))}"


def _score_blocks(results: Sequence[Measured]) -> Iterator[Block | None]:
    pairs = [(each, score) for each in results for score in items(each.values, "scores")]
    has_base = any(dig(each.values, "against").get("scores") for each, _ in pairs)
    head = ["metric", "right", "share", INTERVAL, *(OTHER if has_base else ())]
    rows = [(each, (*_score_cells(score), *(_other_score(each, score) if has_base else ()))) for each, score in pairs]
    yield _table("Scores of generated answers", head, rows, 1)
    spans = [_span(each, _name(score, "metric"), score, "share") for each, score in pairs]
    yield _spans("Scores with their 95% intervals", spans)


def _score_cells(score: Values) -> tuple[str, ...]:
    return (_name(score, "metric"), _of(score), percent(number(score.get("share"))), _interval(score))


def _other_score(each: Measured, score: Values) -> tuple[str, ...]:
    """Of the model that it was measured against, by the same metric."""
    named = items(dig(each.values, "against"), "scores")
    return _compared(next((one for one in named if one.get("metric") == score.get("metric")), {}), "share")


def _compared(other: Values, key: str) -> tuple[str, ...]:
    return (percent(number(other.get(key))), _difference(other), figure(number(dig(other, "mcnemar").get("p")), 3))


def _span(each: Measured, what: str, v: Values, key: str, prefix: str = "") -> Span | None:
    """`key` of `v` with its interval; None where that is not known, or is none."""
    value, low, high = (number(v.get(name)) for name in (key, f"{prefix}low", f"{prefix}high"))
    if value is None or low is None or high is None or not -0.01 <= low <= value <= high <= 1.01:
        return None
    label = f"{each.run} · {what} · {each.when}" if each.several else f"{what} · {each.when}"
    return Span(label, each.colour, value, low, high, f"{value:.1%} ({_interval(v, prefix)})")


def _spans(title: str, found: Sequence[Span | None]) -> Spans | None:
    spans = tuple(span for span in found if span is not None)
    return Spans(title, spans, (0.0, 1.0)) if spans else None


def _choices(results: Sequence[Measured]) -> Iterator[Block | None]:
    asked = [(each, found) for each in results if (found := dig(each.values, "choices"))]
    has_base = any(dig(each.values, "against", "choices") for each, _ in asked)
    head = ["file", "right", "share", INTERVAL, MEAN, INTERVAL, *(OTHER if has_base else ())]
    others = [_compared(dig(each.values, "against", "choices"), "accuracy") if has_base else () for each, _ in asked]
    rows = [(each, (*_choice_cells(found), *other)) for (each, found), other in zip(asked, others, strict=True)]
    yield _table("Multiple choice", head, rows, 1)
    spans = [_span(each, _name(found, "file"), found, "accuracy") for each, found in asked]
    spans += [_span(each, f"{_name(found, 'file')}, {MEAN}", found, *OF_MEAN) for each, found in asked]
    yield _spans("Multiple choice with 95% intervals", spans)
    subjects = [
        (each, (_name(s, "name"), _of(s), percent(number(s.get("accuracy"))), _interval(s)))
        for each, found in asked
        for s in items(found, "subjects")
    ]
    table = _table("Multiple choice by subject", ["subject", "right", "share", INTERVAL], subjects, 1)
    yield None if table is None else replace(table, folded=True)


def _choice_cells(found: Values) -> tuple[str, ...]:
    over_rows = (_of(found), percent(number(found.get("accuracy"))), _interval(found))
    return (
        _name(found, "file"),
        *over_rows,
        percent(number(found.get("mean_of_subjects"))),
        _interval(found, OF_MEAN[1]),
    )


def _lm_eval(results: Sequence[Measured]) -> Table | None:
    tasks = [
        (each, task, metrics)
        for each in results
        for task, metrics in dig(each.values, "lm_eval").items()
        if isinstance(metrics, dict)
    ]
    rows = [(each, (task, *cells)) for each, task, metrics in tasks for cells in _task(metrics)]
    return _table("lm-evaluation-harness", ["task", "metric", "value", "standard error", "rows"], rows, 2)


def _task(metrics: Values) -> Iterator[tuple[str, ...]]:
    """(metric, value, its standard error, rows) of each."""
    for name, value in metrics.items():
        if name == "samples" or STDERR in name:
            continue
        before, comma, after = name.partition(",")
        error = number(metrics.get(f"{before}{STDERR}{comma}{after}"))
        yield (name, figure(number(value)), figure(error, 3), count(number(metrics.get("samples"))))


def sample_blocks(records: Sequence[Record]) -> list[Block]:
    """Prompts with their answers as the runs went on, each prompt with all its runs; what is left out is said."""
    asked: dict[str, list[tuple[Record, list[Values]]]] = {}
    for record in records:
        for prompt, lines in _by_prompt(record).items():
            asked.setdefault(prompt, []).append((record, lines))
    several, shown = len(records) > 1, list(asked.items())[:MOST_PROMPTS]
    found: list[Block] = []
    for prompt, told in shown:
        each = (Told(r.name if several else "", r.colour, _answers(lines)) for r, lines in told)
        found.append(Sample(short(prompt), tuple(each)))
    if len(asked) > MOST_PROMPTS:
        found.append(Note(f"the first {MOST_PROMPTS} of {len(asked)} prompts are shown"))
    if any(len(lines) > MOST_ANSWERS for told in asked.values() for _, lines in told):
        found.append(Note(f"at most {MOST_ANSWERS} answers of a run to a prompt are shown, evenly over the run"))
    return found


def _by_prompt(record: Record) -> dict[str, list[Values]]:
    prompts: dict[str, list[Values]] = {}
    for line in record.samples:
        prompts.setdefault(text(line.get("prompt")) or "", []).append(line)
    return prompts


def _answers(lines: Sequence[Values]) -> tuple[tuple[str, str, str], ...]:
    chosen = [lines[i] for i in spread(range(len(lines)), MOST_ANSWERS)]
    return tuple((str(each.get("step", "?")), short(text(each.get("answer")) or ""), _ended(each)) for each in chosen)


def _ended(line: Values) -> str:
    return text(line.get("ended")) or ""


def short(value: str) -> str:
    """The text, cut where it is long, which it then says."""
    cut = len(value) - LONGEST
    return value if cut <= 0 else f"{value[:LONGEST]} … ({cut:,} more characters)"
