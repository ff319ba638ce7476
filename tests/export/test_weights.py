"""A weight read from the files is the weight that the loaded model multiplies with, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.export.weights import BaseWeights
from qlora_cli.model.base import load_base
from qlora_cli.model.folder import BaseFolder, find_base
from qlora_cli.model.nf4 import dequantize, four_bit_layers
from qlora_cli.recipe.schema import ModelSection, QuantizationSection

from .bases import CONFIGS, save
from .test_quantize import quantized

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


def loaded(folder: BaseFolder, section: QuantizationSection, dtype: torch.dtype) -> dict[str, Tensor]:
    """The 4-bit layers' weights in a loaded model."""
    model = load_base(folder, ModelSection(base="-"), section, dtype, CPU)
    return {f"{name}.weight": dequantize(layer).to(dtype) for name, layer in four_bit_layers(model).items()}


def equal_to_loaded(folder: BaseFolder, section: QuantizationSection, dtype: torch.dtype) -> BaseWeights:
    weights, expected = BaseWeights(folder, section, dtype, CPU), loaded(folder, section, dtype)
    found = {f"{layer.name}.weight": name for name, layer in weights.layers.items() if layer.four_bit}
    assert found.keys() == expected.keys()
    assert len(found) >= 6
    for parameter, name in found.items():
        value = weights.weight(name)
        assert value.dtype == dtype
        assert value.shape == weights.layers[name].shape
        assert torch.equal(value, expected[parameter]), name
    return weights


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    equal_to_loaded(save(tmp_path, name), QuantizationSection(), dtype)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_every_way_to_store(tmp_path: Path, kind: str, blocksize: int, double: bool) -> None:
    section = QuantizationSection.model_validate({"type": kind, "blocksize": blocksize, "double_quant": double})
    equal_to_loaded(save(tmp_path, "qwen2", FP32), section, BF16)


def test_layers_left_out_are_as_the_files_have_them(tmp_path: Path) -> None:
    section = QuantizationSection(skip_modules=("down_proj",))
    weights = equal_to_loaded(save(tmp_path, "llama-tied"), section, BF16)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not weights.layers[name].four_bit
    assert torch.equal(weights.weight(name), load_file(tmp_path / "model.safetensors")[name])
    assert set(weights.skipped) == {"down_proj", "lm_head", "model.embed_tokens", "model.norm"}


STORED: list[tuple[str, dict[str, Any]]] = [
    ("llama-tied", {}),
    ("llama", {"type": "fp4", "double_quant": False, "blocksize": 32}),
    ("qwen2", {"skip_modules": ("q_proj",)}),
    ("gpt2-old", {}),
    ("mixtral", {"double_quant": False}),
]


@pytest.mark.parametrize(("name", "settings"), STORED)
def test_a_folder_stored_in_4_bits_gives_the_weights_it_was_made_with(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    made, _ = quantized(save(tmp_path / "base", name), tmp_path / "out", BF16, **settings)
    folder = find_base(str(tmp_path / "out"), None)
    stored = equal_to_loaded(folder, QuantizationSection(), BF16)
    assert stored.is_packed
    assert stored.layers.keys() == made.layers.keys()
    assert stored.names == made.names
    assert stored.section.model_copy(update={"skip_modules": made.section.skip_modules}) == made.section
    for weight in made.layers:
        assert torch.equal(stored.weight(weight), made.weight(weight))
        assert stored.elements(weight) == made.elements(weight)


def test_in_16_bits_every_weight_is_that_of_the_files(tmp_path: Path) -> None:
    weights = BaseWeights(save(tmp_path, "gpt2"), QuantizationSection(type="none"), FP32, CPU)
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(weights.layers) == 8
    for name, layer in weights.layers.items():
        assert not layer.four_bit
        assert torch.equal(weights.weight(name), tensors[name].T.float())


@pytest.mark.parametrize("stored", [False, True])
def test_a_weight_that_lacks_or_has_another_shape_is_named(tmp_path: Path, stored: bool) -> None:
    folder = save(tmp_path / "base", "llama")
    if stored:
        quantized(folder, tmp_path / "out", BF16)
        folder = find_base(str(tmp_path / "out"), None)
    file = folder.path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is written over
    up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    swapped = {key.replace(up, "#").replace(down, up).replace("#", down): value for key, value in tensors.items()}
    save_file(swapped, file)
    with pytest.raises(ModelError, match=r"2 of its weights cannot be used.*down_proj.* is \(128, 64\)"):
        BaseWeights(folder, QuantizationSection(), BF16, CPU)
    save_file({key: value for key, value in tensors.items() if not key.startswith((up, "model.norm"))}, file)
    with pytest.raises(ModelError, match=r"2 of its weights.*up_proj\.weight is not in the files; model\.norm"):
        BaseWeights(folder, QuantizationSection(), BF16, CPU)
