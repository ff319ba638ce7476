"""What can be set about decoding, on the command line and within a conversation.

Knows names and ranges. Invariant: the names are the fields of `Decoding`, and a value that passes is in range, finite,
and of the field's type.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import typer

Value = float | int


@dataclass(frozen=True)
class Setting:
    """A number: its type, range and help. `above` True leaves out the lower end of the range; `zero` True lets 0 in,
    which lies below it."""

    kind: type[float] | type[int]
    least: float
    most: float
    help: str
    above: bool = False
    zero: bool = False

    @property
    def __name__(self) -> str:
        """Older versions of Typer ask it of whatever parses an option."""
        return self.kind.__name__

    def __call__(self, text: str) -> Value:
        """The number in `text`. Raises `typer.BadParameter` with one line."""
        try:
            value = self.kind(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is not {self.range()}") from error
        if not self.holds(value):
            raise typer.BadParameter(f"{text} is not {self.range()}")
        return value

    def holds(self, value: object) -> bool:
        """Whether it is a number of this type (a whole one for a float, too) within the range."""
        if isinstance(value, bool) or not isinstance(value, int | self.kind):
            return False
        above = self.least < value if self.above else self.least <= value
        return (above and value <= self.most and abs(value) < math.inf) or (self.zero and value == 0)

    def range(self) -> str:
        """In words."""
        kind = "a whole number" if self.kind is int else "a number"
        low = f"{'above' if self.above else 'from'} {self.least:g}"
        high = f" to {self.most:,.0f}" if math.isfinite(self.most) else ""
        return f"{kind} {low}{high}{', or 0' if self.zero else ''}"


SETTINGS = {
    "temperature": Setting(float, 0.01, 100, "0 takes the likeliest token; higher varies more.", zero=True),
    "top_p": Setting(float, 0, 1, "Draw from the likeliest tokens of this probability together.", above=True),
    "top_k": Setting(int, 0, math.inf, "Draw from this many likeliest tokens; 0: all."),
    "min_p": Setting(float, 0, 1, "Draw from tokens at least this times as likely as the likeliest."),
    "repetition_penalty": Setting(float, 0.1, 100, "Above 1: less of what was there before."),
    "max_new_tokens": Setting(int, 1, math.inf, "Most tokens of an answer."),
    "seed": Setting(int, 0, 2**32 - 1, "Seed of the draws."),
}
NEED_TEMPERATURE = ("top_p", "top_k", "min_p")


def parse_setting(text: str) -> tuple[str, Value]:
    """(name, value) of `KEY=VALUE`. Raises `typer.BadParameter` with one line."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise typer.BadParameter(f"write KEY=VALUE, e.g. temperature=0.7 (got {text})")
    if key not in SETTINGS:
        raise typer.BadParameter(f"{key} is no setting; {nearest(key, SETTINGS)}")
    try:
        return key, SETTINGS[key](value)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{key}: {error.message}") from error


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean X?`, or all there is."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there is {', '.join(names)}"


def without_effect(names: Iterable[str], temperature: float) -> str:
    """What to say of settings that need a temperature above 0; empty where there is nothing to say."""
    idle = [name for name in names if name in NEED_TEMPERATURE and temperature == 0]
    return f"at temperature 0 the likeliest token is taken: {', '.join(idle)} without effect" if idle else ""
