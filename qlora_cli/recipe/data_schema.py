"""The data section of the recipe: every key, its type, range, default and help text, stated once.

Knows pydantic and nothing of files. The invariant is that of `schema.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qlora_cli.recipe.section import Name, PositiveInt, Section, Share

Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "text",
    "oasst",
    "guanaco",
    "self-instruct",
    "chip2",
    "hh-rlhf",
    "longform",
    "unnatural-instructions",
]
NamedTemplate = Literal["auto", "tokenizer", "chatml", "llama3", "alpaca", "guanaco", "vicuna", "zephyr", "none"]
Jinja = Annotated[str, Field(pattern=r"\{[{%]", title="a Jinja template")]
Limit = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?%$", title="a share like 1%")]


class SourceSection(Section):
    """One of several sources of training rows."""

    path: Name = Field(description="A file, a folder, a pattern like `rows/*.jsonl`, or the Hub id of a dataset.")
    config: Name | None = Field(None, description="Configuration of a Hub dataset.")
    split: Name = Field("train", description="Split of a Hub dataset.")
    revision: Name | None = Field(None, description="Branch, tag or commit of a Hub dataset.")
    format: Format | None = Field(None, description="Shape of its rows; null: as `data.format` says.")
    columns: dict[Name, Name] | None = Field(None, description="Its FIELD: COLUMN; null: as `data.columns` says.")
    weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Its part: with `mix: concat` how often its rows come, with `interleave` the share of rows."
    )
    shuffle: bool = Field(False, description="Put its rows in a random order (of train.seed) before `skip` and `take`.")
    skip: Annotated[int, Field(ge=0)] = Field(0, description="Rows to leave out at the beginning.")
    take: PositiveInt | None = Field(None, description="Most rows to take; null: all.")


class LimitsSection(Section):
    """How much may be lost before a run stops, as a count or as a share of the rows read."""

    dropped: Limit | None = Field(None, description="Rows left out, whatever the reason.")
    cut: Limit | None = Field(None, description="Rows of which something was cut.")
    duplicate: Limit | None = Field(None, description="Rows that say what an earlier one says.")
    overlap: Limit | None = Field(None, description="Training rows that are also held out.")
    bad: Limit | None = Field(None, description="Rows that cannot be read, with `on_bad_row: skip`.")


class DataSection(Section):
    """Rows, and what of them carries loss."""

    train: Name | None = Field(
        None,
        description="Training rows: a file, a folder, a pattern like `rows/*.jsonl`, or the Hub id of a dataset. "
        "Exactly one of `train` and `sources` is set.",
    )
    split: Name = Field("train", description="Split of a Hub dataset to train on.")
    sources: dict[Name, SourceSection] = Field(
        default_factory=dict, description="Several sources of training rows, each under a name of your choice."
    )
    mix: Literal["concat", "interleave"] = Field(
        "concat",
        description="An epoch over several sources: all rows of all, or rows in the proportion of their weights.",
    )
    stop: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted",
        description="With `mix: interleave` an epoch ends when a source has no row left, or when each has given all "
        "its rows (others repeat).",
    )
    eval: Name | None = Field(
        None, description="Held-out rows: named like `train`; the split of a Hub dataset as ID:SPLIT."
    )
    eval_split: PositiveInt | Share | None = Field(
        None, description="Hold out this many training rows (a count, or a share below 1), chosen by content hash."
    )
    format: Format = Field(
        "messages", description="Shape of a row (see docs/data.md); `auto` detects it, and says what it took."
    )
    columns: dict[Name, Name] = Field(
        default_factory=dict, description="Names that differ in your rows, as FIELD: COLUMN (e.g. `prompt: input`)."
    )
    template: NamedTemplate | Jinja = Field(
        "auto",
        description="`tokenizer`: its own chat template; a named one (see docs/data.md); `none`: plain text, the "
        "tokenizer's EOS after each answer; your own in Jinja; `auto`: `tokenizer` for conversations, the tokenizer's "
        "or else `alpaca` for `alpaca`, `none` for `text` and `prompt-completion`.",
    )
    new_tokens: tuple[Name, ...] = Field(
        (), description="Special tokens to add to the tokenizer; their embeddings are trained and saved too."
    )
    max_length: PositiveInt = Field(1024, description="Most tokens of a row.")
    source_max_length: PositiveInt | None = Field(None, description="Most tokens before an answer; its start is cut.")
    target_max_length: PositiveInt | None = Field(None, description="Most tokens of an answer; its end is cut.")
    too_long: Literal["drop", "truncate", "split", "error"] = Field(
        "drop",
        description="A longer row: leave it out, cut it (an end-of-turn target stays), train on its pieces (`text` "
        "only), or stop.",
    )
    truncate: Literal["end", "start"] = Field("end", description="Which side of a longer row `truncate` cuts.")
    loss_on: Literal["assistant", "completion", "last", "all"] = Field(
        "assistant",
        description="Tokens that carry loss: every answer, all that follows the first prompt, the last answer only, or "
        "everything. Messages with `train: false` never do.",
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="Training rows that say what an earlier one says; they are counted either way."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="A row that cannot be read or has another shape: stop, or leave it out and count it."
    )
    limits: LimitsSection = Field(
        default_factory=LimitsSection, description="How much may be lost before the run stops."
    )
    cache: bool = Field(True, description="Keep the encoded rows on disk for the next start.")

    @property
    def named(self) -> dict[str, SourceSection]:
        """Every source of training rows by its name; that of `train` is its path."""
        if self.train is None:
            return self.sources
        return {self.train: SourceSection(path=self.train, split=self.split)}

    @property
    def title(self) -> str:
        """The training rows in a few words."""
        return ", ".join(self.named)
