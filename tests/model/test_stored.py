"""A base from the cache against the same base quantised on loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from qlora_cli.cache.entries import Cache
from qlora_cli.errors import ModelError
from qlora_cli.model.base import load_base, load_config
from qlora_cli.model.folder import BaseFolder, find_base
from qlora_cli.model.lora import attach
from qlora_cli.model.nf4 import four_bit_layers
from qlora_cli.model.stored import Wanted, difference, read_model, write_model
from qlora_cli.recipe.schema import LoraSection, ModelSection, QuantizationSection
from tests.conftest import make_llama
from tests.model.test_architectures import CONFIGS, IDS, SMALL

CPU = torch.device("cpu")
NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
SCALED: dict[str, Any] = {"max_position_embeddings": 64, "rope_parameters": YARN}
MODELS: dict[str, Callable[[], Any]] = {
    **CONFIGS,
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=128, **NO_SPECIAL),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(vocab_size=128, **SIZES),
    "llama-tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-scaled-rotary": lambda: transformers.LlamaConfig(**{**SMALL, **SCALED}),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=64
    ),
}


def silent(text: str) -> None:
    """Nobody listens."""


def folder_of(place: Path, config: Any) -> BaseFolder:
    """A base with random weights."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return find_base(str(place), None)


def load(folder: BaseFolder, section: QuantizationSection, dtype: torch.dtype, cache: Cache | None) -> Any:
    """The base, in 4 bits."""
    return load_base(folder, ModelSection(base="-"), section, dtype, CPU, cache)


def from_cache(place: Path, folder: BaseFolder, section: QuantizationSection, dtype: torch.dtype) -> Any:
    """The base as a second start gets it."""
    told: list[str] = []
    cache = Cache(place, 10**9, told.append, told.append)
    load(folder, section, dtype, cache)
    model = load(folder, section, dtype, cache)
    assert ["kept" in told[0], "read" in told[1], len(told)] == [True, True, 2], told
    return model


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_tensors(one: Any, other: Any) -> None:
    """State, parameters and all buffers are equal in bits, types, names and who shares them with whom."""
    kinds: tuple[Callable[[Any], dict[str, torch.Tensor]], ...] = (
        lambda model: model.state_dict(),
        lambda model: dict(model.named_parameters(remove_duplicate=False)),
        lambda model: dict(model.named_buffers()),
    )
    for kind in kinds:
        first, second = kind(one), kind(other)
        assert list(first) == list(second)
        for name in first:
            assert (first[name].dtype, first[name].shape) == (second[name].dtype, second[name].shape), name
            assert torch.equal(bits(first[name]), bits(second[name])), name
    assert _shared(one) == _shared(other)


