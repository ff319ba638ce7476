"""Trained rows of a vocabulary against plain autograd over a whole embedding, and against PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_cli.errors import ModelError
from qlora_cli.model.adapter import (
    CONFIG,
    WEIGHTS,
    adapter_config,
    adapter_tensors,
    load_into,
    put_adapter,
    read_adapter,
    save_adapter,
    token_ids,
)
from qlora_cli.model.base import load_base
from qlora_cli.model.chunked import ChunkedLoss, chunked_loss, difference
from qlora_cli.model.engine import build_engine
from qlora_cli.model.folder import find_base
from qlora_cli.model.lora import attach, without_adapter
from qlora_cli.model.loss import plain_loss
from qlora_cli.model.nf4 import keep_packed_format
from qlora_cli.model.tokens import TokenRows, TokenSwitch, Vocabulary, add_rows, make_room, rows_of, widen
from qlora_cli.model.trained import TrainedAdapter, TrainedModel
from qlora_cli.recipe.schema import LoraSection, ModelSection, QuantizationSection
from tests.model.test_architectures import SMALL, gemma3_vision

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2-tied": lambda: tf.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma2": lambda: tf.Gemma2Config(**SMALL, head_dim=32, final_logit_softcapping=5.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**SMALL, head_dim=32),
    "gemma3-vision": gemma3_vision,
    "granite": lambda: tf.GraniteConfig(
        **SMALL, logits_scaling=4.0, embedding_multiplier=3.0, tie_word_embeddings=True
    ),
}
TIED = {name: name != "llama" for name in CONFIGS}
GROWN, SPARE, MIXED = (128, 129, 130), (5, 17), (100, 128)
LORA = LoraSection(r=4, alpha=8)
CPU = torch.device("cpu")
Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A function that gives the folder of a tiny base."""
    place = tmp_path_factory.mktemp("bases")

    def base(name: str) -> Path:
        if not (place / name).is_dir():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
            model.save_pretrained(place / name)
        return place / name

    return base


def load(base: Path, dtype: torch.dtype = torch.float32, kind: str = "nf4") -> Any:
    """The base, in 4 bits unless told otherwise."""
    section = QuantizationSection.model_validate({"type": kind, "double_quant": kind != "none"})
    return load_base(find_base(str(base), None), ModelSection(base=str(base)), section, dtype, CPU)


def trained(base: Path, ids: tuple[int, ...], dtype: torch.dtype = torch.float32, kind: str = "nf4") -> TrainedAdapter:
    """An adapter that changes something, with rows that have learned something."""
    model = load(base, dtype, kind)
    found = TrainedAdapter(model, LORA, str(base), dtype, 0, ids)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in found.adapters():
            layer.lora_b.normal_(std=0.05, generator=generator)
        for parameter in found.rows.parameters() if found.rows else ():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return found


def model_of(found: TrainedAdapter) -> Any:
    return found._model


def batch(ids: tuple[int, ...]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Two rows in which every new token occurs, as input and as target."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 128, (2, 24), generator=generator)
    for place, token in enumerate(ids):
        tokens[0, 3 * place + 2] = tokens[1, 2 * place + 3] = token
    targets = torch.ones_like(tokens, dtype=torch.bool)
    targets[:, -1] = targets[1, 8:12] = False
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return inputs, targets, torch.roll(tokens, -1, 1)[targets]


def logits(model: Any, ids: tuple[int, ...] = GROWN) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batch(ids)[0], use_cache=False).logits
    return found


def whole(found: TrainedAdapter) -> dict[str, Tensor]:
    """The slow twin's weights by layer: whole matrices in which the rows stand, leaves of autograd."""
    assert found.rows is not None
    model, leaves = model_of(found), {}
    for name, rows in found.rows.by_layer().items():
        weight = model.get_submodule(name).weight.detach().clone()
        weight[found.rows.ids] = rows.detach().to(weight)
        leaves[name] = weight.requires_grad_()
    return leaves


