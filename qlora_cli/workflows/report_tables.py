"""What went into a run and what it took, as tables: data, memory, merges, recipe, surroundings.

Knows records of runs. Invariant: a difference between runs is shown whole, whatever else is folded away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qlora_cli.workflows.events import size
from qlora_cli.workflows.memory import TURNS
from qlora_cli.workflows.report_blocks import (
    UNKNOWN,
    Bar,
    Bars,
    Block,
    Note,
    Table,
    by_run,
    count,
    figure,
    loss_text,
    moment,
    percent,
)
from qlora_cli.workflows.report_read import Record, clean, dig, items
from qlora_cli.workflows.run_files import Values, number, text

PLACE = "output"
"""The key of the recipe that says where a run is: it differs between any two."""
FATES = ("read", "kept", "held_out", "left_out", "cut", "duplicate", "overlap", "bad", "trailing_turns")
SPLITS = ("train", "held_out")
ENVIRONMENT = ("qlora", "python", "device", "threads", "compute_dtype", "processes", "seed")
MERGES: tuple[str, ...] = ("model", "kind", "outcome", "KL to base + adapter", "without the adapter", "same top token")
MERGES += ("loss before", "loss merged", "delta that survived", "rows compared")
SHORT_HASH = 12


def data_blocks(records: Sequence[Record]) -> list[Block]:
    """The receipts: what became of every source's rows, and what the splits hold."""
    sources, splits, notes, several = [], [], [], len(records) > 1
    for record in records:
        of = _of(record, records)
        sources += [(record, _source(each)) for each in items(record.receipt, "sources")]
        splits += [(record, _split(name, each)) for name in SPLITS if (each := dig(record.receipt, name))]
        said = record.receipt.get("notes")
        notes += [Note(f"{of}{each}") for each in said if isinstance(each, str)] if isinstance(said, list) else []
        packing = number(record.receipt.get("packing"))
        notes += [Note(f"{of}packed: {packing:.1%} of positions hold tokens")] if packing is not None else []
    head = ("source", *(name.replace("_", " ") for name in FATES), "dropped")
    lengths = ("shortest", "median", "90%", "longest")
    found = [
        _by_run("Rows, by source", head, sources, 1, several),
        _by_run(
            "What is trained on and held out", ("part", "rows", "tokens", "with loss", *lengths), splits, 1, several
        ),
    ]
    return [*(table for table in found if table), *notes]


def _by_run(
    title: str, head: Sequence[str], rows: Sequence[tuple[Record, tuple[str, ...]]], words: int, several: bool
) -> Table | None:
    return by_run(title, head, [(each.name, each.colour, cells) for each, cells in rows], words, several)


def _source(v: Values) -> tuple[str, ...]:
    dropped = {name: number(many) for name, many in dig(v, "dropped").items()}
    lost = "; ".join(f"{count(many)} {name}" for name, many in dropped.items()) or "0"
    return (text(v.get("source")) or UNKNOWN, *(count(number(v.get(name))) for name in FATES), lost)


def _split(name: str, v: Values) -> tuple[str, ...]:
    tokens, with_loss = number(v.get("tokens")), number(v.get("supervised_tokens"))
    share = f" ({with_loss / tokens:.0%})" if tokens and with_loss is not None else ""
    lengths = (count(number(dig(v, "length_quantiles").get(key))) for key in ("0%", "50%", "90%", "100%"))
    kind = {"train": "training", "held_out": "held out"}[name]
    return (kind, count(number(v.get("rows"))), count(tokens), f"{count(with_loss)}{share}", *lengths)


def _of(record: Record, records: Sequence[Record]) -> str:
    """The run's name before a remark, where there are several."""
    return f"{record.name}: " if len(records) > 1 else ""


def planned_memory(record: Record) -> float | None:
    """Bytes, before the run."""
    return number(record.plan.get("memory_bytes"))


def measured_memory(record: Record) -> float | None:
    """Bytes, on the plan's terms; known when the run has ended well."""
    return number(record.plan.get("measured_memory_bytes"))


def process_memory(record: Record) -> float | None:
    """The peak that was logged so far: on a CPU of the whole process, with what it held before the base was read."""
    return max(
        (found for line in record.steps if (found := number(line.get("memory_bytes"))) is not None), default=None
    )


def is_on_cpu(record: Record) -> bool:
    """Whether the run is known to compute there."""
    return str(record.lock.get("device", "")).startswith("CPU")


def memory_blocks(records: Sequence[Record]) -> list[Block]:
    """Planned beside measured, and the plan's parts."""
    bars = tuple(bar for record in records for bar in _memory_bars(record, _of(record, records)))
    names = list(dict.fromkeys(name for record in records for name in dig(record.plan, "memory")))
    parts = tuple((name, *(_bytes(number(dig(each.plan, "memory").get(name))) for each in records)) for name in names)
    head = ("part of the plan", *(each.name if len(records) > 1 else "bytes" for each in records))
    found: list[Block] = [Bars("Peak memory", bars)] if bars else []
    found += [Table(head, parts, "The plan by part", folded=len(records) > 1)] if parts else []
    if set(TURNS) & set(names):
        found.append(Note(f"{', '.join(TURNS)} are never in memory together: only the largest counts."))
    return found


