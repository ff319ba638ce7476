"""What `qlora judge` tells: what it will cost, how far it is, what came of it.

Knows plain values. Invariant: what was estimated is called an estimate, and what has no verdict is counted beside what
has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_cli.workflows.events import duration
from qlora_cli.workflows.tables import table

TYPICAL_REPLY = 150
"""Tokens of a reply of three sentences and a verdict, with room; a model that thinks first needs more."""


@dataclass(frozen=True)
class Price:
    """Per million tokens, in whatever currency; None where it was not given."""

    per_input: float | None = None
    per_output: float | None = None

    def of(self, tokens_in: int, tokens_out: int) -> float | None:
        """The cost of so many tokens; None where no price is known."""
        if self.per_input is None and self.per_output is None:
            return None
        return ((self.per_input or 0) * tokens_in + (self.per_output or 0) * tokens_out) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked: requests, tokens in them, tokens of the replies (`most` where each is as long as it
    may be), and their price. Replies that have to be asked for again are not in it."""

    questions: int
    requests: int
    kept: int
    tokens_in: int
    tokens_out: int
    most_out: int
    price: Price

    def line(self) -> str:
        """See `Event`."""
        kept = f" ({self.kept:,} more are there already)" if self.kept else ""
        told = (
            f"{self.requests:,} requests{kept} for {self.questions:,} questions in both orders: about "
            f"{self.tokens_in:,} tokens in and {self.tokens_out:,} out, at most {self.most_out:,} "
            f"(4 ASCII characters counted as a token, any other character as one; {TYPICAL_REPLY} tokens a reply)"
        )
        cost, most = (self.price.of(self.tokens_in, out) for out in (self.tokens_out, self.most_out))
        if cost is None or most is None:
            return f"estimate: {told}; --price-in and --price-out tell the cost"
        return f"estimate: {told}; costs about {money(cost)}, at most {money(most)}"

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        cost = {"cost": self.price.of(self.tokens_in, self.tokens_out)}
        return {"event": "estimate", **asdict(self), **cost, "most_cost": self.price.of(self.tokens_in, self.most_out)}


@dataclass(frozen=True)
class Judging:
    """`done` of `total` requests after `seconds`; `logged` about every tenth."""

    done: int
    total: int
    unjudged: int
    seconds: float
    logged: bool

    def line(self) -> str:
        """See `Event`."""
        left = duration(self.seconds / self.done * (self.total - self.done)) if self.done else "?"
        return f"asked {self.done:,} of {self.total:,}  without a verdict {self.unjudged:,}  eta {left}"

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        return {"event": "progress", "what": "judging", **asdict(self)}


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has, whatever the tokenizer: four ASCII characters make one, any other is one."""
    plain = sum(char.isascii() for char in text)
    return -(-plain // 4) + len(text) - plain


def money(amount: float) -> str:
    """`12.34`, or `0.0012` for what would be nothing."""
    return f"{amount:,.2f}" if amount >= 1 or amount == 0 else f"{amount:.2g}"


def pairwise_text(names: Sequence[str], tally: Mapping[str, Any]) -> str:
    """Wins and ties of either model, agreement of the orders, and whether being shown first helped."""
    judged, agreed = tally["judged"], tally["agreed"]
    counts = (tally["wins_a"], tally["ties"], tally["wins_b"])
    rows = [
        ["model", "wins", "ties", "losses", "wins + ties/2"],
        [names[0], *map(str, counts), share(counts[0] + counts[1] / 2, judged)],
        [names[1], *map(str, counts[::-1]), share(counts[2] + counts[1] / 2, judged)],
    ]
    first, second = tally["preferred_first"], tally["preferred_second"]
    return (
        f"{table(rows)}\n"
        f"both orders agree on {agreed:,} of {judged:,} ({share(agreed, judged)}); the others count as ties\n"
        f"the answer shown first was preferred {first:,} times, the second {second:,} times"
    )


def ten_point_text(names: Sequence[str], tally: Mapping[str, Any]) -> str:
    """Mean scores of either model in either place."""
    rows = [["model", "shown first", "shown second", "mean"]]
    for name, side in zip(names, "ab", strict=True):
        scores = [tally[f"score_{side}_shown_{place}"] for place in ("first", "second")]
        rows.append([name, *(["-"] * 3 if None in scores else [f"{x:.2f}" for x in (*scores, sum(scores) / 2)])])
    return f"{table(rows)}\nmeans over {tally['judged']:,} questions with scores in both orders"


def share(part: float, whole: int) -> str:
    """`12.3%`; a dash of nothing."""
    return f"{part / whole:.1%}" if whole else "-"


TEXTS = {"pairwise": pairwise_text, "ten-point": ten_point_text}
