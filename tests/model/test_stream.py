"""A base whose tensors are streamed against the same base loaded from its mapped files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_cli.errors import ModelError
from qlora_cli.model import base as base_module
from qlora_cli.model.base import load_config
from qlora_cli.model.folder import INDEX, BaseFolder, find_base
from qlora_cli.model.stream import Streamed, loader
from qlora_cli.recipe.schema import QuantizationSection
from tests.conftest import make_llama
from tests.model.test_stored import (
    IDS,
    MODELS,
    NO_SPECIAL,
    SMALL,
    assert_same_layers,
    assert_same_tensors,
    bits,
    folder_of,
    load,
)

WEIGHTS = "model.safetensors"
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SECTIONS = {
    "plain": QuantizationSection(),
    "bf16-storage": QuantizationSection(storage_dtype="bfloat16"),
    "fp4": QuantizationSection(type="fp4", double_quant=False, blocksize=128, storage_dtype="float32"),
    "skipped": QuantizationSection(skip_modules=("down_proj", "model.layers.0.self_attn.q_proj")),
}


def mapped(folder: BaseFolder, config: Any) -> partial[Any]:
    """What is compared with: transformers opens the files."""
    return partial(transformers.AutoModelForCausalLM.from_pretrained, folder.path)


def both(folder: BaseFolder, section: QuantizationSection, dtype: torch.dtype) -> tuple[Any, Any]:
    """(the base streamed, the base mapped)."""
    assert streams(folder)
    ours = load(folder, section, dtype, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_module, "loader", mapped)
        patch.setattr(base_module, "name_after", lambda folder, model: None)
        return ours, load(folder, section, dtype, None)


def streams(folder: BaseFolder) -> bool:
    """Whether the base's tensors are streamed."""
    return "state_dict" in loader(folder, load_config(folder)).keywords


def assert_same(ours: Any, theirs: Any) -> None:
    """All tensors, 4-bit layers, configurations and attributes of all modules are equal."""
    assert_same_tensors(ours, theirs)
    assert_same_layers(ours, theirs)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.name_or_path == theirs.name_or_path and ours.config.name_or_path == theirs.config.name_or_path
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert attributes(ours) == attributes(theirs)


def attributes(model: Any) -> dict[str, str]:
    """Every attribute of every module that is no part of it, in words without addresses."""
    kinds = (bool, int, float, str, list, tuple, dict, set, torch.dtype, type(None))
    return {
        f"{name}:{key}": repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, kinds) and " at 0x" not in repr(value)
    }


