"""Decoding: streamed, batched and transformers' own tokens agree, stops stop, and the cache is what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mamba import MambaConfig, MambaForCausalLM

from qlora_cli.generation.decoder import Completion, Decoder, complete_all
from qlora_cli.generation.sampling import Decoding
from tests.model.test_lora import adapted

PROMPTS = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95]]
NEVER = frozenset({2})
EIGHT = Decoding(max_new_tokens=8)
SAMPLED = Decoding(12, temperature=1.0, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """A tiny adapted 4-bit model."""
    return adapted(base)[0].eval()


@pytest.fixture(scope="module")
def sliding() -> Any:
    """A model whose attention reaches back 8 positions."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=300, num_key_value_heads=2, sliding_window=8, eos_token_id=2, **sizes)
    return MistralForCausalLM(config).eval()


def tokens(decoder: Decoder, prompt: list[int], decoding: Decoding = EIGHT) -> list[int]:
    """A whole answer."""
    return list(decoder.stream(prompt, decoding))


def held(decoder: Decoder) -> tuple[int, int]:
    """(ids the decoder says its cache holds, positions the cache holds)."""
    cache = decoder._cache
    return len(decoder.held), 0 if cache is None else cache.get_seq_length()


def test_streamed_and_batched_tokens_equal_transformers_greedy_decoding(model: Any) -> None:
    batched = list(complete_all(model, PROMPTS, NEVER, EIGHT, batch_size=2))
    for prompt, completion in zip(PROMPTS, batched, strict=True):
        expected = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert len(expected) == 8
        assert completion == Completion(expected.tolist(), stopped=False)
        assert tokens(Decoder(model, NEVER), prompt) == expected.tolist()


def test_each_streamed_token_is_the_likeliest_after_all_before_it_without_a_cache(model: Any) -> None:
    ids = [*PROMPTS[0], *tokens(Decoder(model, NEVER), PROMPTS[0])]
    with torch.no_grad():
        likeliest = model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
    assert likeliest[2:-1] == ids[3:]


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(model: Any) -> None:
    free = tokens(Decoder(model, NEVER), PROMPTS[0])
    stop, cut = frozenset({free[3]}), free[: free.index(free[3])]
    decoder = Decoder(model, stop)
    assert tokens(decoder, PROMPTS[0]) == cut
    assert decoder.last is not None
    assert (decoder.last.stopped, decoder.last.tokens) == (True, len(cut))
    assert list(complete_all(model, [PROMPTS[0]], stop, EIGHT)) == [Completion(cut, stopped=True)]


def test_the_limit_is_told_from_a_stop_and_times_are_in_order(model: Any) -> None:
    decoder = Decoder(model, NEVER)
    tokens(decoder, PROMPTS[2])
    last = decoder.last
    assert last is not None
    assert (last.stopped, last.tokens, last.prompt_tokens, last.reused_tokens) == (False, 8, 6, 0)
    assert 0 < last.first_seconds < last.seconds


def test_a_limit_of_no_tokens_gives_none(model: Any) -> None:
    decoder = Decoder(model, NEVER)
    assert tokens(decoder, PROMPTS[0], Decoding(max_new_tokens=0)) == []
    assert held(decoder) == (0, 0)


@pytest.mark.parametrize("decoding", [EIGHT, SAMPLED])
@pytest.mark.parametrize("kind", ["model", "sliding"])
def test_answers_with_a_reused_cache_equal_those_without(
    request: pytest.FixtureRequest, kind: str, decoding: Decoding
) -> None:
    chosen = request.getfixturevalue(kind)
    decoder, long = Decoder(chosen, NEVER), [60 + i for i in range(14)]
    first = tokens(decoder, long, decoding)
    reused = []
    for prompt in ([*long, *first, 7, 8, 9], [*long, 5], long, long[:3], [200, *long]):
        assert tokens(decoder, prompt, decoding) == tokens(Decoder(chosen, NEVER), prompt, decoding)
        assert decoder.last is not None
        reused.append(decoder.last.reused_tokens)
    assert reused == ([14 + len(first) - 1, 14, 13, 2, 0] if kind == "model" else [14 + len(first) - 1, 0, 0, 0, 0])


