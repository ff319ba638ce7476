"""Packed rows equal rows apart: the formula against dense masks, models against themselves, and the check itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_cli.model import attention_math
from qlora_cli.model.attention_math import Rule, attend
from qlora_cli.model.base import set_checkpointing
from qlora_cli.model.packing import Packing, find_packing, packed_arguments, why_not_packed
from qlora_cli.model.segments import ATTENTION, keep_soft_cap, segments_attention, using_attention

LENGTHS = (9, 1, 20, 14)
"""Rows longer than the windows of the models below, and one of a single token."""
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
}
GPT2 |= {"eos_token_id": 2, "initializer_range": 0.2}
GPT_OSS: dict[str, Any] = {"head_dim": 32, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 2}
MIXED = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "qwen3": lambda: tf.Qwen3Config(**SMALL, head_dim=32),
    "gemma2": lambda: tf.Gemma2Config(**SMALL, head_dim=32, sliding_window=4, attn_logit_softcapping=2.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**SMALL, head_dim=32, sliding_window=4, layer_types=MIXED),
    "mistral": lambda: tf.MistralConfig(**SMALL, sliding_window=4),
    "phi3": lambda: tf.Phi3Config(**SMALL),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**{**SMALL, "num_key_value_heads": None}),
    "gpt-oss": lambda: tf.GptOssConfig(**SMALL, **GPT_OSS, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
}
OFF = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
CPU = torch.device("cpu")


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").to(dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):  # they are created empty
            torch.nn.init.normal_(parameter)
    return model


def decode(model: Any, embeddings: Tensor, **arguments: Any) -> Tensor:
    hidden: Tensor = model.get_decoder()(inputs_embeds=embeddings, use_cache=False, **arguments).last_hidden_state
    return hidden


def embeddings_of(model: Any, seed: int = 0) -> Tensor:
    """[1, T, hidden] a leaf."""
    ids = torch.randint(128, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    leaf: Tensor = model.get_input_embeddings()(ids).detach().requires_grad_()
    return leaf


def weights_like(hidden: Tensor) -> Tensor:
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach().double() - theirs.detach().double()).norm() / theirs.detach().double().norm())


def packed_and_apart(model: Any, embeddings: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and gradients by the embeddings: packed with our attention, row by row with the model's own."""
    with using_attention(model, ATTENTION):
        packed = decode(model, embeddings, **packed_arguments(LENGTHS, CPU))
        grad = torch.autograd.grad((packed * weights_like(packed)).sum(), embeddings)[0]
    apart = torch.cat([decode(model, row) for row in embeddings.split(LENGTHS, 1)], 1)
    own = torch.autograd.grad((apart * weights_like(apart)).sum(), embeddings)[0]
    return [packed, grad], [apart, own]


@pytest.mark.parametrize("dtype", OFF, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_have_the_hidden_states_and_gradients_of_rows_apart(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    ours, theirs = packed_and_apart(model, embeddings_of(model))
    rows = [x.split(LENGTHS, 1) for x in (*ours, *theirs)]
    worst = max(off(a, b) for ours, theirs in (rows[0::2], rows[1::2]) for a, b in zip(ours, theirs, strict=True))
    assert worst < OFF[dtype]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_that_changes_leaves_the_other_rows_of_its_pack_as_they_were_to_the_bit(name: str) -> None:
    model = build(name)
    first = embeddings_of(model).detach()
    second = torch.cat([embeddings_of(model, seed=1).detach()[:, :9], first[:, 9:]], 1)
    with using_attention(model, ATTENTION), torch.no_grad():
        a, b = (decode(model, each, **packed_arguments(LENGTHS, CPU)) for each in (first, second))
    assert not torch.equal(a[:, :9], b[:, :9])
    assert torch.equal(a[:, 9:], b[:, 9:])


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_padded_on_the_right_need_no_mask(name: str) -> None:
    model = build(name)
    embeddings = embeddings_of(model).detach()[:, :40].reshape(2, 20, 64)
    mask = (torch.arange(20) < torch.tensor([[20], [13]])).long()
    own = decode(model, embeddings, attention_mask=mask)
    with using_attention(model, ATTENTION):
        bare, masked = decode(model, embeddings), decode(model, embeddings, attention_mask=mask)
    assert off(bare[mask.bool()], own[mask.bool()]) < 2e-5
    assert torch.equal(bare, masked)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_gradients_are_the_same_under_gradient_checkpointing(name: str) -> None:
    model = build(name).train()
    layers, embeddings = model.get_decoder().layers, embeddings_of(model)
    grads: list[tuple[Tensor, ...]] = []
    calls: list[int] = []
    layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(len(grads)))
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with using_attention(model, ATTENTION):
            hidden = decode(model, embeddings, **packed_arguments(LENGTHS, CPU))
            loss = (hidden * weights_like(hidden)).sum()
            grads.append(torch.autograd.grad(loss, [embeddings, *layers.parameters()], allow_unused=name == "gpt-oss"))
    assert calls == [0, 1, 1]
    assert len(grads[0]) > 8
    assert all(a is b or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rule: Rule, sinks: Tensor | None) -> Tensor:
    """The slow twin: all scores of all rows, and one mask."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(len(row))
    back = place[:, None] - place[None]
    seen = (row[:, None] == row[None]) & (back >= 0) & (back < (rule.window or len(row)))
    scores = torch.einsum("qhd,khd->hqk", q, k) * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(row), 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(row)], v)


def random_rows(lengths: tuple[int, ...], heads: int, key_heads: int) -> list[Tensor]:
    """q, k, v and sinks in float64; values are narrower than keys, as DeepSeek's are."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 8), (sum(lengths), key_heads, 8), (sum(lengths), key_heads, 6), (heads,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kept", [1024, 40], ids=["kept", "recomputed"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 50, 1000])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_the_formula_and_its_gradients_are_those_of_a_dense_mask(
    key_heads: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_math, "QUERIES", 32)
    monkeypatch.setattr(attention_math, "KEPT_KEYS", kept)
    lengths = (33, 1, 90, 32)
    q, k, v, sinks = random_rows(lengths, 4, key_heads)
    inputs = [q, k, v, sinks] if with_sinks else [q, k, v]
    results = []
    for function in (attend, dense):
        out = function(q, k, v, lengths, Rule(0.4, window, softcap), sinks if with_sinks else None)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def flash(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rule: Rule) -> Tensor:
    """torch's own kernel, row by row."""
    rows = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    outs = [sdpa(q, k, v, is_causal=True, scale=rule.scaling, enable_gqa=True) for q, k, v in rows]
    return torch.cat(outs, 2)[0].transpose(0, 1)


