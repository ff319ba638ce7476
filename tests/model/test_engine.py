"""The engine against its slow twin on tiny 4-bit models of many architectures, and what it does with odd ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from qlora_cli.cli.app import main
from qlora_cli.data.batches import MicroBatch, collate, join
from qlora_cli.data.encode import Encoded
from qlora_cli.model.base import set_checkpointing
from qlora_cli.model.engine import PACKED, Engine, build_engine, plain_engine
from qlora_cli.model.lora import LoraLinear, attach
from qlora_cli.model.segments import ATTENTION
from qlora_cli.recipe.schema import LoraSection
from tests.conftest import RECIPE
from tests.model import test_loss
from tests.model.test_lora import adapted, load
from tests.training.test_loop import run

SMALL = test_loss.SMALL | {"initializer_range": 0.15}
WINDOWS: dict[str, Any] = {"head_dim": 32, "sliding_window": 6}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "llama-tied": lambda: tf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-biased": lambda: tf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: tf.Qwen3Config(**SMALL, head_dim=32),
    "gemma2": lambda: tf.Gemma2Config(**SMALL, **WINDOWS, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**SMALL, **WINDOWS, layer_types=["sliding_attention", "full_attention"]),
    "mistral": lambda: tf.MistralConfig(**SMALL, sliding_window=6),
    "phi3": lambda: tf.Phi3Config(**SMALL),
    "gpt2": lambda: tf.GPT2Config(**test_loss.GPT2, initializer_range=0.15, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**test_loss.NEOX, initializer_range=0.15),
}
PARTS = {
    "llama": ("14 of 14 projections fused in 8 groups", "5 norms and 2 gated activations"),
    "llama-tied": ("14 of 14 projections fused in 8 groups", "5 norms and 2 gated activations"),
    "llama-biased": ("14 of 14 projections fused in 8 groups", "5 norms and 2 gated activations"),
    "qwen3": ("14 of 14 projections fused in 8 groups", "9 norms and 2 gated activations"),
    "gemma2": ("14 of 14 projections fused in 8 groups", "9 norms and 2 gated activations"),
    "gemma3": ("14 of 14 projections fused in 8 groups", "13 norms and 2 gated activations"),
    "mistral": ("14 of 14 projections fused in 8 groups", "5 norms and 2 gated activations"),
    "phi3": ("8 of 8 projections fused in 8 groups", "5 norms and 0 gated activations"),
    "gpt2": ("8 of 8 projections fused in 8 groups", None),
    "gpt-neox": ("8 of 8 projections fused in 8 groups", None),
}
LENGTHS = (31, 17, 9, 4, 2)


def row(length: int, index: int) -> Encoded:
    """Random tokens, about half of which carry loss, the last one always."""
    generator = np.random.default_rng(index)
    loss = generator.random(length) < 0.5
    loss[-1] = True
    return Encoded(generator.integers(3, 320, length).astype(np.int32), loss, f"rows.jsonl:{index + 1}")


ROWS = [row(length, i) for i, length in enumerate(LENGTHS)]
PADDED, PACK = collate(ROWS, 16), join(ROWS, 64)


@cache
def folder_of(name: str, parent: Path) -> Path:
    """A random base whose biases and norms are not what they were created as."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(parent / name)
    return parent / name


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives the folder of a base by its name."""
    parent = tmp_path_factory.mktemp("bases")
    return lambda name: folder_of(name, parent)


def trained(
    folder: Path, dtype: torch.dtype = torch.float32, kind: str = "nf4", **lora: Any
) -> tuple[Any, list[LoraLinear]]:
    """A base with adapters whose B is not zero, in training mode."""
    model = load(folder, dtype, kind)
    return model.train(), with_adapters(model, dtype, **lora)


def with_adapters(model: Any, dtype: torch.dtype = torch.float32, **lora: Any) -> list[LoraLinear]:
    """Adapters whose B is not zero."""
    layers = list(attach(model, LoraSection(**({"r": 4, "alpha": 8} | lora)), dtype, seed=3).values())
    torch.manual_seed(5)
    for layer in layers:
        nn.init.normal_(layer.lora_b, std=0.1)
    return layers


def measured(engine: Engine, layers: list[LoraLinear], batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient in one vector; dropout draws the same each time."""
    torch.manual_seed(2)
    loss = engine.loss(batch.inputs, batch.targets, batch.labels)
    found = torch.autograd.grad(loss, [factor for layer in layers for factor in (layer.lora_a, layer.lora_b)])
    return loss.detach(), torch.cat([each.flatten().double() for each in found])


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def by_name(engine: Engine) -> dict[str, tuple[bool, str]]:
    """Each part: whether it is in use, and its words."""
    return {part.name: (part.used, part.detail) for part in engine.parts}


