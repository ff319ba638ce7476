"""The growing cache against transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from qlora_cli.generation.cache import ROOM, GrowingLayer, continues, grow_in_place
from tests.conftest import make_llama


def states(new: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `new` positions, laid out as attention layers lay them out."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, 1, new, 3, 8, generator=generator).transpose(2, 3)
    return both[0], both[1]


def filled(new: int = 5) -> DynamicCache:
    """A cache of one layer."""
    cache = DynamicCache()
    cache.update(*states(new, 0), 0)
    return cache


def test_a_layer_that_grows_in_place_holds_what_transformers_holds_through_growth_and_cuts() -> None:
    plain, growing = filled(), grow_in_place(filled())
    assert type(growing.layers[0]) is GrowingLayer
    steps = [1, 1, -2, 3, -7, 1, ROOM - 3, 1, 1, 2 * ROOM, -ROOM, 1]
    for seed, step in enumerate(steps, start=1):
        for cache in (plain, growing):
            _ = cache.crop(step) if step < 0 else cache.update(*states(step, seed), 0)
        for name in ("keys", "values"):
            assert torch.equal(getattr(growing.layers[0], name), getattr(plain.layers[0], name))
        assert growing.get_seq_length() == plain.get_seq_length()
    assert plain.get_seq_length() == 5 + sum(steps)


def test_a_token_copies_nothing_while_there_is_room() -> None:
    cache = grow_in_place(filled())
    cache.update(*states(1, 1), 0)
    places = set()
    for seed in range(ROOM):
        cache.update(*states(1, seed), 0)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1


def test_growing_twice_changes_nothing_and_nothing_is_no_cache() -> None:
    cache = grow_in_place(filled())
    layers = list(cache.layers)
    assert grow_in_place(cache).layers == layers
    assert grow_in_place(None) is None


def test_a_model_computes_the_same_over_either_cache() -> None:
    model, ids = make_llama().eval(), torch.arange(60, 72)[None]

    def logits(change: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = change(model(ids[:, :5], use_cache=True).past_key_values)
            found = [model(ids[:, :9][:, 5:], past_key_values=cache).logits]
            cache.crop(-2)
            found += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(7, 12)]
        return torch.cat(found, 1)

    torch.testing.assert_close(logits(grow_in_place), logits(lambda cache: cache), rtol=1e-5, atol=1e-6)


def test_a_sliding_window_can_be_continued_but_not_cut() -> None:
    cache = filled()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    assert continues(cache, 0)
    assert not continues(cache, 1)
    assert continues(filled(), 3)
    assert not continues(None, 0)
    assert not continues(DynamicCache(), 0)
