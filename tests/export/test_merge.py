"""Merged weights against the loaded model: dequantised weight + delta, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.export.merge import Delta, Kind, Merger, Survival, deltas
from qlora_cli.export.weights import BaseWeights
from qlora_cli.model.adapter import adapter_tensors
from qlora_cli.model.base import load_base
from qlora_cli.model.folder import find_base
from qlora_cli.model.lora import attach
from qlora_cli.model.nf4 import dequantize, four_bit_layers
from qlora_cli.recipe.schema import LoraSection, ModelSection, QuantizationSection
from tests.conftest import make_llama

CPU = torch.device("cpu")
NF4 = QuantizationSection()
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 200}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 200, "n_positions": 64} | NO_SPECIAL


def biased_qwen() -> Any:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY, **HEADS, **NO_SPECIAL))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    return model


def grown_llama() -> Any:
    model = make_llama(tie_word_embeddings=False)
    model.resize_token_embeddings(333)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama, tied, GQA": make_llama,
    "llama, untied": lambda: make_llama(tie_word_embeddings=False),
    "llama, grown vocabulary": grown_llama,
    "qwen2, biases": biased_qwen,
    "gpt2, Conv1D": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "gpt2, as on the Hub": lambda: transformers.GPT2Model(transformers.GPT2Config(**GPT2)),
    "phi3, fused projections": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**TINY, **HEADS, **NO_SPECIAL)
    ),
    "mixtral, experts": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TINY, **HEADS, **NO_SPECIAL, num_local_experts=2)
    ),
}


def loaded(folder: Path, section: QuantizationSection, dtype: torch.dtype) -> Any:
    return load_base(find_base(str(folder), None), ModelSection(base=str(folder)), section, dtype, CPU)


def learned(model: Any, lora: LoraSection, size: float = 0.05) -> dict[str, Any]:
    """Layers with an adapter that changes something."""
    layers = attach(model, lora, torch.float32, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_b.normal_(std=size, generator=generator)
    return layers


def weights_of(folder: Path, section: QuantizationSection, dtype: torch.dtype) -> BaseWeights:
    return BaseWeights(find_base(str(folder), None), section, dtype, CPU)


def merged(
    base: Path,
    out: Path,
    lora: LoraSection,
    kind: Kind = "dequantized",
    section: QuantizationSection = NF4,
    dtype: torch.dtype = torch.float32,
    to: torch.dtype = torch.float32,
    size: float = 0.05,
) -> tuple[Any, Merger]:
    """The model that trained, with its adapter, and the merger that has written it merged."""
    model = loaded(base, section, dtype)
    layers = learned(model, lora, size)
    weights = weights_of(base, section, dtype)
    merger = Merger(weights, deltas(weights, adapter_tensors(layers), lora, base), kind, to)
    out.mkdir()
    merger.write(out, lambda count: None, shard_bytes=60_000)
    return model, merger


def plain(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(5, 45).reshape(2, 20)
    found: Tensor = model.eval()(input_ids=ids).logits.float()
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", ["50KB", "5GB"])
def test_merged_in_float32_computes_what_base_and_adapter_compute(tmp_path: Path, name: str, shards: str) -> None:
    MODELS[name]().save_pretrained(tmp_path / "base", max_shard_size=shards)
    lora = LoraSection(r=4, alpha=8)
    model, merger = merged(tmp_path / "base", tmp_path / "out", lora)
    expected = logits(model)
    assert four_bit_layers(model)
    assert (logits(plain(tmp_path / "out", torch.float32)) - expected).abs().max() < 1e-4
    assert (logits(loaded(tmp_path / "base", NF4, torch.float32)) - expected).abs().max() > 1e-2
    assert merger.survival.share == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_weight_is_the_trained_one_plus_its_delta_rounded_once(
    tmp_path: Path, base: Path, dtype: torch.dtype, to: torch.dtype
) -> None:
    lora = LoraSection(r=4, alpha=8, rslora=True, targets=("q_proj", "down_proj"))
    model, _ = merged(base, tmp_path / "out", lora, dtype=dtype, to=to)
    written = _all_tensors(tmp_path / "out")
    layers = {name.removesuffix(".base"): layer for name, layer in four_bit_layers(model).items()}
    adapters = {name: module for name, module in model.named_modules() if hasattr(module, "lora_a")}
    assert len(layers) == 14 and len(adapters) == 4
    for name, layer in layers.items():
        wanted = dequantize(layer).float() + (adapters[name].delta() if name in adapters else 0)
        assert torch.equal(written[f"{name}.weight"], wanted.to(to)), name
    embedding = model.get_input_embeddings().weight
    assert torch.equal(written["model.embed_tokens.weight"], embedding.to(to))


def _all_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_original_adds_the_delta_to_the_16_bit_weights(tmp_path: Path, base: Path) -> None:
    lora = LoraSection(r=4, alpha=8)
    model, _ = merged(base, tmp_path / "out", lora, "original", dtype=torch.bfloat16)
    written, source = _all_tensors(tmp_path / "out"), _all_tensors(base)
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(written[f"{name}.weight"], source[f"{name}.weight"] + model.get_submodule(name).delta())


def test_requantized_loads_in_transformers_in_4_bits_and_has_lost_a_small_delta(tmp_path: Path, base: Path) -> None:
    lora = LoraSection(r=4, alpha=8)
    _, merger = merged(base, tmp_path / "out", lora, "requantized", size=2e-4)
    again = plain(tmp_path / "out", torch.float32)
    assert len(four_bit_layers(again)) == 14
    assert merger.survival.error > 0.5


def test_an_adapter_on_a_base_without_quantization_merges_exactly(tmp_path: Path, base: Path) -> None:
    section, lora = QuantizationSection(type="none", double_quant=False), LoraSection(r=4, alpha=8)
    model, _ = merged(base, tmp_path / "out", lora, section=section)
    assert (logits(plain(tmp_path / "out", torch.float32)) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize(("size", "least", "most"), [(1e-5, 0.0, 0.2), (3e-4, 0.9, 1.1)])
def test_survival_tells_what_rounding_left_of_a_delta(size: float, least: float, most: float) -> None:
    torch.manual_seed(0)
    before, delta = torch.ones(64, 64), torch.randn(64, 64) * size * 30
    survival = Survival()
    survival.add(delta, (before + delta).bfloat16().float() - before)
    assert least <= survival.share <= most


def test_every_mismatch_of_an_adapter_is_named_at_once(tmp_path: Path, base: Path) -> None:
    lora = LoraSection(r=4, alpha=8)
    tensors = adapter_tensors(learned(loaded(base, NF4, torch.float32), lora))
    missing, wrong = sorted(tensors)[0], sorted(tensors)[1]
    del tensors[missing]
    tensors[wrong] = tensors[wrong][:, :1]
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    with pytest.raises(ModelError) as caught:
        deltas(weights_of(base, NF4, torch.float32), tensors, lora, tmp_path)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert f"{missing} is not in the file" in text and "lm_head.lora_A.weight fits no layer" in text
    assert f"{wrong} is" in text


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = 1e6
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"embed_tokens.weight has values that are not finite in float16"):
        merged(tmp_path / "base", tmp_path / "out", LoraSection(r=4), to=torch.float16)


def test_a_weight_that_is_missing_in_the_files_is_named(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight is not in the files"):
        weights_of(folder, NF4, torch.float32)


def test_a_delta_in_rows_is_the_delta_as_a_whole() -> None:
    torch.manual_seed(0)
    delta = Delta(torch.randn(4, 32), torch.randn(70, 4), 0.5)
    rows = torch.cat([delta.rows(start, min(70, start + 16)) for start in range(0, 70, 16)])
    assert torch.allclose(rows, (delta.b @ delta.a) * 0.5, rtol=1e-6)
