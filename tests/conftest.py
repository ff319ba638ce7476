"""Tiny real objects: a byte-level tokenizer, a 2-layer Llama on disk, rows that can be learned."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: no test needs the network
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test, nor a program that one starts, keeps a base in the user's cache; those of the cache name a place and a limit.
os.environ["QLORA_CACHE"] = str(Path(tempfile.gettempdir()) / f"qlora-tests-{os.getpid()}")
os.environ["QLORA_CACHE_LIMIT"] = "0"

import pytest
import torch

# A shell that starts this in the background ignores SIGINT, and nohup SIGHUP; so would every process of a test.
for _name, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _handler)

TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
RECIPE = """\
model: {{base: {base}}}
quantization: {{compute_dtype: float32}}
lora: {{r: 4, alpha: 8}}
data: {{train: {data}, max_length: 64, eval_split: 4}}
train: {{steps: 6, batch_size: 4, micro_batch_size: 2, optimizer: adamw, lr: 1e-2, gradient_checkpointing: "off"}}
log: {{every: 1}}
"""


def make_tokenizer(chat_template: str | None = TEMPLATE) -> Any:
    """Bytes and five special tokens: 261 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": special[3:]})
    fast.chat_template = chat_template
    return fast


def make_llama(seed: int = 0, **changes: Any) -> Any:
    """A random Llama with 2 layers, hidden 64, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(options | changes)))


def save_base(folder: Path, **changes: Any) -> Path:
    """A base model folder as `model.base` wants it."""
    make_llama(**changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Questions with a one-letter answer."""
    return [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ab"[i % 2]}]}
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model folder."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny tokenizer."""
    return make_tokenizer()


@pytest.fixture
def recipe_file(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small runnable recipe; arguments replace text in it."""

    def write(text: str = RECIPE, rows: Sequence[Any] | None = None, name: str = "tiny.yaml") -> Path:
        data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(24) if rows is None else rows)
        path = tmp_path / name
        path.write_text(text.format(base=base, data=data), encoding="utf-8")
        return path

    return write