@pytest.mark.parametrize("name", CONFIGS)
def test_with_every_fast_part_loss_and_gradients_are_those_of_the_model_itself(
    name: str, bases: Callable[[str], Path]
) -> None:
    model, layers = trained(bases(name))
    wanted = measured(plain_engine(model), layers, PADDED)
    engine = build_engine(model, layers, compiled=False)
    fused, short = PARTS[name]
    without = (False, "the model has none that are known")
    assert by_name(engine) == {
        PACKED: (True, PACKED),
        "chunked loss": (True, "loss at target tokens in chunks"),
        "fused projections": (True, fused),
        "fused norms and gates": (True, f"{short} fused (not compiled)") if short else without,
    }
    assert engine.packs
    assert model.get_decoder().config._attn_implementation == ATTENTION
    for batch in (PADDED, PACK):
        loss, gradient = measured(engine, layers, batch)
        assert gap(loss, wanted[0]) < 1e-5
        assert gap(gradient, wanted[1]) < 1e-4


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_in_sixteen_bits_gradients_are_as_close_to_the_truth_as_the_models_own(
    name: str, compiled: bool, bases: Callable[[str], Path]
) -> None:
    model, layers = trained(bases(name), torch.bfloat16, kind="none")
    own = measured(plain_engine(model), layers, PADDED)
    engine = build_engine(model, layers, compiled=compiled)
    ours = [measured(engine, layers, batch) for batch in (PADDED, PACK)]
    assert all(by_name(engine)[part][0] for part in (PACKED, "chunked loss", "fused projections"))
    true_model, true_layers = trained(bases(name), kind="none")
    true_model.load_state_dict(model.float().state_dict())
    exact = measured(plain_engine(true_model), true_layers, PADDED)
    for loss, gradient in ours:
        assert gap(loss, exact[0]) < 1.5e-2
        assert gap(gradient, exact[1]) < 1.5 * gap(own[1], exact[1])


@pytest.mark.parametrize("name", ["llama-biased", "gemma3", "gpt2"])
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_with_dropout_checkpointing_and_rank_stabilisation_the_same_masks_give_the_same_gradients(
    name: str, checkpointing: str, bases: Callable[[str], Path]
) -> None:
    model, layers = trained(bases(name), dropout=0.3, rslora=True)
    wanted = measured(plain_engine(model), layers, PADDED)
    set_checkpointing(model, checkpointing)
    model.train()
    engine = build_engine(model, layers, compiled=False)
    assert by_name(engine)["fused projections"][0]
    loss, gradient = measured(engine, layers, PADDED)
    assert gap(loss, wanted[0]) < 1e-5
    assert gap(gradient, wanted[1]) < 1e-4
    assert gap(measured(engine, layers, PACK)[1], wanted[1]) > 1e-2  # other positions, other masks


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_in_four_bits_and_sixteen_every_part_is_in_use(name: str, compiled: bool, bases: Callable[[str], Path]) -> None:
    model, layers = trained(bases(name), torch.bfloat16)
    wanted = measured(plain_engine(model), layers, PADDED)
    engine = build_engine(model, layers, compiled=compiled)
    used, detail = by_name(engine)["fused projections"]
    assert used
    assert detail in {PARTS[name][0], f"{PARTS[name][0]} and compiled"} if compiled else detail == PARTS[name][0]
    for batch in (PADDED, PACK):
        loss, gradient = measured(engine, layers, batch)
        assert gap(loss, wanted[0]) < 1.5e-2
        assert gap(gradient, wanted[1]) < 6e-2


def test_a_model_in_float16_uses_every_part(bases: Callable[[str], Path]) -> None:
    model, layers = trained(bases("qwen3"), torch.float16)
    wanted = measured(plain_engine(model), layers, PADDED)
    engine = build_engine(model, layers, compiled=False)
    assert engine.notes(packing=True) == []
    assert all(gap(measured(engine, layers, batch)[1], wanted[1]) < 1e-2 for batch in (PADDED, PACK))


