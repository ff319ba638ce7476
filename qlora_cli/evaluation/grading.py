"""Two answers to a question, graded by a judge: what it is asked, and what its reply says.

Knows prompts and replies as text; nothing of files and endpoints. Invariant: a reply says a verdict only in the very
form that was asked for; anything else is asked for once more and is then no verdict, never a guess.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from qlora_cli.evaluation.endpoint import Message, RefusedError, Reply

PROMPTS = Path(__file__).parent / "prompts"
FIRST, SECOND, TIE = "first", "second", "tie"
LOWEST, HIGHEST = 1.0, 10.0
Verdict = str | tuple[float, float]
"""Which answer is better as they were shown (pairwise), or the scores of the two (ten-point)."""
Both = Sequence[Verdict | None]
"""The verdicts with a's answer shown first, and with b's; None where there is none."""
Row = Mapping[str, Any]

_THOUGHTS = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_DRESS = "*_`#[]. \t"
_NUMBER = r"(10|\d)(?:\.(\d{1,2}))?"
_VERDICT = re.compile(r"verdict\W{0,6}:\W{0,6}(1|2|tie)\Z", re.IGNORECASE | re.ASCII)
_SCORES = re.compile(rf"scores\W{{0,6}}:[*_` ]{{0,6}}({_NUMBER}[, ] ?{_NUMBER})\Z", re.IGNORECASE | re.ASCII)


class Grading(Protocol):
    """A way to grade."""

    name: str

    def read(self, line: str) -> Verdict | None:
        """The verdict that a line says; None where it says none."""

    def known(self, value: Any) -> Verdict | None:
        """A verdict as it was kept in JSON; None for what is none."""

    def rows(self, both: Both) -> list[tuple[int, Row]]:
        """What follows from the verdicts so far: which order a row of judgments is written in, and its own fields."""

    def verdicts(self, rows: Sequence[Row | None]) -> Both:
        """The verdicts from rows of judgments that were written in the one order and in the other."""

    def tally(self, games: Sequence[Both]) -> dict[str, Any]:
        """The figures over questions: `judged` of them have all their verdicts."""


class Pairwise:
    """Better, worse or a tie; a verdict that turns with the order of the answers is a tie."""

    name = "pairwise"

    def read(self, line: str) -> Verdict | None:
        """See `Grading`."""
        found = _VERDICT.match(line)
        return {"1": FIRST, "2": SECOND, "tie": TIE}[found[1].lower()] if found else None

    def known(self, value: Any) -> Verdict | None:
        """See `Grading`."""
        return value if value in (FIRST, SECOND, TIE) else None

    def rows(self, both: Both) -> list[tuple[int, Row]]:
        """See `Grading`."""
        if None in both:
            return []
        orders = [self._winner(str(verdict), order) for order, verdict in enumerate(both)]
        agreed = orders[0] == orders[1]
        return [(0, {"winner": orders[0] if agreed else TIE, "orders": orders, "agreed": agreed})]

    def verdicts(self, rows: Sequence[Row | None]) -> Both:
        """See `Grading`."""
        row, other = rows
        if row is not None:
            return self._shown(row)
        return self._shown(other)[::-1] if other is not None else (None, None)

    def tally(self, games: Sequence[Both]) -> dict[str, Any]:
        """See `Grading`."""
        told = [row for both in games for _, row in self.rows(both)]
        winners, agreed = [row["winner"] for row in told], sum(row["agreed"] for row in told)
        verdicts = [verdict for both in games if None not in both for verdict in both]
        return {
            "judged": len(told),
            "wins_a": winners.count("a"),
            "ties": winners.count(TIE),
            "wins_b": winners.count("b"),
            "agreed": agreed,
            "disagreed": len(told) - agreed,
            "preferred_first": verdicts.count(FIRST),
            "preferred_second": verdicts.count(SECOND),
        }

    def _winner(self, verdict: str, order: int) -> str:
        return TIE if verdict == TIE else "ab"[(verdict == SECOND) != (order == 1)]

    def _shown(self, row: Row) -> Both:
        orders = row.get("orders")
        if not (isinstance(orders, list) and len(orders) == 2 and all(each in ("a", "b", TIE) for each in orders)):
            return (None, None)
        return [TIE if each == TIE else (FIRST, SECOND)[(each == "b") != (i == 1)] for i, each in enumerate(orders)]


class TenPoint:
    """A score from 1 to 10 for each answer, in either order."""

    name = "ten-point"

    def read(self, line: str) -> Verdict | None:
        """See `Grading`."""
        found = _SCORES.match(line)
        return self.known([float(number) for number in re.split("[, ]+", found[1])]) if found else None

    def known(self, value: Any) -> Verdict | None:
        """See `Grading`."""
        pair = value if isinstance(value, list | tuple) and len(value) == 2 else ()
        scores = [float(each) for each in pair if isinstance(each, int | float) and not isinstance(each, bool)]
        return (scores[0], scores[1]) if len([s for s in scores if LOWEST <= s <= HIGHEST]) == 2 else None

    def rows(self, both: Both) -> list[tuple[int, Row]]:
        """See `Grading`."""
        told = [(order, verdict) for order, verdict in enumerate(both) if verdict is not None]
        return [(order, {"score_a": verdict[0], "score_b": verdict[1]}) for order, verdict in told]

    def verdicts(self, rows: Sequence[Row | None]) -> Both:
        """See `Grading`."""
        return [self.known([row.get("score_a"), row.get("score_b")]) if row is not None else None for row in rows]

    def tally(self, games: Sequence[Both]) -> dict[str, Any]:
        """See `Grading`."""
        whole = [both for both in games if None not in both]
        a_first = [verdict for verdict, _ in whole if isinstance(verdict, tuple)]
        b_first = [verdict for _, verdict in whole if isinstance(verdict, tuple)]
        columns = {
            "score_a_shown_first": [first for first, _ in a_first],
            "score_a_shown_second": [second for _, second in b_first],
            "score_b_shown_first": [first for first, _ in b_first],
            "score_b_shown_second": [second for _, second in a_first],
        }
        means = {name: sum(column) / len(column) if column else None for name, column in columns.items()}
        return {"judged": len(whole), **means}


GRADINGS: dict[str, Grading] = {each.name: each for each in (Pairwise(), TenPoint())}


@dataclass(frozen=True)
class Prompts:
    """The texts of one way to grade."""

    grading: str

    @cached_property
    def texts(self) -> tuple[str, str]:
        """What is asked, with its places in double braces; and what is asked where the reply says no verdict."""
        asked, again = (PROMPTS / f"{self.grading}{part}.txt" for part in ("", "-again"))
        return asked.read_text(encoding="utf-8").strip(), again.read_text(encoding="utf-8").strip()

    @cached_property
    def version(self) -> str:
        """The name of the grading and a hash of its texts: verdicts of one version are answers to one question."""
        return f"{self.grading}-{hashlib.sha256(chr(0).join(self.texts).encode()).hexdigest()[:8]}"

    def messages(self, question: str, first: str, second: str) -> list[Message]:
        """The request. The mark around the texts is a hash of them, so that no answer can close its own fence."""
        mark = digest(question, first, second)[:10]
        places = {"mark": mark, "question": question, "first": first, "second": second}
        text = re.sub(r"\{\{(\w+)\}\}", lambda place: places[place[1]], self.texts[0])
        return [{"role": "user", "content": text}]


def digest(*texts: str) -> str:
    """A hash of texts in their order, told apart by their lengths."""
    whole = "".join(f"{len(text)}:{text}" for text in texts)
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Graded:
    """What a judge said in the end. Without a verdict, `reason` says why there is none."""

    verdict: Verdict | None
    reply: Reply
    asked: int
    reason: str = ""


def grade(grading: Grading, ask: Callable[[Sequence[Message]], Reply], messages: Sequence[Message]) -> Graded:
    """Asks, and once more where the reply says no verdict. Raises what `ask` raises the first time."""
    reply = ask(messages)
    verdict = verdict_of(grading, reply.text)
    if verdict is not None:
        return Graded(verdict, reply, 1)
    again = Prompts(grading.name).texts[1]
    said = [{"role": "assistant", "content": reply.text}] if reply.text.strip() else []
    try:
        second = ask([*messages, *said, {"role": "user", "content": again}] if said else messages)
    except RefusedError as error:
        return Graded(None, reply, 1, f"{_why_none(reply)}; then {error.problems[0].what}")
    verdict = verdict_of(grading, second.text)
    tokens = (reply.tokens_in + second.tokens_in, reply.tokens_out + second.tokens_out)
    told = "" if verdict is not None else _why_none(second)
    return Graded(verdict, replace(second, tokens_in=tokens[0], tokens_out=tokens[1]), 2, told)


def verdict_of(grading: Grading, text: str) -> Verdict | None:
    """What the last line of a reply says, whatever marks of emphasis are around it; None where it says no verdict, or
    an earlier line says another one. What a model thought aloud before is passed over."""
    lines = [line.strip(_DRESS) for line in _THOUGHTS.sub("", text).splitlines() if line.strip(_DRESS)]
    found = [grading.read(line) for line in lines]
    said = {verdict for verdict in found if verdict is not None}
    return found[-1] if found and len(said) == 1 else None


def _why_none(reply: Reply) -> str:
    if reply.finish == "length":
        return "the reply was cut at its limit of tokens before it said a verdict"
    return "the reply says no verdict in the form asked for" if reply.text.strip() else "the reply is empty"
