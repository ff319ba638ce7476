"""Generation: streamed, batched and transformers' own greedy decoding agree, and stops stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.generation.stream import Decoding, _choose, complete_all, stream
from tests.model.test_lora import adapted

PROMPTS = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95]]
NEVER = frozenset({2})


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """A tiny adapted 4-bit model."""
    return adapted(base)[0].eval()


def test_streamed_and_batched_tokens_equal_transformers_greedy_decoding(model: Any) -> None:
    batched = complete_all(model, PROMPTS, NEVER, 8, batch_size=2)
    for prompt, completion in zip(PROMPTS, batched, strict=True):
        streamed = list(stream(model, prompt, NEVER, Decoding(max_new_tokens=8)))
        expected = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert len(streamed) == 8
        assert streamed == completion == expected.tolist()


def test_each_streamed_token_is_the_likeliest_after_all_before_it_without_a_cache(model: Any) -> None:
    ids = [*PROMPTS[0], *stream(model, PROMPTS[0], NEVER, Decoding(max_new_tokens=6))]
    with torch.no_grad():
        likeliest = model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
    assert likeliest[2:-1] == ids[3:]


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(model: Any) -> None:
    free = list(stream(model, PROMPTS[0], NEVER, Decoding(max_new_tokens=8)))
    stop = frozenset({free[3]})
    cut = free[: free.index(free[3])]
    assert list(stream(model, PROMPTS[0], stop, Decoding(max_new_tokens=8))) == cut
    assert complete_all(model, [PROMPTS[0]], stop, 8) == [cut]


def test_sampling_repeats_with_its_seed_and_varies_without(model: Any) -> None:
    drawn = [tuple(stream(model, PROMPTS[0], NEVER, Decoding(12, 1.0, 1.0, seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_nucleus_sampling_draws_from_the_smallest_set_that_holds_the_mass() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {_choose(logits, Decoding(temperature=1.0, top_p=0.7), generator) for _ in range(200)}
    assert drawn == {0, 1}
    assert {_choose(logits, Decoding(temperature=1.0, top_p=1.0), generator) for _ in range(400)} == {0, 1, 2, 3}