@pytest.mark.parametrize("scaling", [0.125, 0.7], ids=["common", "large"])
def test_sixteen_bit_attention_is_as_exact_as_flash_attention(scaling: float) -> None:
    lengths, rule = (150, 40), Rule(scaling)
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randn(190, heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2)]
    q, k, v = (x.double().requires_grad_() for x in halves)
    truth = dense(q, k, v, lengths, rule, None)
    weights = weights_like(truth.bfloat16())
    exact = [truth, *torch.autograd.grad((truth * weights).sum(), (q, k, v))]
    errors = []
    for function in (attend, flash):
        q, k, v = (x.clone().requires_grad_() for x in halves)
        out = function(q, k, v, lengths, rule)
        found = [out, *torch.autograd.grad((out * weights).sum(), (q, k, v))]
        errors.append([off(a, b) for a, b in zip(found, exact, strict=True)])
    assert max(errors[1]) > 1e-3
    assert all(ours < 1.6 * theirs for ours, theirs in zip(*errors, strict=True))


class Widths(TorchDispatchMode):
    """The lengths of rows that torch's own kernel is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.seen |= {x.shape[2] for x in args[:3]}
        return func(*args, **(kwargs or {}))


def test_torchs_kernel_which_is_kept_for_each_length_for_good_meets_few_lengths() -> None:
    lengths = tuple(range(1, 130, 7))
    q = torch.randn(sum(lengths), 2, 8, dtype=torch.bfloat16)
    with Widths() as widths:
        attend(q, q, q, lengths, Rule(1.0))
    assert widths.seen == {64, 128}


def test_float32_products_are_as_precise_afterwards_as_before() -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision, torch.get_float32_matmul_precision()
    q = torch.randn(40, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    attend(q, q, q, [40], Rule(1.0)).sum().backward()
    assert (matmul.fp32_precision, torch.get_float32_matmul_precision()) == before


def call(**options: Any) -> Tensor:
    causal = options.pop("causal", True)
    module = torch.nn.Identity()
    module.is_causal = causal
    mask, batch = options.pop("mask", None), options.pop("batch", 1)
    keys = options.pop("keys", 12)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 2, length, 8, generator=generator) for length in (12, keys, keys))
    return segments_attention(module, q, k, v, mask, **options)[0]


BORDERS = torch.tensor([0, 5, 12], dtype=torch.int32)


def test_dropout_is_drawn_and_keeps_rows_apart() -> None:
    torch.manual_seed(0)
    plain, dropped = call(cu_seq_lens_q=BORDERS), call(cu_seq_lens_q=BORDERS, dropout=0.5)
    assert off(call(cu_seq_lens_q=BORDERS, dropout=1e-9), plain) < 1e-5
    assert off(dropped, plain) > 0.1


def test_modules_that_attend_both_ways_do_so_and_masks_are_honoured() -> None:
    both, causal = call(causal=False), call()
    triangle = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    assert off(both, causal) > 0.1
    assert off(call(mask=triangle), causal) < 1e-6
    assert off(call(mask=torch.ones_like(triangle)), both) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"position_bias": torch.zeros(1)},
        {"causal": False, "cu_seq_lens_q": BORDERS},
        {"mask": torch.ones(1, 1, 12, 12, dtype=torch.bool), "softcap": 1.0},
        {"mask": torch.ones(1, 1, 12, 12, dtype=torch.bool), "cu_seq_lens_q": BORDERS},
        {"keys": 13},
        {"batch": 2, "cu_seq_lens_q": BORDERS},
        {"cu_seq_lens_q": BORDERS[:2]},
        {"dropout": 0.1, "softcap": 1.0},
        {"dropout": 0.1, "sliding_window": 4},
    ],
    ids="+".join,
)
def test_what_it_cannot_compute_exactly_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"qlora_segments|cu_seq_lens_q"):
        call(**options)


@pytest.mark.parametrize("dtype", OFF, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_lets_models_pack_that_compute_rows_apart(name: str, dtype: torch.dtype) -> None:
    assert find_packing(build(name, dtype), 128) == Packing(ATTENTION)


OTHERS: dict[str, Callable[[], Any]] = {
    "own attention": lambda: tf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "own attention classes": lambda: tf.FalconConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
    "rows of a pack": lambda: tf.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_check_gives_a_reason_for_models_that_cannot_pack(name: str) -> None:
    torch.manual_seed(0)
    packing = find_packing(tf.AutoModelForCausalLM.from_config(OTHERS[name]()), 128)
    assert packing.attention is None
    assert ("see each other" if name == "rows of a pack" else "attention of its own") in packing.reason


def register(name: str, **changes: Any) -> str:
    """Our attention, but for keywords that are replaced."""

    def changed(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
        return segments_attention(*arguments, **{**options, **changes})

    tf.AttentionInterface.register(name, changed)
    return name


@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        ("llama", {"cu_seq_lens_q": None}, "see each other"),
        ("llama", {"scaling": 0.1}, "hidden states of packed rows"),
        ("mistral", {"sliding_window": None}, "hidden states of packed rows"),
        ("gemma2", {"softcap": None}, "hidden states of packed rows"),
        ("gpt-oss", {"s_aux": None}, "hidden states of packed rows"),
        ("llama", {"unheard_of": 1}, "ValueError: qlora_segments does not take unheard_of"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "+".join(value),
)
def test_the_check_finds_an_attention_that_leaves_something_out(
    model: str, changes: dict[str, Any], reason: str
) -> None:
    assert reason in why_not_packed(build(model), register("qlora_segments_changed", **changes), 128)


def test_the_check_finds_windows_longer_than_its_rows() -> None:
    config = tf.MistralConfig(**{**SMALL, "max_position_embeddings": 8192}, sliding_window=4096)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    changed = register("qlora_segments_changed", sliding_window=None)
    assert "hidden states" in why_not_packed(model, changed, 128)
    assert why_not_packed(model, ATTENTION, 128) == ""
    assert model.config.sliding_window == 4096


@pytest.mark.parametrize(("name", "kept"), [("gemma2", "eager"), ("gemma3", "sdpa"), ("llama", "sdpa")])
def test_capped_scores_are_not_left_to_sdpa_which_leaves_the_cap_out(name: str, kept: str) -> None:
    model = build(name)
    model.get_decoder().config._attn_implementation = "sdpa"  # as older versions of transformers choose
    keep_soft_cap(model)
    assert model.get_decoder().config._attn_implementation == kept


def test_the_check_finds_a_wrong_gradient() -> None:
    def detached(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
        return segments_attention(*arguments, **options)[0].detach(), None

    tf.AttentionInterface.register("qlora_segments_changed", detached)
    assert "gradients" in why_not_packed(build("llama"), "qlora_segments_changed", 128)


def test_the_check_leaves_modes_gradients_random_state_and_attention_as_they_were() -> None:
    model = build("gemma2").train()
    model.get_decoder().layers[0].eval()
    set_checkpointing(model, "on")
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    modes = [module.training for module in model.modules()]
    state, config = torch.get_rng_state(), model.config.to_dict()
    assert find_packing(model, 128) == Packing(ATTENTION)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    first, *others = (p.grad for p in model.parameters())
    assert first is not None and bool((first == 1).all())
    assert others == [None] * len(others)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "eager"
    assert model.get_input_embeddings()._forward_hooks == hooks


def test_only_the_text_decoder_of_a_vision_model_changes_its_attention() -> None:
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.Gemma3Config(
        text_config={**SMALL, "head_dim": 32, "sliding_window": 4},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config)
    assert find_packing(model, 128) == Packing(ATTENTION)
    with using_attention(model, ATTENTION):
        assert model.config.text_config._attn_implementation == ATTENTION
        assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"
