"""The architectures of the shipped recipes, and a few that differ from them, tiny and random, in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qlora_cli.model.base import load_base, load_config, meta_model, report
from qlora_cli.model.folder import find_base
from qlora_cli.model.lora import attach, target_layers
from qlora_cli.model.loss import loss_sum
from qlora_cli.recipe.schema import LoraSection, ModelSection, QuantizationSection

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3_vision() -> Any:
    """Gemma 3 as its 4B checkpoint is: a text model beside a vision tower."""
    return tf.Gemma3Config(
        text_config={**SMALL, "head_dim": 32, "sliding_window": 16},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=100,
        boi_token_index=101,
        eoi_token_index=102,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "mistral": lambda: tf.MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: tf.Qwen2Config(**SMALL),
    "qwen3": lambda: tf.Qwen3Config(**SMALL, head_dim=32),
    "gemma2": lambda: tf.Gemma2Config(**SMALL, head_dim=32),
    "gemma3": lambda: tf.Gemma3TextConfig(**SMALL, head_dim=32),
    "gemma3-vision": gemma3_vision,
    "phi3": lambda: tf.Phi3Config(**SMALL),
    "mixtral": lambda: tf.MixtralConfig(**SMALL, num_local_experts=2),
}
LINEAR = {"phi3": 8, "mixtral": 8}
IDS = (torch.arange(20) % 60 + 3).view(2, 10)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_layer_of_the_text_model_learns_and_the_loss_is_the_models_own(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(tmp_path)
    folder = find_base(str(tmp_path), None)
    section = ModelSection(base=str(tmp_path))
    model = load_base(folder, section, QuantizationSection(), torch.float32, torch.device("cpu"))
    planned = target_layers(meta_model(load_config(folder)), "all-linear")
    layers = attach(model, LoraSection(r=2), torch.float32, seed=0)
    assert list(layers) == list(planned)
    assert len(layers) == LINEAR.get(name, 14)
    assert not any("vision" in layer or "head" in layer for layer in layers)
    targets = torch.ones_like(IDS, dtype=torch.bool)
    targets[:, -1] = False
    loss = loss_sum(model, IDS, torch.ones_like(IDS), targets, torch.roll(IDS, -1, 1)[targets])
    own = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, use_cache=False).loss
    torch.testing.assert_close(loss / int(targets.sum()), own, rtol=1e-5, atol=1e-6)
    loss.backward()
    silent = [name for name, layer in layers.items() if layer.lora_b.grad is None or not layer.lora_b.grad.any()]
    assert silent == []


def test_experts_that_stay_in_sixteen_bit_are_counted(tmp_path: Path) -> None:
    tf.AutoModelForCausalLM.from_config(CONFIGS["mixtral"]()).save_pretrained(tmp_path)
    folder = find_base(str(tmp_path), None)
    model = load_base(
        folder, ModelSection(base=str(tmp_path)), QuantizationSection(), torch.float32, torch.device("cpu")
    )
    held = report(model)
    experts = 2 * 2 * 3 * 64 * 128
    assert held.parameters - held.four_bit_parameters >= experts
    assert held.share_not_four_bit > 0.8
