"""The choice of a token, against transformers' own processors."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qlora_cli.errors import NonFiniteError
from qlora_cli.generation.sampling import Decoding, check_logits, choose, distribution, model_decoding, penalised

SEEN = [1, 4, 4, 9]


def slow_twin(logits: Tensor, seen: list[int], decoding: Decoding) -> Tensor:
    """[V] probabilities by transformers, in the order in which its `generate` takes the processors."""
    processors = LogitsProcessorList()
    if decoding.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    processors.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k:
        processors.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        processors.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p:
        processors.append(MinPLogitsWarper(decoding.min_p))
    return processors(torch.tensor([seen]), logits[None].clone())[0].softmax(-1)


def ours(logits: Tensor, seen: list[int], decoding: Decoding) -> Tensor:
    """[V] probabilities from which `choose` draws."""
    weights, ids = distribution(penalised(logits, seen, decoding.repetition_penalty), decoding)
    full = torch.zeros_like(logits)
    full[slice(None) if ids is None else ids] = weights / weights.sum()
    return full


DECODINGS = st.builds(
    Decoding,
    temperature=st.floats(0.1, 4),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 0.01]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 10_000]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
)


@given(decoding=DECODINGS, seed=st.integers(0, 10**6), spread=st.floats(0.1, 8), size=st.sampled_from([12, 300, 4000]))
@settings(max_examples=150, deadline=None)
def test_the_distribution_is_that_of_transformers_processors(
    decoding: Decoding, seed: int, spread: float, size: int
) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    torch.testing.assert_close(ours(logits, SEEN, decoding), slow_twin(logits, SEEN, decoding), rtol=1e-4, atol=1e-6)


def test_ties_at_the_kth_token_are_all_kept() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 0, 0, 0, 0, 0])
    decoding = Decoding(temperature=1.0, top_k=2)
    torch.testing.assert_close(ours(logits, SEEN, decoding), slow_twin(logits, SEEN, decoding))
    assert ours(logits, SEEN, decoding).count_nonzero() == 3


def test_tokens_are_drawn_with_the_probabilities_of_the_distribution() -> None:
    logits, decoding = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), Decoding(temperature=1.0, top_k=3)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.bincount(torch.tensor([choose(logits, [], decoding, generator) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(drawn / 4000, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.03, rtol=0)
    assert drawn[3] == 0


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_the_likeliest_token_always_remains(top_p: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    for decoding in (Decoding(temperature=1.0, top_p=top_p), Decoding(temperature=1.0, min_p=1.0)):
        assert choose(logits, [], decoding, torch.Generator().manual_seed(0)) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-3, 1e38, 1e300])
@pytest.mark.parametrize("top_p", [1.0, 1e-300])
def test_no_setting_leaves_nothing_to_draw_from(temperature: float, top_p: float) -> None:
    for logits in (torch.tensor([3.0, -2.0, 40.0, 1e37]), torch.zeros(50), torch.tensor([-torch.inf, 0.0, -torch.inf])):
        for penalty in (1.0, 1e-3, 1e3):
            decoding = Decoding(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
            token = choose(logits, [0, 2], decoding, torch.Generator().manual_seed(0))
            assert logits[token] > -torch.inf
            if temperature < 1 and len(logits) == 4 and penalty == 1:
                assert token == 3


def test_logits_that_are_no_numbers_are_an_error_and_tokens_ruled_out_are_none() -> None:
    check_logits(torch.tensor([[1.0, -torch.inf], [0.0, 1.0]]))
    for bad in ([torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]):
        with pytest.raises(NonFiniteError):
            check_logits(torch.tensor(bad))


def test_temperature_0_takes_the_likeliest_token_after_the_penalty() -> None:
    logits, generator = torch.tensor([1.0, 3.0, 2.5]), torch.Generator()
    assert choose(logits, [1], Decoding(), generator) == 1
    assert choose(logits, [1, 1], Decoding(repetition_penalty=1.5), generator) == 2
    assert choose(-logits, [0], Decoding(repetition_penalty=3.0), generator) == 2


def test_the_logits_given_are_left_as_they_are() -> None:
    logits = torch.randn(50)
    before = logits.clone()
    decoding = Decoding(temperature=0.7, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.2)
    choose(logits, SEEN, decoding, torch.Generator())
    assert torch.equal(logits, before)


def test_a_seed_fixes_what_is_drawn() -> None:
    drawn = []
    for seed in (7, 7, 8):
        generator = torch.Generator().manual_seed(seed)
        drawn.append([choose(torch.zeros(1000), [], Decoding(temperature=1.0), generator) for _ in range(5)])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GenerationConfig(), Decoding()),
        (GenerationConfig(do_sample=False, temperature=None, top_p=None), Decoding()),
        (GenerationConfig(do_sample=True), Decoding(temperature=1.0)),
        (
            GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1),
            Decoding(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1),
        ),
        (GenerationConfig(repetition_penalty=1.1), Decoding(repetition_penalty=1.1)),
    ],
)
def test_defaults_come_from_the_models_generation_config(config: GenerationConfig, expected: Decoding) -> None:
    model = SimpleNamespace(generation_config=config)
    assert model_decoding(model) == expected
    assert model_decoding(model, 9) == replace(expected, max_new_tokens=9)