def test_evaluation_without_gradients_has_the_loss_of_the_model_itself(bases: Callable[[str], Path]) -> None:
    model, layers = trained(bases("llama"), dropout=0.5)
    engine = build_engine(model, layers, compiled=False)
    model.eval()
    with torch.no_grad():
        found = [engine.loss(batch.inputs, batch.targets, batch.labels) for batch in (PADDED, PACK)]
    twin, _ = trained(bases("llama"))
    with torch.no_grad():
        wanted = plain_engine(twin.eval()).loss(PADDED.inputs, PADDED.targets, PADDED.labels)
    assert all(gap(loss, wanted) < 1e-5 and not loss.requires_grad for loss in found)


def test_without_adapters_only_loss_and_packing_are_tried(bases: Callable[[str], Path]) -> None:
    model = load(bases("llama"))
    wanted = plain_engine(model).loss(PADDED.inputs, PADDED.targets, PADDED.labels)
    engine = build_engine(model, (), compiled=True)
    assert [part.name for part in engine.parts] == [PACKED, "chunked loss"]
    assert engine.compile_seconds == 0
    assert gap(engine.loss(PACK.inputs, PACK.targets, PACK.labels), wanted) < 1e-5
    assert not model.training


def test_trying_leaves_no_trace(bases: Callable[[str], Path]) -> None:
    model, layers = trained(bases("llama-tied"), dropout=0.3)
    model.model.layers[0].eval()
    with torch.no_grad():
        layers[0].lora_b.zero_()
    layers[0].lora_a.grad = torch.ones_like(layers[0].lora_a)
    tensors = {name: each.detach().clone() for name, each in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert len(set(modes)) == 2
    assert by_name(build_engine(model, layers, compiled=False))["fused projections"][0]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(each, tensors[name]) for name, each in model.state_dict().items())
    gradients = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(gradients) == 1
    assert torch.equal(layers[0].lora_a.grad, torch.ones_like(layers[0].lora_a))
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(found):
            self.numbers = max(self.numbers, each.numel() if isinstance(each, Tensor) else 0)
        return found


def test_trying_joins_no_gradients_into_one(bases: Callable[[str], Path]) -> None:
    model, layers = trained(bases("llama"), r=64)
    with Largest() as largest:
        build_engine(model, layers, compiled=False)
    parameters = sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers)
    assert largest.numbers * 2 < parameters


class IgnoresBorders(LlamaAttention):
    """Hands no borders on to what computes it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Llama's, of one long row."""
        return super().forward(*args, **{name: each for name, each in kwargs.items() if not name.endswith("_q")})


class TwoFaced(LlamaRMSNorm):
    """Is what it seems for a matrix only."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Llama's; for whole batches twice that."""
        normed: Tensor = super().forward(hidden_states)
        return normed * (hidden_states.ndim - 1)


class ByKeyword(LlamaRMSNorm):
    """Is called with the name of its input."""

    def __call__(self, x: Tensor) -> Any:
        """Llama's."""
        return super().__call__(hidden_states=x)


class Doubles(nn.Linear):
    """A linear layer that does more than multiply."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice nn.Linear's."""
        return 2 * super().forward(x)


def odd_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.__class__ = IgnoresBorders


def odd_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.__class__ = TwoFaced


def odd_call(model: Any) -> None:
    model.model.layers[0].input_layernorm.__class__ = ByKeyword


