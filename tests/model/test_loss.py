"""The chunked loss against plain autograd over the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_cli.model.base import load_base
from qlora_cli.model.chunked import ChunkedLoss, chunked_loss, difference, why_not
from qlora_cli.model.folder import find_base
from qlora_cli.model.head import Head, chunk_rows, head_loss
from qlora_cli.model.lora import LoraLinear, attach
from qlora_cli.model.loss import loss_sum, plain_loss
from qlora_cli.model.nf4 import four_bit_layers
from qlora_cli.recipe.schema import LoraSection, ModelSection, QuantizationSection
from tests.conftest import make_llama

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
NEOX = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied": lambda: tf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**SMALL, head_dim=32),
    "gemma2": lambda: tf.Gemma2Config(**SMALL, head_dim=32, final_logit_softcapping=5.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**SMALL, head_dim=32, final_logit_softcapping=5.0),
    "gemma3-vision": lambda: tf.Gemma3Config(
        text_config={**SMALL, "head_dim": 32, "sliding_window": 16},
        vision_config=VISION | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=100,
        boi_token_index=101,
        eoi_token_index=102,
    ),
    "mistral": lambda: tf.MistralConfig(**SMALL, sliding_window=8),
    "mixtral": lambda: tf.MixtralConfig(**SMALL, num_local_experts=2),
    "phi3": lambda: tf.Phi3Config(**SMALL),
    "phi": lambda: tf.PhiConfig(**SMALL),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**NEOX),
    "cohere": lambda: tf.CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: tf.GraniteConfig(**SMALL, logits_scaling=4.0),
}
HEADS = {
    "gemma2": (1.0, 5.0),
    "gemma3": (1.0, 5.0),
    "cohere": (0.25, None),
    "granite": (0.25, None),
}
TOLERANCES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]

Batch = tuple[dict[str, Any], Tensor, Tensor]


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, list[nn.Parameter]]:
    """A tiny model whose logits are far apart, with adapters whose B is not zero, and their parameters."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)
    head = model.get_output_embeddings()
    nn.init.normal_(head.weight, std=0.4)
    if head.bias is not None:
        nn.init.normal_(head.bias)
    layers = attach(model, LoraSection(r=2, alpha=4), dtype, seed=0)
    for layer in layers.values():
        nn.init.normal_(layer.lora_b, std=0.1)
    return model.train(), parameters_of(layers)


def parameters_of(layers: dict[str, LoraLinear]) -> list[nn.Parameter]:
    """Two for each adapter."""
    return [parameter for layer in layers.values() for parameter in (layer.lora_a, layer.lora_b)]


