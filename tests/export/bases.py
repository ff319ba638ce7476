"""Small random bases whose files differ in what a reader may trip over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.model.folder import BaseFolder, find_base
from tests.model.test_architectures import SMALL

GPT2: dict[str, Any] = {"vocab_size": 128, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "llama-tied": lambda: tf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: tf.Qwen2Config(**SMALL),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "gpt2-old": lambda: tf.GPT2Config(**GPT2),
    "mixtral": lambda: tf.MixtralConfig(**SMALL, num_local_experts=2),
}
"""gpt2-old: as on the Hub, without the prefix `transformer.` and with buffers that the model no longer has."""


def save(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB") -> BaseFolder:
    """The base `name` in `folder`; biases and norms are random too."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    if name == "gpt2-old":
        _make_old(folder / "model.safetensors")
    return find_base(str(folder), None)


def _make_old(file: Path) -> None:
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    assert "h.0.attn.c_attn.weight" in tensors
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for i in range(2)}
    save_file(tensors | masks, file, metadata={"format": "pt"})


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def states(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model in memory, 4-bit constants included."""
    yield from model.state_dict().items()


def logits(model: Any) -> Tensor:
    """What the model computes for two short rows."""
    ids = (torch.arange(20) % 60 + 3).view(2, 10)
    with torch.no_grad():
        found: Tensor = model.train()(input_ids=ids, use_cache=False).logits
    return found
