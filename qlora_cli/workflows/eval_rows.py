"""The rows of an evaluation, one JSON object a line: what each was measured to be.

Sees what was measured. Invariant: every figure of the result is a sum over these rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_cli.files import write_text
from qlora_cli.workflows.sides import Side

OF_THE_ROW = {"kind", "where", "source", "bytes", "wanted", "subject"}


def write_rows(path: Path, side: Side, other: Side | None) -> None:
    """Writes a .jsonl file: held-out rows, then multiple-choice rows (`kind` says which). What a second model was
    measured to be stands under `against`."""
    second = dict(_rows(other)) if other is not None else {}
    lines = []
    for key, values in _rows(side):
        row = values if other is None else {**values, "against": _measured(second.get(key))}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def _measured(values: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without what is true of the row whichever model reads it."""
    return values and {key: value for key, value in values.items() if key not in OF_THE_ROW}


def _rows(side: Side) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    replies = _replies(side)
    losses = side.losses
    if losses is not None and side.held is not None:
        sources = {
            row.where: side.held.names[number] for row, number in zip(side.held.listed, side.held.source, strict=True)
        }
        for where, total, targets, size in zip(losses.where, losses.sums, losses.targets, losses.bytes, strict=True):
            figures = {"loss": total / targets, "loss_sum": total, "targets": int(targets), "bytes": int(size)}
            yield (
                ("row", where),
                {"kind": "row", "where": where, "source": sources[where], **figures, **replies.get(where, {})},
            )
    for outcome in side.choices.outcomes if side.choices else ():
        yield ("choice", outcome.where), {"kind": "choice", **outcome.as_json()}


def _replies(side: Side) -> dict[str, dict[str, Any]]:
    """By the place of the row."""
    if side.answers is None:
        return {}
    found = {}
    for number, (question, reply) in enumerate(zip(side.answers.questions, side.answers.replies, strict=True)):
        said = {"wanted": question.wanted, "answer": reply.text, "tokens": reply.tokens, "ended": reply.ended}
        right = {score.metric: bool(score.right[number]) for score in side.answers.scores}
        found[question.where] = {**said, "right": right}
    return found