def make_batch(rows: int = 6, columns: int = 40) -> Batch:
    """Padded rows, about half of whose tokens are targets."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 320, (rows, columns), generator=generator)
    attention = (torch.arange(columns) < columns - 3 * torch.arange(rows).unsqueeze(1)).long()
    targets = (torch.rand(rows, columns, generator=generator) < 0.5) & attention.bool()
    return {"input_ids": ids, "attention_mask": attention}, targets, torch.roll(ids, -1, 1)[targets]


def backward(loss: Callable[..., Tensor], parameters: list[nn.Parameter], batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient in one vector; dropout draws the same each time."""
    torch.manual_seed(2)
    value = loss(*batch)
    gradient = torch.autograd.grad(value, parameters)
    return value.detach(), torch.cat([each.flatten().float() for each in gradient])


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative."""
    return float((found - wanted).norm() / wanted.norm())


def plain(model: Any) -> Callable[..., Tensor]:
    """The slow twin."""
    return lambda *batch: plain_loss(model, *batch)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_plain_autograd(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, parameters = make(name, dtype)
    batch = make_batch()
    chunked = ChunkedLoss(model, chunk=64)
    assert len(batch[2]) % 64 > 0
    assert len(batch[2]) > 64
    assert (chunked.head.scale, chunked.head.cap) == HEADS.get(name, (1.0, None))
    loss, gradient = backward(chunked, parameters, batch)
    expected, wanted = backward(plain(model), parameters, batch)
    assert loss.dtype == torch.float32
    assert gap(loss, expected) < tolerance
    assert gap(gradient, wanted) < tolerance
    assert isinstance(chunked_loss(model, *batch), ChunkedLoss)


def test_the_tiny_heads_are_of_each_kind() -> None:
    models = {name: make(name)[0] for name in ("llama", "llama-tied", "phi", "gpt2")}
    tied = {name for name, m in models.items() if m.get_output_embeddings().weight is m.get_input_embeddings().weight}
    assert tied == {"llama-tied", "gpt2"}
    assert models["phi"].get_output_embeddings().bias.norm() > 0


def test_a_packed_row_has_the_loss_of_the_models_own_forward() -> None:
    model, parameters = make("llama")
    ids = make_batch()[0]["input_ids"].view(1, -1)[:, :60]
    targets = torch.arange(60).view(1, -1) % 20 > 8
    positions = (torch.arange(60) % 20).view(1, -1)
    batch = ({"input_ids": ids, "position_ids": positions}, targets, torch.roll(ids, -1, 1)[targets])
    loss, gradient = backward(ChunkedLoss(model), parameters, batch)
    expected, wanted = backward(plain(model), parameters, batch)
    assert gap(loss, expected) < 1e-5
    assert gap(gradient, wanted) < 1e-5
    assert gap(loss, loss_sum(model, ids, torch.ones_like(ids), targets, batch[2]).detach()) > 1e-3


def test_under_autocast_it_computes_in_the_type_of_autocast() -> None:
    model, parameters = make("gemma2")
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = backward(ChunkedLoss(model), parameters, batch)
        expected, wanted = backward(plain(model), parameters, batch)
        assert isinstance(chunked_loss(model, *batch), ChunkedLoss)
    exact, _ = backward(ChunkedLoss(model), parameters, batch)
    assert loss.dtype == torch.float32
    assert gap(loss, expected) < 1e-6
    assert gap(loss, exact) > 1e-5
    assert gap(gradient, wanted) < 1e-2


def make_head(vocabulary: int = 256, width: int = 32, bias: bool = True, **changes: Any) -> Head:
    """A frozen random head."""
    torch.manual_seed(3)
    return Head(nn.Linear(width, vocabulary, bias=bias).requires_grad_(False), **changes)


def exact_loss(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    """The formula, in float64."""
    layer = head.layer
    logits = head.scale * nn.functional.linear(hidden, layer.weight.double(), layer.bias.double())
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("changes", [{}, {"scale": 3.0}, {"cap": 0.5}, {"scale": 3.0, "cap": 0.5}])
def test_the_sum_and_its_gradient_depend_on_no_chunk_size(count: int, changes: dict[str, Any]) -> None:
    head = make_head(**changes)
    labels = torch.randint(0, 256, (count,))
    precise = (3 * torch.randn(count, 32, dtype=torch.float64)).requires_grad_()
    exact = exact_loss(head, precise, labels)
    exact.backward()
    for rows in (64, 128, 256):
        hidden = precise.detach().float().requires_grad_()
        loss = head_loss(head, hidden, labels, rows)
        loss.backward()
        assert hidden.grad is not None
        assert precise.grad is not None
        torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(hidden.grad.double(), precise.grad, rtol=1e-5, atol=1e-5)


def test_backward_scales_the_gradient_each_time_it_is_asked_for() -> None:
    head = make_head()
    hidden = torch.randn(70, 32, requires_grad=True)
    loss = head_loss(head, hidden, torch.arange(70), 64)
    (whole,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (quarter,) = torch.autograd.grad(loss * 0.25, hidden)
    torch.testing.assert_close(quarter, whole * 0.25)


class Record(TorchDispatchMode):
    """Sizes of the tensors that operations gave, and how many of those were matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [each for each in torch.utils._pytree.tree_leaves(found) if isinstance(each, Tensor)]
        self.largest = max([self.largest, *(each.numel() for each in tensors)])
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"cap": 0.5}])
def test_no_more_logits_exist_at_once_than_those_of_a_chunk(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    head = make_head(vocabulary=1024, width=16, **changes)
    head.layer.to(dtype)
    hidden = torch.randn(640, 16, dtype=dtype, requires_grad=True)
    with Record() as record:
        head_loss(head, hidden, torch.arange(640), 64).backward()
    assert record.largest == 64 * 1024
    with Record() as record:
        nn.functional.cross_entropy(head.layer(hidden).float(), torch.arange(640), reduction="sum").backward()
    assert record.largest == 640 * 1024


def test_without_gradients_only_the_logits_are_multiplied() -> None:
    head = make_head()
    hidden, labels = torch.randn(150, 32, requires_grad=True), torch.arange(150)
    with Record() as record:
        learning = head_loss(head, hidden, labels, 64)
    assert record.products == 6
    with torch.no_grad(), Record() as record:
        reading = head_loss(head, hidden, labels, 64)
    assert record.products == 3
    assert not reading.requires_grad
    assert torch.equal(reading, learning)


def test_evaluation_under_no_grad_gives_the_loss_of_training() -> None:
    model, parameters = make("llama")
    batch = make_batch()
    with torch.no_grad():
        loss = ChunkedLoss(model)(*batch)
    assert not loss.requires_grad
    assert torch.equal(loss, backward(ChunkedLoss(model), parameters, batch)[0])


def test_without_a_target_the_loss_is_zero_and_so_is_its_gradient() -> None:
    model, parameters = make("llama")
    inputs, targets, labels = make_batch()
    loss, gradient = backward(ChunkedLoss(model), parameters, (inputs, torch.zeros_like(targets), labels[:0]))
    assert loss == 0
    assert gradient.numel() > 0
    assert not gradient.any()


class DividesLogits(tf.LlamaForCausalLM):
    """Does to its logits what no table knows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Llama's, divided by 3."""
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 3
        return output


class ScalesEmbeddings(tf.LlamaForCausalLM):
    """Does something before its decoder."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Llama's, of other embeddings."""
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) * 3, **kwargs)


