"""Tensors made again in the backward pass instead of being kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from qlora_cli.model.pointwise import GATES, gated, plain_kernels, rms_norm
from qlora_cli.model.remake import origin_of, remember

KERNELS = plain_kernels()


def test_a_tensor_without_an_origin_is_saved_itself() -> None:
    x = torch.randn(2, 3, 4)
    make, sources = origin_of(x)
    assert sources == (x,)
    assert torch.equal(make(*sources), x.view(6, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", GATES)
def test_gated_products_and_norms_are_made_again_bit_for_bit(dtype: torch.dtype, activation: str) -> None:
    gate, up, weight = torch.randn(2, 5, 8, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype), torch.randn(8, dtype=dtype)
    made = [gated(KERNELS, activation, gate, up), rms_norm(KERNELS, gate, weight, 1e-5)]
    for tensor in made:
        make, sources = origin_of(tensor)
        assert all(source is not tensor for source in sources)
        assert torch.equal(make(*sources), tensor.view(10, 8))


def test_a_view_has_no_origin_of_its_own() -> None:
    tensor = remember(torch.ones(2, 2), torch.ones_like, torch.ones(2, 2))
    view = tensor.view(4)
    assert origin_of(view).sources == (view,)


def test_sources_go_with_the_tensor() -> None:
    source = torch.ones(3)
    tensor = remember(source * 2, lambda given: given * 2, source)
    alive = weakref.ref(source)
    del source, tensor
    gc.collect()
    assert alive() is None
