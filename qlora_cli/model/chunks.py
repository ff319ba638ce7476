"""Work on large tensors in pieces that fit a CPU's cache.

Knows tensors and threads. Invariant: chunks are of a fixed size, so that what is computed of each does not depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

CHUNK = 1 << 17
"""Elements at once: a multiple of every blocksize of 4-bit storage."""
Found = TypeVar("Found")


def by_chunks(function: Callable[..., Found], *tensors: Tensor) -> list[Found]:
    """`function` of the chunks of flat `tensors` of one length, in order. On a CPU in as many threads as torch uses, each
    with one of its own: with torch's threads inside, they would wait for each other at every small step, and on a
    machine that does other work too they wait long."""
    if tensors[0].device.type != "cpu":
        return [function(*tensors)]
    chunks, threads = [tensor.split(CHUNK) for tensor in tensors], torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, *chunks))
    finally:
        torch.set_num_threads(threads)  # for this thread it still holds; this is for threads yet to come
