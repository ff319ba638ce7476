"""Formats of a text, or of a prompt and its answer.

Knows field names; nothing of templates. Invariant: prompt and answer are the row's text; only what marks the end of
one, which a template sets itself, is taken off.
"""

from __future__ import annotations

from qlora_cli.data.conversation import Conversation, Message
from qlora_cli.data.fields import Row, as_object, list_of, pair, text_of

END_OF_TEXT = "<|endoftext|>"


def text(row: Row) -> Conversation:
    """`{"text": ...}`: everything is learned."""
    return Conversation((Message("assistant", text_of(row, "text")),))


def alpaca(row: Row) -> Conversation:
    """`{"instruction": ..., "input": ..., "output": ...}`; `input` may be absent, null or empty."""
    instruction = text_of(row, "instruction")
    extra = "" if row.get("input") is None else text_of(row, "input")
    return pair(f"{instruction}\n\n{extra}" if extra else instruction, text_of(row, "output"))


def longform(row: Row) -> Conversation:
    """`{"input": ..., "output": ...}`, as in `akoksal/LongForm`."""
    return pair(text_of(row, "input"), text_of(row, "output"))


def self_instruct(row: Row) -> Conversation:
    """`{"prompt": ..., "completion": ...}`, as in `yizhongw/self_instruct`. Its completions end with GPT's
    `<|endoftext|>`, which other tokenizers would read letter by letter: it is taken off, since the end of a turn is the
    template's. (QLoRA's own loader left it in.)"""
    return pair(text_of(row, "prompt"), text_of(row, "completion").removesuffix(END_OF_TEXT))


def ends_as_self_instruct(row: Row) -> bool:
    """Whether a completion ends as those of self-instruct do."""
    completion = row.get("completion")
    return isinstance(completion, str) and completion.endswith(END_OF_TEXT)


def unnatural_instructions(row: Row) -> Conversation:
    """`{"instances": [{"instruction_with_input": ..., "output": ...}]}`, as in `mrm8488/unnatural-instructions-core`:
    the first instance; its `reformulations` are not read."""
    where = "instances[0]"
    first = as_object(list_of(row, "instances", "instances")[0], where, "`instruction_with_input` and `output`")
    return pair(text_of(first, "instruction_with_input", where), text_of(first, "output", where))
