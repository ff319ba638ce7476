"""Loading with our codes against loading with bitsandbytes'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_cli.model.base import load_base
from qlora_cli.model.folder import find_base
from qlora_cli.model.nf4 import four_bit_layers
from qlora_cli.model.quantizer import FourBitQuantizer
from qlora_cli.recipe.schema import ModelSection, QuantizationSection
from tests.conftest import make_llama

NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 200, "n_positions": 64} | NO_SPECIAL
MODELS: dict[str, Callable[[], Any]] = {
    "llama": make_llama,
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
}
SECTIONS = [
    QuantizationSection(),
    QuantizationSection(type="fp4", double_quant=False, blocksize=32, storage_dtype="bfloat16"),
]


@pytest.mark.parametrize("section", SECTIONS, ids=["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_bit_for_bit_the_one_that_bitsandbytes_quantises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, section: QuantizationSection
) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    folder = find_base(str(tmp_path), None)

    def load() -> Any:
        return load_base(folder, ModelSection(base=str(tmp_path)), section, dtype, torch.device("cpu"))

    ours = load()
    monkeypatch.setattr(FourBitQuantizer, "get_quantize_ops", Bnb4BitHfQuantizer.get_quantize_ops)
    theirs = load()
    layers, others = four_bit_layers(ours), four_bit_layers(theirs)
    assert layers.keys() == others.keys() and len(layers) >= 8
    for key, layer in layers.items():
        other = others[key]
        assert type(layer.weight) is type(other.weight) and layer.weight.shape == other.weight.shape
        assert torch.equal(layer.weight.data.view(torch.uint8), other.weight.data.view(torch.uint8))
        constants, expected = (each.weight.quant_state.as_dict(packed=True) for each in (layer, other))
        assert all(torch.equal(constants[part], expected[part]) for part in expected)
        for attribute in ("blocksize", "quant_type", "compress_statistics", "bnb_quantized", "quant_storage"):
            assert getattr(layer.weight, attribute) == getattr(other.weight, attribute)
        assert layer.quant_state is layer.weight.quant_state and not layer.weight.requires_grad
    ids = torch.arange(5, 45).reshape(2, 20)
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
