"""Chunks are worked on in order, whatever the number of threads, and torch keeps its own threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qlora_cli.model.chunks import by_chunks
from qlora_cli.model.codes import CHUNK


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back the number of threads that the tests have."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("count", [1, 3])
def test_chunks_come_back_in_order_and_torch_keeps_its_threads(count: int, threads: None) -> None:
    torch.set_num_threads(count)
    one, other = torch.arange(3 * CHUNK + 5), torch.arange(3 * CHUNK + 5) * 2
    found = by_chunks(lambda a, b: (int(a[0]), len(a), int(b[-1]), torch.get_num_threads()), one, other)
    assert found == [(i * CHUNK, n, 2 * (i * CHUNK + n - 1), 1) for i, n in enumerate([CHUNK] * 3 + [5])]
    assert torch.get_num_threads() == count


def test_nothing_has_no_chunks() -> None:
    assert by_chunks(len, torch.zeros(0)) == []