def _shared(model: Any) -> set[tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {tuple(group) for group in groups.values()}


def assert_same_layers(one: Any, other: Any) -> None:
    """4-bit layers have the same constants and attributes."""
    first, second = four_bit_layers(one), four_bit_layers(other)
    assert list(first) == list(second) and first
    for name, layer in first.items():
        weight, twin = layer.weight, second[name].weight
        assert type(weight) is type(twin)
        states = [each.quant_state.as_dict(packed=True) for each in (weight, twin)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(bits(states[0][key]), bits(states[1][key])) for key in states[0])
        assert second[name].quant_state is twin.quant_state and twin.module is second[name]
        for key in ("blocksize", "quant_type", "compress_statistics", "bnb_quantized", "quant_storage"):
            assert getattr(weight, key) == getattr(twin, key)
        for key in ("compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu", "in_features", "training"):
            assert getattr(layer, key) == getattr(second[name], key), key


def gradients(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of a step with adapters."""
    layers = attach(model.train(), LoraSection(r=2), dtype, seed=0)
    torch.manual_seed(0)  # dropout
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: layer.lora_b.grad for name, layer in layers.items() if layer.lora_b.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_a_base_from_the_cache_is_the_one_that_was_quantised(name: str, tmp_path: Path) -> None:
    folder, section, dtype = folder_of(tmp_path / "base", MODELS[name]()), QuantizationSection(), torch.bfloat16
    fresh, stored = load(folder, section, dtype, None), from_cache(tmp_path / "cache", folder, section, dtype)
    assert_same_tensors(fresh, stored)
    assert_same_layers(fresh, stored)
    assert fresh.config.to_dict() == stored.config.to_dict()
    assert fresh.generation_config.to_dict() == stored.generation_config.to_dict()
    assert fresh.config._attn_implementation == stored.config._attn_implementation
    assert not any(module.training for module in (*fresh.modules(), *stored.modules()))
    assert not any(parameter.requires_grad for parameter in stored.parameters())
    for key in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "name_or_path", "dtype", "device"):
        assert getattr(fresh, key) == getattr(stored, key), key
    assert type(fresh.hf_quantizer) is type(stored.hf_quantizer)
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=IDS).logits, stored(input_ids=IDS).logits)
    first, second = gradients(fresh, dtype), gradients(stored, dtype)
    assert first.keys() == second.keys() and any(gradient.any() for gradient in first.values())
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "section",
    [
        QuantizationSection(storage_dtype="bfloat16"),
        QuantizationSection(type="fp4", double_quant=False, blocksize=128, storage_dtype="float32"),
        QuantizationSection(skip_modules=("down_proj", "model.layers.0.self_attn.q_proj")),
    ],
    ids=["bf16-storage", "fp4", "skipped"],
)
def test_every_storage_and_type_is_kept_as_it_is(
    base: Path, tmp_path: Path, section: QuantizationSection, dtype: torch.dtype
) -> None:
    folder = find_base(str(base), None)
    fresh, stored = load(folder, section, dtype, None), from_cache(tmp_path, folder, section, dtype)
    assert_same_tensors(fresh, stored)
    assert_same_layers(fresh, stored)


def test_writing_into_a_model_from_the_cache_leaves_its_files_as_they_are(base: Path, tmp_path: Path) -> None:
    folder, section = find_base(str(base), None), QuantizationSection()
    model = from_cache(tmp_path, folder, section, torch.float32)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert_same_tensors(
        load(folder, section, torch.float32, None), from_cache(tmp_path / "2", folder, section, torch.float32)
    )
    told: list[str] = []
    again = load(folder, section, torch.float32, Cache(tmp_path, 10**9, told.append, told.append))
    assert [text.split(" from ")[0] for text in told] == ["4-bit weights read"]
    assert_same_tensors(load(folder, section, torch.float32, None), again)


def test_a_tensor_that_two_names_share_is_stored_once(base: Path, tmp_path: Path) -> None:
    model = load(find_base(str(base), None), QuantizationSection(), torch.float32, None)
    write_model(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert json.loads((tmp_path / "aliases.json").read_text()) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_generation_config_of_its_own_is_read_from_the_base(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "base", CONFIGS["llama"]())
    transformers.GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=[2, 7]).save_pretrained(folder.path)
    fresh = load(folder, QuantizationSection(), torch.float32, None)
    stored = from_cache(tmp_path / "cache", folder, QuantizationSection(), torch.float32)
    assert stored.generation_config.eos_token_id == [2, 7]
    assert fresh.generation_config.to_dict() == stored.generation_config.to_dict()


def wanted(base: Path) -> Wanted:
    """The tiny base."""
    folder = find_base(str(base), None)
    return Wanted(folder, load_config(folder), QuantizationSection(), torch.float32, CPU, "auto")


def complex_norm(model: Any) -> None:
    """A weight of a type that safetensors has no name for."""
    model.model.norm.weight = nn.Parameter(torch.ones(64, dtype=torch.complex64))


CHANGES: list[tuple[Callable[[Any], object], str]] = [
    (lambda model: None, ""),
    (lambda model: setattr(model.model, "norm", nn.LayerNorm(64)), "its modules are not those of its configuration"),
    (lambda model: model.register_buffer("x", torch.ones(1)), "its tensors are not those of its configuration"),
    (lambda model: setattr(model.model, "table", [torch.ones(1)]), "model.table is neither a parameter nor a buffer"),
    (complex_norm, "model.norm.weight is of a type that safetensors lacks"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=["none", "module", "buffer", "attribute", "type"])
def test_a_model_that_could_not_be_read_back_is_told_from_one_that_can(
    base: Path, change: Callable[[Any], object], reason: str
) -> None:
    model = load(find_base(str(base), None), QuantizationSection(), torch.float32, None)
    change(model)
    assert difference(model, wanted(base).empty()) == reason


def test_files_of_another_model_are_refused_by_the_tensor_that_does_not_fit(base: Path, tmp_path: Path) -> None:
    write_model(load(find_base(str(base), None), QuantizationSection(), torch.float32, None), tmp_path)
    make_llama(num_hidden_layers=1).save_pretrained(tmp_path / "fewer")
    with pytest.raises(ModelError, match=r"the model has no tensor model\.layers\.1\."):
        read_model(wanted(tmp_path / "fewer").empty(), tmp_path, CPU)
    make_llama(num_hidden_layers=3).save_pretrained(tmp_path / "more")
    with pytest.raises(ModelError, match=r"model\.layers\.2\..* is not there"):
        read_model(wanted(tmp_path / "more").empty(), tmp_path, CPU)