class SkipsItsHead(tf.LlamaForCausalLM):
    """Multiplies with its head's weight without calling the head."""

    def forward(self, logits_to_keep: Any, **kwargs: Any) -> Any:
        """Llama's."""
        hidden = self.model(**kwargs).last_hidden_state[:, logits_to_keep]
        return tf.modeling_outputs.CausalLMOutput(logits=nn.functional.linear(hidden, self.lm_head.weight))


@pytest.mark.parametrize("odd", [DividesLogits, ScalesEmbeddings, SkipsItsHead])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_a_model_that_works_otherwise_is_found_out(odd: Any, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = odd(CONFIGS["llama"]()).to(dtype).requires_grad_(False)
    assert why_not(model) is None
    assert difference(model, ChunkedLoss(model), *make_batch()) > 10 * tolerance
    assert "its own loss differs" in str(chunked_loss(model, *make_batch()))


def test_a_scale_that_means_something_else_is_found_out() -> None:
    model, _ = make("llama")
    model.config.logits_scaling = 2.0
    assert "its own loss differs" in str(chunked_loss(model, *make_batch()))


def test_inputs_that_only_the_whole_model_takes_are_no_crash() -> None:
    model, _ = make("llama")
    usual = model.model.forward
    model.model.forward = lambda input_ids, use_cache: usual(input_ids=input_ids, use_cache=use_cache)
    assert difference(model, ChunkedLoss(model), *make_batch()) == float("inf")


@pytest.mark.parametrize("training", [False, True])
def test_the_check_leaves_no_trace(training: bool) -> None:
    model, parameters = make("gpt2")
    model.train(training)
    parameters[0].grad = torch.ones_like(parameters[0])
    model.transformer.register_forward_pre_hook(lambda *_: torch.rand(1).fill_(0).sum().item() or None)  # a draw
    random = torch.get_rng_state()
    with torch.no_grad():
        assert isinstance(chunked_loss(model, *make_batch()), ChunkedLoss)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training is training
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert [parameter for parameter in parameters[1:] if parameter.grad is not None] == []
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_head_that_is_trained_or_no_linear_layer_is_refused_with_a_reason() -> None:
    assert why_not(make_llama()) == "its head is trained"
    frozen = make_llama(tie_word_embeddings=False).requires_grad_(False)
    assert why_not(frozen) is None
    assert why_not(frozen.model) == "it has no head of its own"
    frozen.lm_head = LoraLinear(frozen.lm_head, 2, 1.0, 0.0, torch.float32)
    assert why_not(frozen) == "its head is no plain linear layer but LoraLinear"


def test_a_model_without_a_decoder_of_its_own_is_refused() -> None:
    model = make_llama().requires_grad_(False)
    assert why_not(model) is None
    model.base_model_prefix = "none"
    assert why_not(model) == "its decoder is not apart from its head"


def test_on_a_base_in_4_bits_it_agrees_and_a_head_in_4_bits_is_refused(base: Path) -> None:
    section = ModelSection(base=str(base))
    quantization = QuantizationSection.model_validate({"type": "nf4"})
    model = load_base(find_base(str(base), None), section, quantization, torch.bfloat16, torch.device("cpu"))
    batch = make_batch()
    batch = ({name: values % 261 for name, values in batch[0].items()}, batch[1], batch[2] % 261)
    assert isinstance(chunked_loss(model, *batch), ChunkedLoss)
    layer = next(iter(four_bit_layers(model).values()))
    model.set_output_embeddings(layer)
    assert why_not(model) == "its head is no plain linear layer but Linear4bit"


def test_a_chunk_has_rows_by_the_size_of_the_vocabulary() -> None:
    sizes = (1000, 16_384, 32_000, 65_536, 128_256, 262_144)
    assert [chunk_rows(size, "cpu") for size in sizes] == [256, 256, 256, 128, 128, 128]
    assert [chunk_rows(size, "cuda") for size in sizes] == [1024, 1024, 1024, 512, 256, 128]
    assert ChunkedLoss(make("llama")[0]).chunk == 256
