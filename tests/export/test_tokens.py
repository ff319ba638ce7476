"""Embeddings of new tokens in a merged model, whatever its files are like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qlora_cli.errors import ModelError
from qlora_cli.export.merge import Merger, deltas
from qlora_cli.export.tokens import NewRows, new_rows
from qlora_cli.export.weights import BaseWeights
from qlora_cli.model.adapter import parted
from qlora_cli.model.base import load_base
from qlora_cli.model.trained import TrainedAdapter
from qlora_cli.recipe.schema import LoraSection, ModelSection, QuantizationSection
from tests.export.bases import CONFIGS, all_tensors, save

NF4, LORA, CPU = QuantizationSection(), LoraSection(r=4, alpha=8), torch.device("cpu")
IDS = (7, 128, 129)
ROW = torch.tensor([[3, 128, 9, 7, 129, 60, 128]])
FILES = {
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "llama-tied": {"model.embed_tokens.weight"},
    "qwen2": {"model.embed_tokens.weight", "lm_head.weight"},
    "gpt2": {"transformer.wte.weight"},
    "gpt2-old": {"wte.weight"},
    "mixtral": {"model.embed_tokens.weight", "lm_head.weight"},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ROW, use_cache=False).logits.float()
    return found


def trained(folder: Any, dtype: torch.dtype) -> tuple[Any, TrainedAdapter]:
    """The base with an adapter and rows that have learned something."""
    model = load_base(folder, ModelSection(base=folder.name), NF4, dtype, CPU)
    found = TrainedAdapter(model, LORA, folder.name, dtype, 0, IDS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.named().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model, found


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
@pytest.mark.parametrize("name", FILES)
def test_a_merged_model_has_the_trained_rows_and_all_others_as_they_were(tmp_path: Path, name: str, shard: str) -> None:
    base = save(tmp_path / "base", name, torch.float32, "5GB" if name == "gpt2-old" else shard)
    model, found = trained(base, torch.float32)
    weights = BaseWeights(base, NF4, torch.float32, CPU)
    layers, tokens = parted(found.snapshot())
    rows = new_rows(weights, IDS, tokens, tmp_path)
    assert set(rows) == FILES[name]
    (tmp_path / "out").mkdir()
    added = deltas(weights, layers, LORA, tmp_path)
    Merger(weights, added, "dequantized", torch.float32, rows).write(tmp_path / "out", lambda count: None, 30_000)
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert merged.config.vocab_size == 130
    assert (logits(merged) - logits(model)).abs().max() < 1e-4
    before, after = all_tensors(base.path), all_tensors(tmp_path / "out")
    kept = [i for i in range(128) if i not in IDS]
    for file in FILES[name]:
        assert after[file].shape == (130, before[file].shape[1])
        assert torch.equal(after[file][kept], before[file][kept])


def test_every_base_of_the_tests_is_merged_here() -> None:
    assert set(FILES) == set(CONFIGS)


def test_merged_rows_are_those_that_training_computed_with(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama", torch.float32)
    _, found = trained(base, torch.float32)
    weights = BaseWeights(base, NF4, torch.bfloat16, CPU)
    layers, tokens = parted(found.snapshot())
    (tmp_path / "out").mkdir()
    added, rows = deltas(weights, layers, LORA, tmp_path), new_rows(weights, IDS, tokens, tmp_path)
    Merger(weights, added, "dequantized", torch.float32, rows).write(tmp_path / "out", lambda count: None)
    assert found.rows is not None
    assert found.rows.head is not None
    after = all_tensors(tmp_path / "out")["lm_head.weight"][list(IDS)]
    assert torch.equal(after, found.rows.head.detach().bfloat16().float())
    assert not torch.equal(after, found.rows.head.detach())


def test_rows_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama-tied", torch.float32)
    _, found = trained(base, torch.float32)
    assert found.rows is not None
    with torch.no_grad():
        found.rows.embedding[1, 3] = 70_000
    weights = BaseWeights(base, NF4, torch.float32, CPU)
    layers, tokens = parted(found.snapshot())
    added, rows = deltas(weights, layers, LORA, tmp_path), new_rows(weights, IDS, tokens, tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="not finite in float16"):
        Merger(weights, added, "dequantized", torch.float16, rows).write(tmp_path / "out", lambda count: None)


@pytest.mark.parametrize("change", ["missing", "shape", "unknown", "no ids", "ids that do not fit"])
def test_rows_that_do_not_fit_the_base_are_refused_by_name(tmp_path: Path, change: str) -> None:
    base = save(tmp_path / "base", "llama", torch.float32)
    tokens = parted(trained(base, torch.float32)[1].snapshot())[1]
    key = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    ids = {"no ids": (), "ids that do not fit": (7, 129, 130)}.get(change, IDS)
    if change == "missing":
        del tokens[key]
    elif change == "shape":
        tokens[key] = tokens[key][:, :8]
    elif change == "unknown":
        tokens[key.replace("lm_head", "other")] = tokens[key]
    with pytest.raises(ModelError, match=r"token_adapter|do not fit an embedding of 128 rows"):
        new_rows(BaseWeights(base, NF4, torch.float32, CPU), ids, tokens, tmp_path)


def test_rows_go_into_their_places_however_a_tensor_is_cut() -> None:
    whole = torch.arange(12.0).view(6, 2)
    rows = NewRows(torch.tensor([0, 3, 6, 7]), torch.tensor([[-1.0, -1], [-2, -2], [-3, -3], [-4, -4]]), 8)
    expected = torch.tensor([[-1.0, -1], [2, 3], [4, 5], [-2, -2], [8, 9], [10, 11], [-3, -3], [-4, -4]])
    for size in (1, 2, 4, 6):
        assert torch.equal(torch.cat(list(rows.among(whole.split(size), rows.values))), expected)
