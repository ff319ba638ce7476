"""The table of codes against bitsandbytes' search: bit for bit."""

from __future__ import annotations

from typing import Literal

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_cli.model.codes import CHUNK
from qlora_cli.model.nf4 import quantize
from qlora_cli.recipe.schema import QuantizationSection

Kind = Literal["nf4", "fp4"]


def assert_equal(weight: Tensor, section: QuantizationSection) -> None:
    codes, state = bnb_functional.quantize_4bit(
        weight,
        blocksize=section.blocksize,
        quant_type=section.type,
        compress_statistics=section.double_quant,
        quant_storage=getattr(torch, section.storage_dtype),
    )
    ours = quantize(weight, section)
    assert ours.codes.shape == codes.shape and ours.codes.dtype == codes.dtype
    assert torch.equal(ours.codes.view(torch.uint8), codes.view(torch.uint8))
    theirs, mine = state.as_dict(packed=True), ours.state.as_dict(packed=True)
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[key], mine[key]) for key in theirs)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_numbers_on_and_beside_every_border_get_bitsandbytes_codes(kind: Kind) -> None:
    values = bnb_functional.get_4bit_type(kind, device="cpu").sort()[0]
    middle = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)])
    blocks = [torch.cat([part, torch.zeros(63 - len(part)), torch.ones(1)]) for part in near.split(63)]
    assert_equal(torch.cat(blocks), QuantizationSection(type=kind, double_quant=False))


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 2, 63, 64, 65, 127, 4096, 4097, 12_290, CHUNK, CHUNK + 65]),
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    blocksize=st.sampled_from([32, 64, 4096]),
    double=st.booleans(),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_any_weight_gets_bitsandbytes_codes_and_constants(
    size: int, kind: Kind, dtype: torch.dtype, blocksize: Literal[32, 64, 4096], double: bool, scale: float, seed: int
) -> None:
    weight = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    assert_equal(weight, QuantizationSection(type=kind, blocksize=blocksize, double_quant=double))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_the_type_that_stores_the_codes_does_not_change_them(
    storage: Literal["uint8", "bfloat16", "float32"],
) -> None:
    torch.manual_seed(0)
    assert_equal(torch.randn(96, 160), QuantizationSection(storage_dtype=storage))
