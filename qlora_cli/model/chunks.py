"""Work on large tensors in pieces that fit a CPU's cache.

Knows tensors and threads. Invariant: chunks are of a fixed size, so that what is computed of each does not depend on
the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from qlora_cli.model.codes import CHUNK

Found = TypeVar("Found")


def by_chunks(function: Callable[..., Found], *tensors: Tensor) -> list[Found]:
    """`function` of the chunks of flat `tensors` of one length, in order; on a GPU of all at once. A CPU's threads take
    a chunk each and use no further threads inside: those would wait for each other at every small step, and where the
    machine does other work too, long."""
    if not tensors[0].numel():
        return []
    if tensors[0].device.type != "cpu":
        return [function(*tensors)]
    count = torch.get_num_threads()
    found = list(_threads(count).map(function, *(tensor.split(CHUNK) for tensor in tensors)))
    torch.set_num_threads(count)  # new threads set it for those that come after them
    return found


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Kept, since every new thread brings a heap of its own."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
