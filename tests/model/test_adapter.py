"""The adapter on disk: PEFT reads it as it was trained, and what differs is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_cli.errors import ModelError
from qlora_cli.model.adapter import (
    WEIGHTS,
    adapter_config,
    adapter_tensors,
    learned_something,
    load_into,
    read_adapter,
    save_adapter,
    verify_adapter,
)
from qlora_cli.model.lora import LoraLinear
from qlora_cli.model.nf4 import keep_packed_format
from qlora_cli.recipe.schema import LoraSection
from tests.model.test_lora import IDS, adapted


def saved(base: Path, folder: Path, **lora: Any) -> tuple[Any, dict[str, LoraLinear]]:
    """A tiny adapted model whose adapter lies in `folder`."""
    model, layers = adapted(base, **lora)
    config = adapter_config(model, layers, LoraSection(**({"r": 4, "alpha": 8} | lora)), str(base))
    save_adapter(folder, adapter_tensors(layers), config, lambda staging: None)
    return model, layers


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"rslora": True},
        {"targets": ("q_proj", "down_proj")},
        {"targets": ("model.layers.1.mlp.up_proj",)},
        {"targets": r"model\.layers\.0\..*"},
    ],
)
def test_peft_gives_the_same_logits_on_the_same_four_bit_base(base: Path, tmp_path: Path, lora: Any) -> None:
    model, _ = saved(base, tmp_path / "adapter", **lora)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    keep_packed_format(plain)
    with torch.no_grad():
        untouched = plain.eval()(IDS).logits
        theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(IDS).logits
        ours = model.eval()(IDS).logits
    assert (ours - theirs).abs().max() <= 1e-3
    assert (theirs - untouched).abs().max() > 1e-2, "the adapter must matter, or the comparison shows nothing"


def test_an_adapter_loaded_into_a_fresh_base_gives_identical_logits(base: Path, tmp_path: Path) -> None:
    model, _ = saved(base, tmp_path / "adapter")
    other, layers = adapted(base)
    load_into(layers, read_adapter(tmp_path / "adapter")[1], tmp_path)
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, other.eval()(IDS).logits)


def test_short_target_names_are_written_where_they_select_the_same_layers(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "all")
    saved(base, tmp_path / "some", targets=("model.layers.1.mlp.up_proj",))
    everything = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert json.loads((tmp_path / "all/adapter_config.json").read_text())["target_modules"] == everything
    chosen = json.loads((tmp_path / "some/adapter_config.json").read_text())["target_modules"]
    assert chosen == ["model.layers.1.mlp.up_proj"]


def test_every_missing_foreign_or_misshapen_tensor_is_named_at_once(base: Path, tmp_path: Path) -> None:
    _, layers = saved(base, tmp_path / "adapter")
    tensors = read_adapter(tmp_path / "adapter")[1]
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.0.mlp.up_proj.lora_A.weight"]
    tensors["base_model.model.elsewhere.lora_A.weight"] = torch.zeros(4, 4)
    tensors[f"{prefix}.1.mlp.up_proj.lora_B.weight"] = torch.zeros(7, 4)
    before = {name: layer.lora_b.detach().clone() for name, layer in layers.items()}
    with pytest.raises(ModelError) as caught:
        load_into(layers, tensors, tmp_path)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "is not in the file" in text
    assert "fits no layer" in text
    assert "is (7, 4), the layer wants (128, 4)" in text
    assert all(torch.equal(before[name], layer.lora_b) for name, layer in layers.items())


@pytest.mark.parametrize("damage", ["bit", "missing", "nan", "zero"])
def test_an_adapter_that_is_not_what_was_trained_never_gets_its_final_name(
    base: Path, tmp_path: Path, damage: str
) -> None:
    model, layers = adapted(base)
    config = adapter_config(model, layers, LoraSection(r=4, alpha=8), str(base))
    tensors = adapter_tensors(layers)
    if damage in ("nan", "zero"):
        tensors = {k: v.fill_(float("nan")) if damage == "nan" else v * ("lora_A" in k) for k, v in tensors.items()}

    def harm(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        first = next(key for key in found if "lora_B" in key)
        if damage == "bit":
            found[first].view(torch.int32)[0, 0] ^= 1
        if damage == "missing":
            del found[first]
        save_file(found, folder / WEIGHTS)

    with pytest.raises(ModelError):
        save_adapter(tmp_path / "adapter", tensors, config, harm)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_refused_by_name_and_a_fresh_adapter_has_learned_nothing(
    base: Path, tmp_path: Path
) -> None:
    saved(base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert learned_something(tensors)
    assert not learned_something({key: value * (".lora_A." in key) for key, value in tensors.items()})
    bad = sorted(tensors)[:6]
    for key, value in zip(bad, [torch.nan, torch.inf, -torch.inf] * 2, strict=True):
        tensors[key][0, 0] = value
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(ModelError, match="6 tensors hold values that are not finite") as caught:
        read_adapter(tmp_path / "adapter")
    assert all(name in str(caught.value) for name in bad[:4])
    assert "and 2 more" in str(caught.value)


def test_a_damaged_or_foreign_folder_is_refused(base: Path, tmp_path: Path) -> None:
    _, layers = saved(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match="is not an adapter"):
        read_adapter(tmp_path)
    weights = tmp_path / "adapter" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match="damaged"):
        verify_adapter(tmp_path / "adapter", adapter_tensors(layers))
