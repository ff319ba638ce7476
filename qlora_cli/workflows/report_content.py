"""The report of some runs: which sections it has, and what stands at its head.

Knows records of runs. Invariant: every problem that was met in reading is in it, and a section that has nothing to show
is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from qlora_cli.workflows.events import duration, size
from qlora_cli.workflows.report_blocks import (
    UNKNOWN,
    Block,
    Document,
    Note,
    Section,
    Table,
    Tile,
    Tiles,
    count,
    figure,
    loss_text,
    moment,
)
from qlora_cli.workflows.report_curves import held_out, loss_charts, other_charts, pace, score_charts, training
from qlora_cli.workflows.report_evals import evaluation_blocks, sample_blocks
from qlora_cli.workflows.report_read import Record, clean
from qlora_cli.workflows.report_tables import (
    data_blocks,
    environment_blocks,
    is_on_cpu,
    measured_memory,
    memory_blocks,
    merge_blocks,
    process_memory,
    recipe_blocks,
)
from qlora_cli.workflows.run_files import AT_WORK, DIED, number

SUMMARY: tuple[str, ...] = ("steps", "training loss", "held-out loss", "perplexity", "lowest held-out loss")
SUMMARY += ("tokens", "tokens/s", "peak memory")


def document(records: Sequence[Record]) -> Document:
    """The report of at least one run."""
    first, several = records[0], len(records) > 1
    sections = [
        Section("summary", "Summary", (*_summary(records), *_problems(records))),
        Section("curves", "Curves", (*loss_charts(records), *other_charts(records))),
        Section("evaluation", "Evaluation", (*score_charts(records), *evaluation_blocks(records))),
        Section("samples", "Samples over time", tuple(sample_blocks(records))),
        Section("data", "Data", tuple(data_blocks(records)), "What became of every row that was read."),
        Section("memory", "Memory", tuple(memory_blocks(records))),
        Section("merge", "Merged models", tuple(merge_blocks(records)), "What was measured when they were made."),
        Section("recipe", "Recipe", tuple(recipe_blocks(records))),
        Section("environment", "Environment", tuple(environment_blocks(records))),
    ]
    return Document(
        title=f"{len(records)} runs compared" if several else first.name,
        states=tuple((each.name, state(each)) for each in records),
        facts=tuple(_shared(records) if several else _facts(first)),
        sections=tuple(section for section in sections if section.blocks),
    )


def state(record: Record) -> str:
    """In words that need no manual."""
    found = record.found
    if found.away:
        return clean(f"{found.state} on {found.away}")
    return {DIED: "died without saying so", "unknown": "state unknown"}.get(found.state, found.state)


def _facts(record: Record) -> Iterator[str]:
    if record.base:
        yield f"base model {record.base}"
    if device := record.lock.get("device"):
        yield f"on {device}"
    started = number(record.found.status.get("started"))
    if started is not None:
        yield f"started {moment(started)}"


def _shared(records: Sequence[Record]) -> Iterator[str]:
    bases = {record.base for record in records}
    if len(bases) == 1 and all(bases):
        yield f"base model {next(iter(bases))}"


def _summary(records: Sequence[Record]) -> Iterator[Block]:
    if len(records) == 1:
        yield Tiles(tuple(_tiles(records[0])))
        return
    words = ("run", "state", "base model") if len({record.base for record in records}) > 1 else ("run", "state")
    rows = tuple((*_words(record)[: len(words)], *_row(record)) for record in records)
    yield Table((*words, *SUMMARY), rows, text=len(words), colours=tuple(record.colour for record in records))


def _tiles(record: Record) -> Iterator[Tile]:
    found, losses, held = record.found, training(record), held_out(record)
    if losses.last:
        yield Tile("Training loss", loss_text(losses.last[1]), f"step {losses.last[0]:,}, the last logged")
    if held.last and held.lowest:
        lowest = f"lowest {loss_text(held.lowest[1])} at step {held.lowest[0]:,}"
        yield Tile("Held-out loss", loss_text(held.last[1]), lowest)
        yield Tile("Perplexity", _perplexity(record), f"held-out rows, step {held.last[0]:,}")
    yield Tile("Steps", _steps(record), f"of {found.total:,}" if found.total else "")
    yield Tile("Tokens trained on", *_tokens(record))
    if (speed := tokens_per_second(record)) is not None:
        yield Tile("Tokens per second", figure(speed), "without the first logged step")
    yield Tile("Peak memory", *_peak(record))
    if seconds := _seconds(record):
        yield Tile("Time", duration(seconds), "from the start to the last record")


def _words(record: Record) -> tuple[str, ...]:
    return (record.name, state(record), record.base or UNKNOWN)


def _row(record: Record) -> tuple[str, ...]:
    losses, held = training(record), held_out(record)
    total = f" of {record.found.total:,}" if record.found.total else ""
    return (
        f"{_steps(record)}{total}",
        loss_text(losses.last[1] if losses.last else None),
        loss_text(held.last[1] if held.last else None),
        _perplexity(record),
        f"{loss_text(held.lowest[1])} at step {held.lowest[0]:,}" if held.lowest else UNKNOWN,
        _tokens(record)[0],
        figure(tokens_per_second(record)),
        _peak(record)[0],
    )


def _steps(record: Record) -> str:
    return f"{record.found.step:,}"


def _perplexity(record: Record) -> str:
    last = held_out(record).last
    return figure(math.exp(last[1])) if last and last[1] < 700 else UNKNOWN


def _tokens(record: Record) -> tuple[str, str]:
    """(real tokens of all steps, how that is known)."""
    known = [found for line in record.steps if (found := number(line.get("tokens"))) is not None]
    if not known:
        return UNKNOWN, "not recorded"
    if len(known) >= record.found.step:
        return count(sum(known)), "all steps logged"
    estimate = sum(known) / len(known) * record.found.step
    return f"about {figure(estimate, 3)}", f"from {len(known):,} logged steps"


def tokens_per_second(record: Record) -> float | None:
    """Over the logged steps but the first, which warms caches up."""
    timed = [line for line in record.steps if pace(line) is not None]
    timed = timed[1:] if len(timed) > 1 else timed
    seconds = sum(number(line.get("seconds")) or 0.0 for line in timed)
    return sum(number(line.get("tokens")) or 0.0 for line in timed) / seconds if seconds > 0 else None


def _peak(record: Record) -> tuple[str, str]:
    measured, process = measured_memory(record), process_memory(record)
    if measured is not None:
        return size(measured), "measured, see Memory"
    if process is None:
        return UNKNOWN, "not recorded"
    return size(process), "so far, of the whole process" if is_on_cpu(record) else "so far"


def _seconds(record: Record) -> float | None:
    status = record.found.status
    started, updated = number(status.get("started")), number(status.get("updated"))
    known = started is not None and updated is not None and 0 < updated - started < 1e9
    return updated - started if known and updated is not None and started is not None else None


def _problems(records: Sequence[Record]) -> Iterator[Note]:
    """What is wrong with a run, and what could not be read of it."""
    for record in records:
        prefix = f"{record.name}: " if len(records) > 1 else ""
        reason = record.found.status.get("reason")
        if reason:
            yield Note(f"{prefix}{state(record)}: {clean(reason)}", warns=True)
        elif record.found.state == DIED:
            yield Note(f"{prefix}the run died without saying so after step {record.found.step:,}", warns=True)
        if record.found.state in AT_WORK and not record.found.away:
            yield Note(f"{prefix}the run is at work: this is what it had recorded so far")
        for problem in record.problems:
            yield Note(f"{prefix}{problem}", warns=True)
        for kept in (*record.found.checkpoints, *([record.found.result] if record.found.result else [])):
            if kept.problem:
                yield Note(clean(f"{prefix}{kept.path.name} is broken: {kept.problem}"), warns=True)