def odd_linear(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.__class__ = Doubles


def odd_logits(model: Any) -> None:
    model.__class__ = test_loss.DividesLogits


@pytest.mark.parametrize(
    ("change", "part", "why"),
    [
        (odd_attention, PACKED, "packed rows see each other"),
        (odd_norm, "fused norms and gates", "gradients differ by "),
        (odd_call, "fused norms and gates", "TypeError: "),
        (odd_linear, "fused projections", "gradients differ by "),
        (odd_logits, "chunked loss", "its own loss differs from the chunked one"),
    ],
)
def test_a_part_that_does_not_fit_a_model_falls_back_alone_and_says_why(
    change: Callable[[Any], None], part: str, why: str
) -> None:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(CONFIGS["llama"]())
    change(model)
    layers = with_adapters(model.train())
    wanted = measured(plain_engine(model), layers, PADDED)
    engine = build_engine(model, layers, compiled=False)
    assert {name for name, (used, _) in by_name(engine).items() if not used} == {part}
    assert by_name(engine)[part][1].startswith(why)
    assert [note for note in engine.notes(packing=True) if note.startswith(f"without {part}: {why}")]
    assert len(engine.line(packing=True).split(", ")) == 3
    for batch in (PADDED, PACK) if engine.packs else (PADDED,):
        loss, gradient = measured(engine, layers, batch)
        assert gap(loss, wanted[0]) < 1e-5
        assert gap(gradient, wanted[1]) < 1e-4


class WrongForA(LoraLinear):
    """Has no gradient for A, which shows only where B is not zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Its own plain computation, or a wrong one where it is grouped."""
        if self.group is None:
            return self.plain(x)
        a = self.lora_a
        return self.plain(x) + 0 * a.sum() + (a - a.detach()).sum() * (self.lora_b * self.lora_b.detach()).sum()


def test_a_wrong_gradient_of_a_shows_although_b_begins_at_zero() -> None:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(CONFIGS["llama"]()).train()
    layers = with_adapters(model)
    for layer in layers:
        layer.__class__ = WrongForA
        nn.init.zeros_(layer.lora_b)
    engine = build_engine(model, layers, compiled=False)
    assert not by_name(engine)["fused projections"][0]
    assert all(layer.group is None and not layer.lora_b.any() for layer in layers)


def test_packing_is_mentioned_only_where_it_is_wanted() -> None:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(CONFIGS["llama"]())
    odd_attention(model)
    engine = build_engine(model, with_adapters(model), compiled=False)
    assert engine.notes(packing=False) == []
    assert len(engine.notes(packing=True)) == 1
    assert plain_engine(model).line(packing=False) == "the model's own forward"


def test_a_layer_that_two_modules_share_is_computed_by_both_as_it_stands() -> None:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(CONFIGS["llama"]())
    model.model.layers[1].mlp = model.model.layers[0].mlp
    layers = with_adapters(model.train())
    wanted = measured(plain_engine(model), layers, PADDED)
    engine = build_engine(model, layers, compiled=False)
    assert len(layers) == 11
    assert by_name(engine)["fused projections"] == (True, "8 of 11 projections fused in 4 groups")
    assert gap(measured(engine, layers, PADDED)[1], wanted[1]) < 1e-4


def test_the_gradients_of_micro_batches_add_up(bases: Callable[[str], Path]) -> None:
    model, layers = trained(bases("llama"))
    wanted = measured(plain_engine(model), layers, PADDED)[1]
    engine = build_engine(model, layers, compiled=False)
    for part in (join(ROWS[:2]), collate(ROWS[2:3]), join(ROWS[3:])):
        engine.loss(part.inputs, part.targets, part.labels).backward()
    found = [p.grad for layer in layers for p in (layer.lora_a, layer.lora_b)]
    assert gap(torch.cat([each.flatten() for each in found if each is not None]), wanted) < 1e-4


def test_a_run_with_all_fast_parts_has_the_losses_of_one_without_step_by_step(base: Path) -> None:
    plain, fast = (
        run(base, 30, {"dropout": 0.0}, packing=packing, lr=1e-3, micro_batch_size=3)[0] for packing in (False, True)
    )
    assert len(plain) == len(fast) == 30
    assert plain[-1].loss < 0.99 * plain[0].loss
    for slow, quick in zip(plain, fast, strict=True):
        assert quick.loss == pytest.approx(slow.loss, rel=1e-4)
        assert quick.grad_norm == pytest.approx(slow.grad_norm, rel=1e-2)
        assert quick.targets == slow.targets
    assert sum(each.positions for each in fast) < sum(each.positions for each in plain)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_runs_by_recipe_have_the_same_losses_packed_and_padded(
    dropout: float, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_file(RECIPE.replace("alpha: 8", f"alpha: 8, dropout: {dropout}"))
    common = ["-s", "train.steps=12", "-s", "train.lr=1e-3", "-s", "model.compile=off", "-s"]
    lines = []
    for packing in ("false", "true"):
        path = tmp_path / packing
        assert main(["train", str(recipe), "-o", str(path), "-q", *common, f"train.packing={packing}"]) == 0
        lines.append([json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()])
    losses = [[line["loss"] for line in each] for each in lines]
    assert len(losses[0]) == len(losses[1]) > 12
    same = losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert same is (dropout == 0)  # dropout draws by position, and a packed row stands elsewhere


def test_the_tiny_base_of_other_tests_uses_every_part(base: Path) -> None:
    model, layers = adapted(base)
    assert build_engine(model, list(layers.values()), compiled=False).notes(packing=True) == []
