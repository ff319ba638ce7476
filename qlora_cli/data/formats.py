"""The row formats by name, and how one is told from another.

Knows which fields a format asks for and which format takes the other's rows too; the formats themselves are in
`pairs.py`, `chats.py` and `dialogs.py`. Invariant: a row either becomes a conversation or raises `RowError` with the
field that is wrong; nothing is guessed or repaired, and rows that can be read in two ways are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora_cli.data import chats, dialogs, pairs
from qlora_cli.data.conversation import Conversation
from qlora_cli.data.fields import Row, RowError, named


@dataclass(frozen=True)
class Format:
    """A named row shape: the fields that it must have, and how they become a conversation. `shape` says in words what
    rows of it have.

    `over` names a format that takes such rows too, but knows less of them; `sign` tells whether a row has what makes
    the difference, in all rows of this format and in none of the other."""

    build: Callable[[Row], Conversation]
    fields: tuple[str, ...]
    shape: str
    optional: tuple[str, ...] = ()
    over: str = ""
    sign: Callable[[Row], bool] = lambda row: True

    def fits(self, row: Row) -> bool:
        """Whether the row has this shape, inside its fields too."""
        return not self.against(row) and self.sign(row)

    def against(self, row: Row) -> str:
        """Why the row cannot be read as this format; empty where it can."""
        try:
            self.build(row)
        except RowError as error:
            return str(error)
        return ""


def _has(field: str, mark: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row.get(field), str) and mark in row[field]


FORMATS: Mapping[str, Format] = {
    "messages": Format(chats.messages, ("messages",), "`messages` with `role` and `content`", ("tools",)),
    "sharegpt": Format(
        chats.sharegpt, ("conversations",), "`conversations` with `from` and `value`", ("system", "tools")
    ),
    "alpaca": Format(
        pairs.alpaca,
        ("instruction", "output"),
        "`instruction` and `output`",
        ("input",),
        over="longform",
        sign=lambda row: "instruction" in row,
    ),
    "prompt-completion": Format(
        chats.prompt_completion, ("prompt", "completion"), "`prompt` and `completion`", ("tools",)
    ),
    "text": Format(pairs.text, ("text",), "`text`"),
    "oasst": Format(dialogs.oasst, ("prompt",), "`prompt` with `text`, `role` and `replies`"),
    "guanaco": Format(
        dialogs.guanaco,
        ("text",),
        "`text` with `### Human:` and `### Assistant:`",
        over="text",
        sign=_has("text", "### Human:"),
    ),
    "self-instruct": Format(
        pairs.self_instruct,
        ("prompt", "completion"),
        f"`prompt` and `completion` that ends with `{pairs.END_OF_TEXT}`",
        over="prompt-completion",
        sign=pairs.ends_as_self_instruct,
    ),
    "chip2": Format(
        dialogs.chip2, ("text",), "`text` with `<human>:` and `<bot>:`", over="text", sign=_has("text", "<human>:")
    ),
    "hh-rlhf": Format(dialogs.hh_rlhf, ("chosen",), "`chosen` with `Human:` and `Assistant:`"),
    "longform": Format(pairs.longform, ("input", "output"), "`input` and `output`"),
    "unnatural-instructions": Format(
        pairs.unnatural_instructions, ("instances",), "`instances` with `instruction_with_input` and `output`"
    ),
}


@dataclass(frozen=True)
class Detected:
    """The format that rows have, and what it was known by."""

    name: str
    why: str


def detect(rows: Sequence[Row]) -> Detected:
    """The one format that all of `rows`, the first of a source, have. Raises `RowError` where none or several fit."""
    if not rows:
        raise RowError("there are no rows to tell a format from", "set data.format")
    names = _candidates(rows)
    if len(names) == 1:
        return Detected(names[0], f"rows have {FORMATS[names[0]].shape}")
    if names:
        ways = " or as ".join(f"{name} ({FORMATS[name].shape})" for name in names)
        fix = " or ".join(f"data.format: {name}" for name in names)
        raise RowError(f"the rows can be read as {ways}", f"set {fix}")
    raise _no_format(rows)


def fitting(row: Row) -> tuple[str, ...]:
    """Names of the formats that this row has."""
    return _candidates((row,))


def _candidates(rows: Sequence[Row]) -> tuple[str, ...]:
    """Formats that all rows have, less those of which another knows more; and with a format, those of which some rows
    have the sign: where they are meant, it would read them wrong."""
    fit = {name for name, shape in FORMATS.items() if all(shape.fits(row) for row in rows)}
    fit -= {FORMATS[name].over for name in fit}
    doubtful = {name for name, shape in FORMATS.items() if shape.over in fit and any(map(shape.sign, rows))}
    return tuple(name for name in FORMATS if name in fit | doubtful)


def _no_format(rows: Sequence[Row]) -> RowError:
    """What the rows have, why they are not of the formats whose fields are there, and what each format needs."""
    has = named({field for row in rows for field in row}) or "no fields"
    reasons: dict[str, list[str]] = {}
    for name, shape in FORMATS.items():
        if reason := _against(shape, rows):
            reasons.setdefault(reason, []).append(name)
    near = "".join(f"; not {', '.join(names)}: {reason}" for reason, names in reasons.items())
    needs = "; ".join(f"{name} needs {shape.shape}" for name, shape in FORMATS.items())
    fix = f"name the columns in data.columns, or set data.format: {needs}"
    return RowError(f"the rows have the shape of no format (they have: {has}){near}", fix)


def _against(shape: Format, rows: Sequence[Row]) -> str:
    """What keeps the first row that is not of this format from it; empty where no row has the format's fields."""
    if not any(set(shape.fields) <= set(row) for row in rows):
        return ""
    reasons = ((number, shape.against(row)) for number, row in enumerate(rows, start=1))
    return next((f"row {number}: {reason}" for number, reason in reasons if reason), "")


OPTIONAL = frozenset(field for shape in FORMATS.values() for field in shape.optional)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under the format's field names, where the recipe says that its columns are called otherwise. A column
    that no row has would leave the mapping without effect, so it is an error; that of an optional field may be
    absent."""
    if not columns:
        return row
    for field, column in columns.items():
        if column not in row and field not in OPTIONAL:
            has = named(row) or "no fields"
            raise RowError(f"column `{column}` is missing (the row has: {has})", f"mend data.columns.{field}")
    taken = set(columns.values())
    return {**{k: v for k, v in row.items() if k not in taken}, **{f: row[c] for f, c in columns.items() if c in row}}
