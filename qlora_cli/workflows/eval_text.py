"""What `qlora eval` says in words.

Knows what was measured; nothing of terminals. Invariant: each figure stands with what it was measured on, and each
share with its interval.
"""

from __future__ import annotations

from collections.abc import Iterator

from qlora_cli.workflows.eval import EvalOutcome
from qlora_cli.workflows.sides import Side
from qlora_cli.workflows.tables import table


def eval_text(outcome: EvalOutcome) -> str:
    """Lines for the terminal."""
    return "\n".join(_lines(outcome))


def _lines(outcome: EvalOutcome) -> Iterator[str]:
    side, other = outcome.side, outcome.other
    yield _head(side) + (f": {side.data}" if side.data else "")
    yield from _figures(side)
    if outcome.interval is not None:
        low, high = outcome.interval.low, outcome.interval.high
        yield f"  95% of resampled rows give a loss between {low:.4f} and {high:.4f}"
    if other is None or outcome.against is None:
        return
    yield f"against {other.name}: {_head(other)}"
    yield from _figures(other)
    apart = outcome.against
    found = [each.line() for each in (apart.loss, *apart.scores, apart.choices) if each is not None]
    yield "difference, with the 95% interval of a paired bootstrap over rows:" if found else "nothing is paired"
    for each in found:
        yield f"  {each}"


def _head(side: Side) -> str:
    base, adapter = side.found.recipe.model.base, side.found.adapter
    return f"{base} with {adapter}" if adapter else base


def _figures(side: Side) -> Iterator[str]:
    result = side.result
    if result is not None:
        yield f"  {result.line()}"
        if len(result.sources) > 1:
            yield from ("    " + line for line in _sources(side).splitlines())
    if side.lost:
        yield "  of the rows that were read: " + ", ".join(f"{count:,} {why}" for why, count in side.lost.items())
    if side.answers is not None:
        yield from (f"  {score.line()}" for score in side.answers.scores)
        if side.answers.unended:
            yield f"  {side.answers.unended:,} of {len(side.answers.replies):,} answers were ended by a limit"
        if side.left_out:
            yield f"  {side.left_out:,} rows were not asked: no prompt, or an answer cut off at data.max_length"
    if side.choices is not None:
        yield from (f"  {line}" for line in side.choices.lines())
    if side.tasks is not None:
        yield from (f"  {line}" for line in side.tasks.lines())


def _sources(side: Side) -> str:
    assert side.result is not None
    head = ["source", "loss", "perplexity", "bits/byte", "rows", "tokens"]
    rows = [
        [
            each.name,
            f"{each.loss:.4f}",
            f"{each.perplexity:.3f}",
            "-" if each.bits_per_byte is None else f"{each.bits_per_byte:.3f}",
            f"{each.rows:,}",
            f"{each.targets:,}",
        ]
        for each in side.result.sources
    ]
    return table([head, *rows])
