"""A model quantised to a folder is the model that transformers makes of the 16-bit one on loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qlora_cli.errors import ModelError
from qlora_cli.export.digest import check_digests
from qlora_cli.export.quantize import Quantizer, layers_left_out
from qlora_cli.export.weights import BaseWeights
from qlora_cli.model.base import load_base
from qlora_cli.model.folder import BaseFolder, find_base
from qlora_cli.model.nf4 import stored_constants
from qlora_cli.recipe.schema import ModelSection, QuantizationSection
from tests.model.test_architectures import SMALL

from .bases import all_tensors, logits, save, states

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


def quantized(folder: BaseFolder, out: Path, dtype: torch.dtype, shard_bytes: int = 10**9, **settings: Any) -> Any:
    """(the weights read, digests) of `folder` quantised into `out`."""
    section = QuantizationSection(**settings)
    weights = BaseWeights(folder, section, dtype, CPU)
    out.mkdir()
    digests = Quantizer(weights, {"it": section}, None).write(out, "it", dtype, lambda count: None, shard_bytes)
    return weights, digests


def on_load(folder: BaseFolder, dtype: torch.dtype, **settings: Any) -> Any:
    """What plain transformers makes of the 16-bit files."""
    config = tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.get("type", "nf4"),
        bnb_4bit_use_double_quant=settings.get("double_quant", True),
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=getattr(torch, settings.get("storage_dtype", "uint8")),
        llm_int8_skip_modules=settings.get("all_skipped"),
    )
    return tf.AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype, quantization_config=config)


def data(tensor: torch.Tensor) -> bytes:
    """Its bytes: packed codes in a storage type may be NaN there."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: Any, other: Any) -> int:
    """Asserts that two models hold and compute the very same; how many tensors that were."""
    first, second = dict(states(one)), dict(states(other))
    assert first.keys() == second.keys()
    assert [n for n in first if first[n].dtype != second[n].dtype or data(first[n]) != data(second[n])] == []
    assert torch.equal(logits(one), logits(other))
    return len(first)


CASES: list[tuple[str, torch.dtype, int, dict[str, Any]]] = [
    ("llama", BF16, 10**9, {}),
    ("llama", FP32, 10**9, {"type": "fp4", "double_quant": False}),
    ("llama-tied", BF16, 40_000, {}),
    ("llama-tied", FP32, 40_000, {"double_quant": False}),
    ("qwen2", BF16, 10**9, {"storage_dtype": "bfloat16"}),
    ("gpt2", BF16, 10**9, {}),
    ("gpt2-old", BF16, 40_000, {"type": "fp4"}),
    ("gpt2-old", FP32, 10**9, {}),
    ("mixtral", BF16, 10**9, {}),
]


@pytest.mark.parametrize(("name", "dtype", "shard_bytes", "settings"), CASES)
def test_plain_transformers_loads_what_it_would_have_made_on_loading(
    tmp_path: Path, name: str, dtype: torch.dtype, shard_bytes: int, settings: dict[str, Any]
) -> None:
    folder = save(tmp_path / "base", name, dtype, shard="5GB" if name == "gpt2-old" else "100KB")
    quantized(folder, tmp_path / "out", dtype, shard_bytes, **settings)
    made = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert made.config.dtype == dtype
    assert same(made, on_load(folder, dtype, **settings)) > 30
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    layers = 8 if "gpt2" in name or name == "mixtral" else 14
    assert len(stored_constants(all_tensors(tmp_path / "out"))) == layers


