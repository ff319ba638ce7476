"""Names in files become the names of parameters as transformers' own loading makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from qlora_cli.model.base import load_config, meta_model
from qlora_cli.model.folder import find_base
from qlora_cli.model.names import Names, parameter_names
from qlora_cli.model.source import Source
from tests.export.bases import CONFIGS, all_tensors, save


def names_of(folder: Path) -> Names:
    base = find_base(str(folder), None)
    return parameter_names(meta_model(load_config(base)), Source(base).entries)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tensor_is_the_parameter_that_loading_puts_it_into(name: str, tmp_path: Path) -> None:
    save(tmp_path, name, torch.float32)
    found = names_of(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    tensors = all_tensors(tmp_path)
    assert len(found.parameters) > 15
    for tensor, parameter in found.parameters.items():
        assert torch.equal(tensors[tensor], loaded[parameter]), tensor
    tied = set() if name in {"llama", "qwen2", "mixtral"} else {"lm_head.weight"}
    assert set(found.parameters.values()) | found.combined == loaded.keys() - tied


def test_gpt2_without_its_prefix_and_with_old_buffers(tmp_path: Path) -> None:
    save(tmp_path, "gpt2-old")
    found = names_of(tmp_path)
    assert found.parameters["h.0.attn.c_attn.weight"] == "transformer.h.0.attn.c_attn.weight"
    assert found.parameters["wte.weight"] == "transformer.wte.weight"
    assert "h.0.attn.bias" not in found.parameters
    assert found.combined == frozenset()


def test_experts_that_become_one_parameter_have_no_name_of_their_own(tmp_path: Path) -> None:
    save(tmp_path, "mixtral")
    found = names_of(tmp_path)
    experts = [name for name in all_tensors(tmp_path) if ".experts." in name]
    assert len(experts) == 2 * 2 * 3
    assert not set(experts) & found.parameters.keys()
    expected = {f"model.layers.{i}.mlp.experts.{part}" for i in range(2) for part in ("gate_up_proj", "down_proj")}
    assert found.combined == expected


def test_biases_are_parameters_and_strangers_are_not(tmp_path: Path) -> None:
    save(tmp_path, "qwen2")
    base = find_base(str(tmp_path), None)
    model = meta_model(load_config(base))
    found = parameter_names(model, ["model.layers.0.self_attn.q_proj.bias", "model.layers.9.mlp.up_proj.weight", "x"])
    name = "model.layers.0.self_attn.q_proj.bias"
    assert found == Names({name: name}, frozenset())
