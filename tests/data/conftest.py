"""Rows in a form that can be read, and tokenizers that differ in one habit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_cli.data.conversation import Conversation, Message, Role
from qlora_cli.data.encode import Encoded
from qlora_cli.data.turns import TurnEncoder
from tests.conftest import TEMPLATE, make_tokenizer

THINKING = (
    "{% set last = messages | length - 1 %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Strips the reasoning of earlier turns, as Qwen3's template does."""

ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def marked(row: Encoded, tokenizer: Any) -> str:
    """The row's tokens, those that carry loss in brackets."""
    tokens = tokenizer.convert_ids_to_tokens(row.ids.tolist())
    return " ".join(f"[{token}]" if loss else token for token, loss in zip(tokens, row.loss, strict=True))


def through(turns: TurnEncoder, messages: Sequence[Message]) -> list[int]:
    """Ids up to and with the end of the last message."""
    before, turn = turns.turn(messages)
    return before + turn


def talk(*turns: str) -> Conversation:
    """A conversation from turns like `user: q`."""
    roles: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}
    return Conversation(tuple(Message(roles[turn[0]], turn.partition(": ")[2]) for turn in turns))


def with_bos(chat_template: str | None = TEMPLATE) -> Any:
    """The tiny tokenizer with the habit of putting BOS before a text."""
    from tokenizers import processors

    tokenizer = make_tokenizer(chat_template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def with_tokens(*tokens: Any, chat_template: str = TEMPLATE) -> Any:
    """The tiny tokenizer with more special tokens."""
    tokenizer = make_tokenizer(chat_template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    return tokenizer


def with_merge(left: str, right: str, chat_template: str) -> Any:
    """The tiny tokenizer with one merge, so that a token may straddle the border between prompt and answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = make_tokenizer().get_vocab()
    words = {token: index for token, index in vocab.items() if index < 261} | {left + right: 261}
    inner = Tokenizer(models.BPE(vocab=words, merges=[(left, right)]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = chat_template
    return fast


def metaspace(scheme: str, chat_template: str | None) -> Any:
    """A tokenizer of the sentencepiece kind: spaces become `\u2581`, one is put before a text as `scheme` says, and
    tokens of several letters are merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [
        "<unk>",
        "<pad>",
        "<s>",
        "</s>",
        "<|user|>",
        "<|assistant|>",
        "\u2581",
        *"ab:\n<>|/#qr",
        "\u2581a",
        "\n\n",
        "ab",
    ]
    merges = [("\u2581", "a"), ("\n", "\n"), ("a", "b")]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = chat_template
    return fast