def _memory_bars(record: Record, of: str) -> Iterator[Bar]:
    planned, measured, process = planned_memory(record), measured_memory(record), process_memory(record)
    if planned is not None and planned > 0:
        yield Bar(f"{of}planned", record.colour, _parts(record, planned), size(planned), pale=True)
    if measured is not None:
        share = f" ({measured / planned:.0%} of the plan)" if planned else ""
        yield Bar(f"{of}measured", record.colour, (("", max(0.0, measured)),), f"{size(measured)}{share}")
    elif process is not None:
        whole = " of the whole process, of which the plan is only a part" if is_on_cpu(record) else ""
        yield Bar(f"{of}logged so far", record.colour, (("", max(0.0, process)),), f"{size(process)}{whole}")


def _parts(record: Record, planned: float) -> tuple[tuple[str, float], ...]:
    """The parts that make up the total; the total alone where they do not."""
    known = {name: number(many) or 0.0 for name, many in dig(record.plan, "memory").items()}
    in_turn = [name for name in known if name in TURNS]
    largest = max(in_turn, key=lambda name: known[name], default="")
    counted = tuple((name, many) for name, many in known.items() if many > 0 and (name not in TURNS or name == largest))
    is_whole = abs(sum(many for _, many in counted) - planned) <= planned * 1e-6
    return counted if is_whole else (("", planned),)


def _bytes(value: float | None) -> str:
    return UNKNOWN if value is None else size(value)


def merge_blocks(records: Sequence[Record]) -> list[Block]:
    """The receipts of the merged models in the runs' folders."""
    rows = [(record, _merge(name, values)) for record in records for name, values in record.merges]
    table = _by_run("", MERGES, rows, 3, len(records) > 1)
    return [table] if table else []


def _merge(name: str, v: Values) -> tuple[str, ...]:
    kind = " ".join(found for key in ("base", "dtype") if (found := text(v.get(key))))
    known = {
        key: number(v.get(key)) for key in ("kl", "kl_without_adapter", "top1_agreement", "delta_survived", "rows")
    }
    losses = (loss_text(number(v.get(key))) for key in ("reference_loss", "other_loss"))
    return (
        name.rpartition("/")[0],
        kind or UNKNOWN,
        _outcome(v),
        figure(known["kl"], 3),
        figure(known["kl_without_adapter"], 3),
        percent(known["top1_agreement"]),
        *losses,
        percent(known["delta_survived"]),
        count(known["rows"]),
    )


def _outcome(v: Values) -> str:
    said = "not compared" if not v.get("verified") else "passed" if v.get("passed") else "too far off"
    return f"{said}; on another base than trained on" if v.get("base_changed_since_training") else said


def recipe_blocks(records: Sequence[Record]) -> list[Block]:
    """What differs between the runs' recipes, then every one of them, folded."""
    known = [record for record in records if record.recipe]
    found: list[Block] = []
    if len(known) > 1:
        found.append(_differences("Differences", known, [_settings(record) for record in known]))
    for record in known:
        rows = tuple((key, each.value, each.origin) for key, each in record.recipe.items())
        found.append(
            Table(
                ("key", "value", "from"),
                rows,
                f"All values of {record.name}" if len(known) > 1 else "All values",
                3,
                (),
                True,
            )
        )
    return found


def _settings(record: Record) -> dict[str, str]:
    return {key: each.value for key, each in record.recipe.items() if key != PLACE}


def _differences(title: str, records: Sequence[Record], values: Sequence[Mapping[str, str]]) -> Block:
    """Keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for each in values for key in each)
    rows = [(key, *(each.get(key, UNKNOWN) for each in values)) for key in keys]
    differing = tuple(row for row in rows if len(set(row[1:])) > 1)
    if not differing:
        return Note(f"{title}: none, all runs have the same values.")
    return Table(("key", *(each.name for each in records)), differing, title, 1 + len(records))


def environment_blocks(records: Sequence[Record]) -> list[Block]:
    """Versions, device and hashes, and how often the runs went on."""
    known = [record for record in records if record.lock]
    values = [_surroundings(record.lock) for record in known]
    keys = dict.fromkeys(key for each in values for key in each)
    rows = tuple((key, *(each.get(key, UNKNOWN) for each in values)) for key in keys)
    found: list[Block] = []
    if len(known) > 1:
        found.append(_differences("What differs", known, values))
    if rows:
        head = ("item", *(each.name if len(known) > 1 else "value" for each in known))
        found.append(Table(head, rows, "Versions, device and hashes", 1 + len(known), folded=True))
    resumed = [(record, _resume(line)) for record in records for line in record.found.resumes]
    table = _by_run("Resumed", ("when", "after step", "with another"), resumed, 3, len(records) > 1)
    return [*found, *([table] if table else [])]


def _surroundings(lock: Values) -> dict[str, str]:
    base = dig(lock, "base")
    plain = {key: str(lock[key]) for key in ENVIRONMENT if lock.get(key) is not None}
    named = {"base": base.get("name"), "base revision": base.get("revision"), **dig(lock, "versions")}
    hashes = {**dig(lock, "base_sha256"), **{f"data {name}": each for name, each in dig(lock, "data").items()}}
    short = {f"sha256 of {name}": str(each)[:SHORT_HASH] for name, each in hashes.items() if each}
    return {**{key: str(each) for key, each in named.items() if each is not None}, **plain, **short}


def _resume(line: Values) -> tuple[str, ...]:
    keys = [clean(str(each.get("key"))) for each in items(line, "changes")]
    return (moment(number(line.get("time"))), clean(str(line.get("step", "?"))), ", ".join(keys) or "nothing")