def test_a_model_without_a_key_value_cache_is_computed_anew(model: Any) -> None:
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)).eval()
    decoder = Decoder(mamba, NEVER)
    for prompt in (PROMPTS[0], [*PROMPTS[0], 9, 9]):
        answer = tokens(decoder, prompt)
        with torch.no_grad():
            likeliest = mamba(torch.tensor([prompt + answer])).logits[0].argmax(-1).tolist()
        assert likeliest[len(prompt) - 1 : -1] == answer
        assert decoder.last is not None
        assert decoder.last.reused_tokens == 0


def test_an_abandoned_stream_leaves_a_cache_that_the_next_one_can_use(model: Any) -> None:
    decoder = Decoder(model, NEVER)
    stream: Iterator[int] = decoder.stream(PROMPTS[2], EIGHT)
    seen = [next(stream) for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]
    assert held(decoder) == (8, 8)
    assert decoder.held == [*PROMPTS[2], *seen[:2]]
    longer = [*PROMPTS[2], *seen, 7]
    assert tokens(decoder, longer) == tokens(Decoder(model, NEVER), longer)
    assert decoder.last is not None
    assert decoder.last.reused_tokens == 8


def test_an_interrupt_within_the_model_drops_the_cache(model: Any) -> None:
    decoder = Decoder(model, NEVER)
    stream = decoder.stream(PROMPTS[2], EIGHT)
    seen = [next(stream), next(stream)]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)  # the first layer's cache has the token then
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    hook.remove()
    assert held(decoder) == (0, 0)
    assert tokens(decoder, PROMPTS[2])[:2] == seen


def test_a_stream_that_another_has_overtaken_says_so(model: Any) -> None:
    decoder = Decoder(model, NEVER)
    overtaken = decoder.stream(PROMPTS[2], EIGHT)
    next(overtaken)
    tokens(decoder, PROMPTS[0])
    with pytest.raises(RuntimeError, match="another stream"):
        next(overtaken)


def test_after_forget_a_changed_adapter_answers_as_if_it_had_always_been_there(base: Path) -> None:
    changed, layers = adapted(base)
    decoder = Decoder(changed, NEVER)
    tokens(decoder, PROMPTS[2])
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_b.mul_(-3)
    decoder.forget()
    assert tokens(decoder, PROMPTS[2]) == tokens(Decoder(changed, NEVER), PROMPTS[2])
    assert decoder.last is not None
    assert decoder.last.reused_tokens == 0


def test_the_models_mode_and_its_training_survive_decoding(base: Path) -> None:
    trained, layers = adapted(base, dropout=0.5)
    trained.train()
    decoder = Decoder(trained, NEVER)
    assert tokens(decoder, PROMPTS[2]) == tokens(decoder, PROMPTS[2])  # no dropout
    list(complete_all(trained, PROMPTS, NEVER, EIGHT))
    assert all(module.training for module in trained.modules())
    ids = torch.tensor([PROMPTS[2]])
    trained(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for layer in layers.values() for p in (layer.lora_a, layer.lora_b))


def test_sampling_repeats_with_its_seed_and_varies_without(model: Any) -> None:
    drawn = [tokens(Decoder(model, NEVER), PROMPTS[0], Decoding(12, 1.0, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_batched_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone(model: Any) -> None:
    before = torch.random.get_rng_state()
    drawn = [list(complete_all(model, PROMPTS, NEVER, Decoding(12, 1.0, seed=seed), 2)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "decoding", [Decoding(8, 0.7, top_k=1), Decoding(8, 1.0, top_p=1e-6), Decoding(8, 1.0, min_p=1.0)]
)
def test_batches_heed_the_whole_decoding(model: Any, decoding: Decoding) -> None:
    assert list(complete_all(model, PROMPTS, NEVER, decoding)) == list(complete_all(model, PROMPTS, NEVER, EIGHT))


def test_batches_heed_the_repetition_penalty(model: Any) -> None:
    decoding = Decoding(8, repetition_penalty=1e6)
    for prompt, completion in zip(PROMPTS, complete_all(model, PROMPTS, NEVER, decoding), strict=True):
        assert completion.ids == tokens(Decoder(model, NEVER), prompt, decoding)
        assert len({*prompt, *completion.ids}) == len(prompt) + 8


def test_what_the_models_own_configuration_asks_for_does_not_leak_into_batches(base: Path) -> None:
    model = adapted(base)[0].eval()
    expected = list(complete_all(model, PROMPTS, NEVER, EIGHT))
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, max_length=4)
    assert list(complete_all(model, PROMPTS, NEVER, EIGHT)) == expected


def test_no_prompts_give_no_completions(model: Any) -> None:
    assert list(complete_all(model, [], NEVER, EIGHT)) == []