def of_twin(found: TrainedAdapter, loss: Callable[[Any], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over whole matrices, and their gradients."""
    assert found.rows is not None
    model, rows, leaves = model_of(found), found.rows, whole(found)
    weights = {f"{name}.weight": leaf for name, leaf in leaves.items()}
    weights.setdefault(f"{names_of(model)[1]}.weight", next(iter(leaves.values())))
    rows.active = False
    value = loss(lambda **inputs: torch.func.functional_call(model, weights, kwargs=inputs, tie_weights=False))
    gradients = torch.autograd.grad(value, list(leaves.values()))
    rows.active = True
    return value.detach(), dict(zip(leaves, gradients, strict=True))


def names_of(model: Any) -> tuple[str, str]:
    """Of the embedding and the head."""
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]


@pytest.mark.parametrize("ids", [GROWN, SPARE, MIXED])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_have_the_gradient_that_autograd_gives_them_in_a_whole_matrix(
    bases: Bases, name: str, ids: tuple[int, ...]
) -> None:
    found = trained(bases(name), ids)
    assert found.rows is not None
    rows, parts = found.rows.by_layer(), batch(ids)
    assert len(rows) == (1 if TIED[name] else 2)
    value = plain_loss(model_of(found), *parts)
    loss = value.detach()
    gradients = dict(zip(rows, torch.autograd.grad(value, list(rows.values())), strict=True))
    expected, wanted = of_twin(found, lambda call: plain_loss(call, *parts))
    assert float((loss - expected).abs() / expected) < 1e-5
    for layer, gradient in gradients.items():
        assert gradient.norm() > 0
        assert (gradient - wanted[layer][list(ids)]).norm() / gradient.norm() < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_chunked_loss_trains_rows_as_the_models_own_forward_does(
    bases: Bases, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    found = trained(bases(name), MIXED, dtype)
    model, parts, parameters = model_of(found), batch(MIXED), list(found.named().values())
    assert found.rows is not None
    assert len(parameters) == 2 * len(found.adapters()) + (1 if TIED[name] else 2)
    assert isinstance(chunked_loss(model, *parts), ChunkedLoss)
    for loss in (ChunkedLoss(model, chunk=64), ChunkedLoss(model)):
        ours, theirs = loss(*parts), plain_loss(model, *parts)
        assert float((ours - theirs).detach().abs() / theirs.detach()) < tolerance
        pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
        gaps = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs if b.norm() > 0]
        assert len(gaps) == len(parameters)
        assert max(gaps[-2:]) < tolerance
    with torch.no_grad():
        assert not ChunkedLoss(model)(*parts).requires_grad


def test_the_engine_trains_rows_fast_and_a_loss_that_overlooks_them_is_noticed(bases: Bases) -> None:
    found = trained(bases("qwen2-tied"), GROWN)
    engine = build_engine(model_of(found), found.adapters(), compiled=False)
    loss, parts = engine.loss, batch(GROWN)
    assert isinstance(loss, ChunkedLoss)
    assert difference(model_of(found), loss, *parts) < 1e-5
    loss.head = replace(loss.head, rows=None)
    assert difference(model_of(found), loss, *parts) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_begin_as_the_mean_and_no_frozen_row_changes_while_they_are_trained(bases: Bases, name: str) -> None:
    plain = load(bases(name))
    before = {name: plain.get_submodule(name).weight.detach().clone() for name in names_of(plain)}
    model = load(bases(name))
    found = TrainedAdapter(model, LORA, "base", torch.float32, 0, MIXED)
    assert found.rows is not None
    assert model.config.get_text_config().vocab_size == 129
    for layer, rows in found.rows.by_layer().items():
        mean = before[layer].double().mean(0)
        assert (rows.detach().double() - mean).abs().max() < 1e-6
    loss, parts = ChunkedLoss(model), batch(MIXED)
    optimizer = torch.optim.AdamW(found.named().values(), lr=1e-2)
    first = loss(*parts)
    for _ in range(3):
        optimizer.zero_grad()
        loss(*parts).backward()
        optimizer.step()
    assert loss(*parts) < first
    for layer, weight in before.items():
        now = model.get_submodule(layer).weight
        assert torch.equal(now[:128], weight)
        assert not now.requires_grad
    for layer, rows in found.rows.by_layer().items():
        assert ((rows - before[layer].mean(0)).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("ids", [GROWN, SPARE, MIXED])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_the_saved_adapter_and_gives_the_same_logits(
    bases: Bases, tmp_path: Path, name: str, ids: tuple[int, ...]
) -> None:
    found = trained(bases(name), ids)
    found.save(tmp_path / "adapter", lambda staging: None)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(bases(name), quantization_config=config, dtype=torch.float32)
    keep_packed_format(plain)
    if ids[-1] >= 128:
        plain.resize_token_embeddings(ids[-1] + 1)
    before = logits(plain, ids)
    theirs = logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")), ids)
    ours = logits(model_of(found), ids)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-3
    assert (before - theirs)[..., list(ids)].abs().max() > 0.1, "the rows must matter, or the comparison shows nothing"


def test_peft_loads_it_onto_a_base_in_sixteen_bits(bases: Bases, tmp_path: Path) -> None:
    found = trained(bases("llama"), GROWN, torch.bfloat16, "none")
    found.save(tmp_path / "adapter", lambda staging: None)
    plain = AutoModelForCausalLM.from_pretrained(bases("llama"), dtype=torch.bfloat16)
    plain.resize_token_embeddings(131)
    theirs = logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))).float()
    ours = logits(model_of(found)).float()
    assert (ours - theirs).norm() / theirs.norm() < 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_read_back_is_the_one_that_was_saved(bases: Bases, tmp_path: Path, name: str) -> None:
    found = trained(bases(name), MIXED)
    found.save(tmp_path / "adapter", lambda staging: None)
    embedding, head = names_of(model_of(found))
    layers = [embedding] if TIED[name] else [embedding, head]
    config, tensors = read_adapter(tmp_path / "adapter")
    assert config["trainable_token_indices"] == {layer: list(MIXED) for layer in layers}
    keys = {key for key in tensors if "token_adapter" in key}
    assert keys == {f"base_model.model.{layer}.token_adapter.trainable_tokens_delta" for layer in layers}
    other = load(bases(name))
    put_adapter(other, LORA, torch.float32, tmp_path / "adapter")
    assert torch.equal(logits(other, MIXED), logits(model_of(found), MIXED))


def test_a_snapshot_brings_rows_back(bases: Bases) -> None:
    found = trained(bases("llama"), GROWN)
    expected, kept = logits(model_of(found)), found.snapshot()
    with torch.no_grad():
        for parameter in found.named().values():
            parameter.zero_()
    assert not torch.equal(logits(model_of(found)), expected)
    found.restore(kept)
    assert torch.equal(logits(model_of(found)), expected)


def test_an_adapter_without_new_tokens_is_written_as_ever(bases: Bases, tmp_path: Path) -> None:
    found = trained(bases("llama"), ())
    found.save(tmp_path / "now", lambda staging: None)
    model = load(bases("llama"))
    layers = attach(model, LORA, torch.float32, 0)
    load_into(layers, found.snapshot(), tmp_path)
    config = adapter_config(model, layers, LORA, str(bases("llama")))
    save_adapter(tmp_path / "then", adapter_tensors(layers), config, lambda staging: None)
    assert "trainable_token_indices" not in config
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "now" / file).read_bytes() == (tmp_path / "then" / file).read_bytes()


@pytest.mark.parametrize("change", ["tensor missing", "tensor too many", "shape", "no ids"])
def test_rows_and_ids_that_do_not_fit_one_another_are_refused(bases: Bases, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "adapter"
    trained(bases("llama"), GROWN).save(folder, lambda staging: None)
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    key = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    if change == "tensor missing":
        del tensors[key]
    elif change == "tensor too many":
        tensors[key.replace("lm_head", "extra")] = tensors[key].clone()
    elif change == "shape":
        tensors[key] = tensors[key][:2].clone()
    else:
        del config["trainable_token_indices"]
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="token_adapter"):
        put_adapter(load(bases("llama")), LORA, torch.float32, folder)


@pytest.mark.parametrize(
    "said", [[5], {}, {"a": []}, {"a": [3, 2]}, {"a": [2, 2]}, {"a": [1], "b": [2]}, {"a": [True]}, {"a": ["1"]}, "1"]
)
def test_ids_that_were_not_written_here_are_refused(said: Any) -> None:
    with pytest.raises(ModelError, match="trainable_token_indices is not as qlora wrote it"):
        token_ids({"trainable_token_indices": said}, Path("adapter"))


@pytest.mark.parametrize("ids", [(129,), (128, 130), (5, 140)])
def test_a_row_without_a_token_between_base_and_new_ones_is_refused(bases: Bases, ids: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="do not fit an embedding of 128 rows"):
        add_rows(load(bases("llama")), ids, torch.float32)


def test_models_whose_rows_peft_would_compute_otherwise_are_refused_by_name() -> None:
    heads = {"bias": tf.PhiConfig(**SMALL), "its head": tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=1)}
    with pytest.raises(ModelError, match="its head has a bias"):
        Vocabulary(AutoModelForCausalLM.from_config(heads["bias"]))
    model = AutoModelForCausalLM.from_config(heads["its head"])
    Vocabulary(model)
    model.config.tie_word_embeddings = False
    with pytest.raises(ModelError, match="share a weight, against its configuration"):
        Vocabulary(model)
    model.config.tie_word_embeddings = True
    model.get_input_embeddings().forward = lambda ids: torch.zeros(*ids.shape, 32)
    with pytest.raises(ModelError, match="does more than to look rows up"):
        add_rows(model, (64,), torch.float32)


def test_without_the_adapter_a_model_knows_no_more_of_a_new_token_than_the_mean(bases: Bases) -> None:
    found = trained(bases("llama"), GROWN)
    plain = load(bases("llama"))
    plain.resize_token_embeddings(131, mean_resizing=False)
    with torch.no_grad():
        for name in names_of(plain):
            weight = plain.get_submodule(name).weight
            weight[128:] = weight[:128].mean(0)
    with without_adapter(model_of(found)):
        assert torch.allclose(logits(model_of(found)), logits(plain), atol=1e-5)
    assert not torch.allclose(logits(model_of(found)), logits(plain), atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_of_several_adapters_take_turns_on_one_base(bases: Bases, name: str) -> None:
    model, sets = load(bases(name)), {"a": GROWN, "b": (17, 128), "c": ()}
    bare = logits(model, SPARE)
    weights = [model.get_submodule(layer).weight.detach().clone() for layer in names_of(model)]
    switch = TokenSwitch(model)
    for adapter, ids in sets.items():
        rows = switch.add(adapter, ids, torch.float32)
        assert (rows is None) == (adapter == "c")
        if rows is not None:
            torch.nn.init.normal_(rows.embedding)
    expected: dict[str, Tensor] = {}
    for adapter, size in (("a", 131), ("b", 129), ("c", 128), ("b", 129), ("a", 131)):
        switch.use(adapter)
        found = logits(model, SPARE)
        assert found.shape[-1] == model.config.get_text_config().vocab_size == size
        assert torch.equal(found, expected.setdefault(adapter, found))
    assert torch.equal(expected["c"], bare)
    assert not torch.equal(expected["b"][..., :128], bare)
    switch.use(None)
    assert rows_of(model) is None
    assert logits(model).shape[-1] == 131
    assert torch.allclose(logits(model, SPARE)[..., :128], bare, atol=1e-5)
    for layer, weight in zip(names_of(model), weights, strict=True):
        assert torch.equal(model.get_submodule(layer).weight[:128], weight)


def test_a_base_is_not_looked_at_for_adapters_without_new_tokens() -> None:
    switch = TokenSwitch(None)
    assert switch.add("a", (), torch.float32) is None
    switch.use("a")
    switch.use(None)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_a_model_of_which_every_weight_is_trained_is_saved_with_its_new_rows(
    bases: Bases, tmp_path: Path, name: str
) -> None:
    model = load(bases(name), kind="none")
    frozen = model.get_input_embeddings().weight.detach().clone()
    found = TrainedModel(model, MIXED)
    rows = model.get_input_embeddings().weight[list(MIXED)]
    assert torch.allclose(rows, frozen.mean(0).expand(2, -1), atol=1e-6)
    loss = plain_loss(model, *batch(MIXED))
    torch.optim.SGD(found.named().values(), lr=0.1).zero_grad()
    loss.backward()
    torch.optim.SGD(found.named().values(), lr=0.1).step()
    found.save(tmp_path / "model", lambda staging: None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert again.config.vocab_size == 129
    assert torch.equal(logits(again, MIXED), logits(model, MIXED))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_bare_base_with_room_knows_no_more_of_new_tokens_than_the_mean(bases: Bases, name: str) -> None:
    model = load(bases(name))
    weights = [model.get_submodule(layer).weight for layer in names_of(model)]
    bare = logits(model, SPARE)
    make_room(model, 128)
    pairs = zip(names_of(model), weights, strict=True)
    assert all(model.get_submodule(layer).weight is weight for layer, weight in pairs)
    make_room(model, 131)
    assert logits(model, GROWN).shape[-1] == model.config.vocab_size == 131
    assert torch.allclose(logits(model, SPARE)[..., :128], bare, atol=1e-5)
    for layer, weight in zip(names_of(model), weights, strict=True):
        now = model.get_submodule(layer).weight
        assert torch.equal(now[:128], weight)
        assert torch.allclose(now[128:], weight.mean(0).expand(3, -1), atol=1e-6)


def test_widening_for_no_token_leaves_a_model_alone(bases: Bases) -> None:
    model = load(bases("llama"), kind="none")
    before = model.get_input_embeddings().weight
    widen(model, ())
    assert add_rows(model, (), torch.float32) is None
    assert model.get_input_embeddings().weight is before


def test_only_rows_are_parameters_of_the_rows(bases: Bases) -> None:
    rows = add_rows(load(bases("llama")), GROWN, torch.float32)
    assert isinstance(rows, TokenRows)
    assert {name: tuple(p.shape) for name, p in rows.named_parameters()} == {"embedding": (3, 64), "head": (3, 64)}
    assert rows.size == 131
