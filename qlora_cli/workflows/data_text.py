"""What `qlora data` says in words: the receipt as tables, lost rows, and what stands above each row.

Knows figures; nothing of terminals. Invariant: it says what the receipt says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_cli.data.receipt import LABELS, DataReceipt, SourceReceipt, SplitReceipt
from qlora_cli.workflows.data import Cleared, Preview
from qlora_cli.workflows.events import size
from qlora_cli.workflows.seen import SeenRow
from qlora_cli.workflows.tables import table


def receipt_text(receipt: DataReceipt) -> str:
    """Tables: what became of the rows of each source, then the tokens of each split."""
    head = ["source", "read", "kept", "held out", "dropped", "cut", "duplicates", "overlap"]
    left_out = any(source.left_out for source in receipt.sources)
    sources = [[*head, "left out"], *map(_counts, receipt.sources)]
    shown = sources if left_out else [row[:-1] for row in sources]
    splits = [(name, split) for name, split in (("train", receipt.train), ("held out", receipt.held_out)) if split.rows]
    tokens = [["", "rows", "sequences", "tokens", "carry loss", "share", *LABELS.values()]]
    tokens += [_tokens(name, split) for name, split in splits]
    packed = [] if receipt.packing is None else [f"packed: {receipt.packing:.1%} of positions hold tokens"]
    reasons = [line for source in receipt.sources for line in _reasons(source)]
    return "\n".join([table(shown), *reasons, *receipt.notes, "", table(tokens), *packed])


def _counts(source: SourceReceipt) -> list[str]:
    dropped = sum(source.dropped.values())
    counts = (source.read, source.kept, source.held_out, dropped, source.cut, source.duplicate, source.overlap)
    return [f"{source.source} ({source.format})", *(f"{count:,}" for count in (*counts, source.left_out))]


def _reasons(source: SourceReceipt) -> list[str]:
    dropped = [f"{source.source}: {count:,} dropped: {reason}" for reason, count in source.dropped.items()]
    turns = f"{source.source}: {source.trailing_turns:,} without their last turns, which nobody answered"
    return [*dropped, *([turns] if source.trailing_turns else [])]


def _tokens(name: str, split: SplitReceipt) -> list[str]:
    share = split.supervised_tokens / split.tokens if split.tokens else 0.0
    counts = [f"{count:,}" for count in (split.rows, split.sequences, split.tokens, split.supervised_tokens)]
    return [name, *counts, f"{share:.1%}", *(f"{split.length_quantiles[each]:,}" for each in LABELS)]


def lost_heading(found: Preview) -> str:
    """What stands above the rows that were lost."""
    if not found.all_lost:
        return "--- dropped, cut, duplicate or also held out: none"
    shown = f"{len(found.lost):,} of " if len(found.lost) < found.all_lost else ""
    return f"--- dropped, cut, duplicate or also held out: {shown}{found.all_lost:,}"


def lost_line(row: Mapping[str, Any]) -> str:
    """One of them, and the reason."""
    what = f" ({row['what']})" if "what" in row else ""
    return f"{row['where']}: {', '.join(row['counts'])}{what}"


def heading(row: SeenRow) -> str:
    """What stands above a row."""
    part = f", sequence {row.part} of {row.parts}" if row.parts > 1 else ""
    tokens = f"; {len(row.ids):,} tokens, {sum(row.loss):,} carry loss" if row.ids else ""
    return f"--- {row.where}{part}: {row.fate.line()}{tokens}"


def cleared_text(done: Cleared) -> str:
    """What was removed."""
    if done.place is None:
        return "nothing removed: there is no place for a cache"
    stay = f"; {done.in_use:,} in use stay" if done.in_use else ""
    entries = "entry" if done.entries == 1 else "entries"
    return f"{done.entries:,} {entries} of encoded rows removed from {done.place} ({size(done.bytes)}){stay}"