def test_layers_left_out_are_added_to_the_usual_ones(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", "llama-tied")
    weights, _ = quantized(
        folder, tmp_path / "out", BF16, skip_modules=("down_proj", "model.layers.0.self_attn.q_proj")
    )
    usual = ["lm_head", "model.embed_tokens", "model.norm"]
    named = ["down_proj", "model.layers.0.self_attn.q_proj"]
    assert sorted(weights.skipped) == sorted([*usual, *named])
    made = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert same(made, on_load(folder, BF16, all_skipped=[*usual, *named])) > 30
    assert not hasattr(made.model.layers[1].mlp.down_proj.weight, "quant_state")
    assert sorted(made.config.quantization_config.llm_int8_skip_modules) == sorted([*usual, *named])


@pytest.mark.parametrize(
    "settings", [{"blocksize": 32}, {"blocksize": 64, "type": "fp4"}, {"blocksize": 32, "double_quant": False}]
)
def test_any_blocksize_loads_as_training_quantises(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save(tmp_path / "base", "qwen2")
    quantized(folder, tmp_path / "out", BF16, **settings)
    section = QuantizationSection(**settings)
    trained = load_base(folder, ModelSection(base="-"), section, BF16, CPU)
    stored = load_base(find_base(str(tmp_path / "out"), None), ModelSection(base="-"), section, BF16, CPU)
    assert same(stored, trained) > 30
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert same(plain, trained) > 30


def test_what_is_not_in_4_bits_keeps_its_type_unless_told(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", "llama", FP32)
    section = QuantizationSection()
    weights = BaseWeights(folder, section, BF16, CPU)
    for cast, expected in ((None, FP32), (BF16, BF16)):
        out = tmp_path / str(expected)
        out.mkdir()
        Quantizer(weights, {"nf4": section}, cast).write(out, "nf4", BF16, lambda count: None, 10**9)
        assert all_tensors(out)["model.embed_tokens.weight"].dtype == expected


def test_the_estimate_of_the_size_is_close(tmp_path: Path) -> None:
    for settings in ({}, {"double_quant": False}, {"blocksize": 32}):
        folder = save(tmp_path / f"base{len(list(tmp_path.iterdir()))}", "llama")
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        weights, _ = quantized(folder, out, BF16, **settings)
        estimate = Quantizer(weights, {"it": weights.section}, None).estimate("it")
        assert estimate == pytest.approx((out / "model.safetensors").stat().st_size, rel=0.1)


def test_a_byte_that_the_disk_gives_back_otherwise_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", "llama")
    _, digests = quantized(folder, tmp_path / "out", BF16)
    check_digests(tmp_path / "out", digests, lambda count: None)
    file = tmp_path / "out/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match="1 tensors do not read back as they were written"):
        check_digests(tmp_path / "out", digests, lambda count: None)


def test_damage_is_of_the_values_that_the_loaded_model_multiplies_with(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", "gpt2")
    sections = {"nf4": QuantizationSection(), "fp4-nodq": QuantizationSection(type="fp4", double_quant=False)}
    quantizer = Quantizer(BaseWeights(folder, sections["nf4"], BF16, CPU), sections, None)
    quantizer.measure(lambda count: None)
    original = tf.AutoModelForCausalLM.from_pretrained(folder.path, dtype=BF16).state_dict()
    for variant, section in sections.items():
        weights = BaseWeights(folder, section, BF16, CPU)
        missed = squares = 0.0
        layers = quantizer.damage[variant].layers
        assert len(layers) == 8
        for layer in layers:
            wanted = original[f"{layer.name}.weight"].T.float()
            found = weights.weight(f"{layer.name}.weight").float()
            assert layer.shape == tuple(wanted.shape)
            assert layer.error == pytest.approx(float((wanted - found).norm() / wanted.norm()), rel=1e-5)
            assert layer.largest == float((wanted - found).abs().max())
            assert layer.bits == pytest.approx(4.5 if "nodq" in variant else 4.127, rel=0.01)
            missed += float((wanted - found).square().sum())
            squares += float(wanted.square().sum())
        assert quantizer.damage[variant].error == pytest.approx((missed / squares) ** 0.5, rel=1e-5)


def test_a_layer_with_a_few_huge_weights_is_an_outlier_and_even_ones_are_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SMALL)).to(BF16)
    section = QuantizationSection()

    def outliers(path: Path) -> list[str]:
        model.save_pretrained(path)
        quantizer = Quantizer(BaseWeights(find_base(str(path), None), section, BF16, CPU), {"nf4": section}, None)
        quantizer.measure(lambda count: None)
        return quantizer.damage["nf4"].outliers()

    assert outliers(tmp_path / "even") == []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.view(-1, 64)[:, 0] *= 30
    assert outliers(tmp_path / "uneven") == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, bad: float, place: str) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SMALL)).to(BF16)
    with torch.no_grad():
        model.get_parameter(place).view(-1)[7] = bad
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=f"{place} has values that are not finite"):
        quantized(find_base(str(tmp_path / "base"), None), tmp_path / "out", BF16)


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SMALL))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="not finite in float16"):
        quantized(find_base(str(tmp_path / "base"), None), tmp_path / "out", torch.float16)


def test_names_left_out_match_as_transformers_matches_them(tmp_path: Path) -> None:
    weights = BaseWeights(save(tmp_path / "base", "llama"), QuantizationSection(), BF16, CPU)
    assert len(layers_left_out(weights, "down_proj")) == 2
    assert len(layers_left_out(weights, "model.layers.0")) == 7
    assert layers_left_out(weights, "model.layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    assert layers_left_out(weights, "dawn_proj") == []
