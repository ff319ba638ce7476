"""4-bit storage: what bitsandbytes quantises is what stays, in training and evaluation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb_functional
import pytest
import torch

from qlora_cli.model.base import load_base, load_config, meta_model, report
from qlora_cli.model.folder import find_base
from qlora_cli.model.nf4 import Desk, dequantize, four_bit_layers, is_four_bit
from qlora_cli.model.quantizer import four_bit_skeleton
from qlora_cli.recipe.schema import ModelSection, QuantizationSection
from tests.conftest import make_llama

CPU = torch.device("cpu")
IDS = torch.arange(12).view(2, 6) + 60


def load(base: Path, dtype: torch.dtype = torch.float32, **quantization: Any) -> Any:
    """The tiny base in 4 bits."""
    section = QuantizationSection(**quantization)
    return load_base(find_base(str(base), None), ModelSection(base=str(base)), section, dtype, CPU)


@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_loaded_codes_equal_quantising_the_same_weight_directly(
    base: Path, kind: str, blocksize: int, double: bool
) -> None:
    layers = four_bit_layers(load(base, type=kind, blocksize=blocksize, double_quant=double))
    original = dict(make_llama().named_parameters())
    assert len(layers) == 14
    for name, layer in layers.items():
        codes, state = bnb_functional.quantize_4bit(
            original[f"{name}.weight"].detach(), blocksize=blocksize, quant_type=kind, compress_statistics=double
        )
        assert torch.equal(layer.weight.data.view(-1), codes.view(-1))
        assert torch.equal(dequantize(layer), bnb_functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_storage_dtype_changes_no_value(base: Path, storage: str) -> None:
    plain, packed = four_bit_layers(load(base)), four_bit_layers(load(base, storage_dtype=storage))
    assert plain.keys() == packed.keys()
    for name in plain:
        assert packed[name].weight.dtype == getattr(torch, storage)
        assert torch.equal(dequantize(plain[name]), dequantize(packed[name]))


def test_head_embeddings_and_norms_stay_unquantised_and_everything_is_frozen(base: Path) -> None:
    model = load(base)
    kinds = {name: is_four_bit(module) for name, module in model.named_modules()}
    assert not kinds["lm_head"]
    assert not kinds["model.embed_tokens"]
    assert kinds["model.layers.0.self_attn.q_proj"]
    assert model.model.norm.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())


def test_an_untied_head_stays_unquantised(tmp_path: Path) -> None:
    make_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    assert not is_four_bit(load(tmp_path).lm_head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_evaluating_in_eval_mode_changes_no_stored_byte(base: Path, dtype: torch.dtype, double: bool) -> None:
    model = load(base, dtype, double_quant=double)
    layers = four_bit_layers(model)
    before = {name: (layer.weight.data.clone(), dequantize(layer)) for name, layer in layers.items()}
    with torch.no_grad():
        model.eval()(IDS)
    assert before
    for name, layer in layers.items():
        assert torch.equal(layer.weight.data, before[name][0])
        assert torch.equal(dequantize(layer), before[name][1])


def test_report_and_structure_agree_on_how_much_is_four_bit(base: Path) -> None:
    held = report(load(base))
    skeleton = meta_model(load_config(find_base(str(base), None)))
    planned = four_bit_layers(four_bit_skeleton(skeleton, QuantizationSection(), torch.float32)[0])
    four_bit = sum(layer.in_features * layer.out_features for layer in planned.values())
    assert held.four_bit_parameters == four_bit == 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    assert held.parameters == four_bit + 320 * 64 + 5 * 64
    assert held.share_not_four_bit == pytest.approx(20_800 / 94_528)
    assert held.four_bit_bytes == four_bit // 2 + four_bit // 64 + held_nested_bytes(four_bit)


def held_nested_bytes(four_bit: int) -> int:
    """One float32 per 256 constants, rounded up for each of the 14 layers."""
    shapes = [64 * 64, 32 * 64, 32 * 64, 64 * 64, 64 * 128, 64 * 128, 128 * 64] * 2
    assert sum(shapes) == four_bit
    return sum(4 * -(-(count // 64) // 256) for count in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_a_desk_writes_out_the_bits_of_dequantising_each_over_the_one_before(
    base: Path, dtype: torch.dtype, kind: str, double: bool
) -> None:
    layers = list(four_bit_layers(load(base, dtype, type=kind, double_quant=double)).values())
    assert {tuple(layer.quant_state.shape) for layer in layers} == {(64, 64), (32, 64), (128, 64), (64, 128)}
    desk, places = Desk(), set()
    for layer in [*layers, *reversed(layers)]:
        weight = desk.weight(layer)
        assert torch.equal(weight, dequantize(layer))
        places.add(weight.data_ptr())
    assert len(places) <= 3, "a place is only taken anew for a larger weight"


def test_a_desk_leaves_to_bitsandbytes_what_its_c_function_gets_wrong(base: Path) -> None:
    layers = list(four_bit_layers(load(base, blocksize=2048)).values())
    desk = Desk()
    for layer in layers:
        weight = desk.weight(layer)
        desk.weight(layers[0])
        assert torch.equal(weight, dequantize(layer)), "it must not be on the desk"


def test_bitsandbytes_is_imported_without_a_compiler_which_stays_there_for_others() -> None:
    """In a process of its own: whoever imports bitsandbytes first decides."""
    code = (
        "import torch; before = torch.compile; import qlora_cli.model.nf4\n"
        "from bitsandbytes.backends.default import ops\n"
        "assert torch.compile is before\n"
        "assert not hasattr(ops._optimizer_update_32bit, '__wrapped__')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