def rewritten(folder: BaseFolder, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> BaseFolder:
    """The folder with its tensors changed."""
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(folder.path / WEIGHTS)).items()}
    save_file(tensors, folder.path / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_base_is_the_one_that_transformers_loads_from_its_files(name: str, tmp_path: Path) -> None:
    ours, theirs = both(folder_of(tmp_path, MODELS[name]()), QuantizationSection(), torch.bfloat16)
    assert_same(ours, theirs)
    assert ours.hf_quantizer.quantization_config.to_dict() == theirs.hf_quantizer.quantization_config.to_dict()
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("section", SECTIONS.values(), ids=list(SECTIONS))
def test_it_is_so_for_every_storage_and_type(base: Path, section: QuantizationSection, dtype: torch.dtype) -> None:
    assert_same(*both(find_base(str(base), None), section, dtype))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_files_in_another_type_are_rounded_before_they_are_quantised(tmp_path: Path, stored: torch.dtype) -> None:
    folder = folder_of(tmp_path, transformers.LlamaConfig(**SMALL))
    rewritten(folder, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    for dtype in TYPES:
        assert_same(*both(folder, QuantizationSection(), dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_that_a_model_keeps_in_float32_stay_so(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = folder_of(tmp_path, transformers.LlamaConfig(**SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules", ["input_layernorm"])
        patch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"embed_tokens"})
        ours, theirs = both(folder, QuantizationSection(), dtype)
    assert_same(ours, theirs)
    assert ours.model.embed_tokens.weight.dtype == torch.float32
    assert ours.model.layers[0].input_layernorm.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    folder = find_base(str(tmp_path), None)
    assert (tmp_path / INDEX).is_file() and len(folder.weight_files()) > 3
    assert_same(*both(folder, QuantizationSection(), torch.float32))


def test_names_of_an_old_checkpoint_are_those_of_the_model(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=128, **NO_SPECIAL)
    folder = folder_of(tmp_path, config)
    rewritten(folder, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    assert_same(*both(folder, QuantizationSection(), torch.float32))


def test_tensors_that_the_model_lacks_are_passed_over(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, transformers.LlamaConfig(**SMALL))
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16), "stranger": torch.empty(0, 3)}
    rewritten(folder, lambda tensors: tensors | more)
    assert_same(*both(folder, QuantizationSection(), torch.float32))


def test_a_head_that_is_stored_beside_the_embeddings_it_is_tied_to_is_tied_only_where_it_is_equal(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path, transformers.LlamaConfig(**SMALL, tie_word_embeddings=True))
    for factor, tied in ((1.0, True), (2.0, False)):
        rewritten(folder, lambda ts, f=factor: ts | {"lm_head.weight": ts["model.embed_tokens.weight"] * f})  # type: ignore[misc]
        ours, theirs = both(folder, QuantizationSection(), torch.float32)
        assert_same(ours, theirs)
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


def test_a_generation_config_of_its_own_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, transformers.LlamaConfig(**SMALL))
    transformers.GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=[2, 7]).save_pretrained(tmp_path)
    ours, theirs = both(folder, QuantizationSection(), torch.float32)
    assert ours.generation_config.eos_token_id == [2, 7]
    assert_same(ours, theirs)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_every_tensor_is_as_it_was_written(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    folder = folder_of(tmp_path, transformers.LlamaConfig(**SMALL))
    value = (torch.randn(shape) * 3).to(dtype)
    rewritten(folder, lambda tensors: tensors | {"an odd one": value})
    tensors = loader(folder, load_config(folder)).keywords["state_dict"]
    assert tensors.keys() == load_file(tmp_path / WEIGHTS).keys() and len(tensors) > 10
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        read = tensors[name][...]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(read), bits(tensor))


def add_file(folder: Path) -> None:
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")


def add_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": WEIGHTS}}))


def name_file(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": WEIGHTS}))


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize("change", [add_file, add_index, name_file, cut], ids=["stray", "index", "named", "cut"])
def test_files_that_transformers_must_choose_or_judge_are_left_to_it(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = folder_of(tmp_path, transformers.LlamaConfig(**SMALL))
    assert streams(folder)
    change(tmp_path)
    assert not streams(folder)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def shorter(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {name: tensors[name][:32]}


LINEAR, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
WRONG = [
    (without(LINEAR), "1 weights"),
    (without(NORM), "1 weights"),
    (shorter(LINEAR), "shapes"),
]


@pytest.mark.parametrize(("change", "what"), WRONG, ids=["no-linear", "no-norm", "shape"])
def test_what_is_wrong_with_weights_is_told_as_for_mapped_files(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], what: str
) -> None:
    folder = rewritten(folder_of(tmp_path, transformers.LlamaConfig(**SMALL)), change)
    assert streams(folder)
    told = []
    for kind in (loader, mapped):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ModelError, match=what) as caught:
            patch.setattr(base_module, "loader", kind)
            load(folder, QuantizationSection(), torch.float32, None)
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, transformers.LlamaConfig(**SMALL))
    tensors: dict[str, Streamed] = loader(folder, load_config(folder)).keywords["state_dict"]
    cut(tmp_path)
    last = max(tensors, key=lambda name: tensors[name].start)
    with pytest.raises(ModelError, match=r"model\.safetensors became shorter while it was read"):
        tensors[last][...]


GROWTH = """
import gc, sys, torch
from pathlib import Path
from transformers.models.llama import modeling_llama
from tests.model.test_stored import load
from qlora_cli.model.base import report
from qlora_cli.model.folder import find_base
from qlora_cli.recipe.schema import QuantizationSection

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

small, large = (find_base(name, None) for name in sys.argv[1:])
load(small, QuantizationSection(), torch.bfloat16, None)  # imports, threads, tables
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS:")
model = load(large, QuantizationSection(), torch.bfloat16, None)
held = report(model)
print(1024 * (kilobytes("VmHWM:") - before), held.four_bit_bytes + held.other_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_loading_takes_little_more_memory_than_the_4_bit_model_has(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    small = folder_of(tmp_path / "small", transformers.LlamaConfig(**SMALL))
    large = folder_of(tmp_path / "large", transformers.LlamaConfig(**{**SMALL, **sizes}, dtype=torch.bfloat16))
    stored, largest = large.weight_files()[0].stat().st_size, 2 * 1024 * 2048
    command = [sys.executable, "-c", GROWTH, str(small.path), str(large.path)]
    # With a fixed threshold the heap gives back what is freed; what it would keep besides is up to chance.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    growth, model = map(int, done.stdout.split())
    bound = model + 3 * largest + 2**24
    assert stored > 1.5 * bound  # what a mapped file would add
    assert growth < bound
