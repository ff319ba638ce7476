"""What a run needs beside its trained values to go on as if it had never stopped.

Knows an optimizer, named parameters and random generators; no file. Invariant: what is put back is, bit for bit, what
was taken, at the place where it was: states of a paged optimizer stay in its pages.

Every draw of the loop is seeded by its step (see `loop.py`), so that the generators matter to nothing of ours; they are
kept for what a model or a library may draw by itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_cli.errors import ModelError, Problem

CODE_BOOKS = ("qmap1", "qmap2")
"""bitsandbytes' values of 8-bit codes: shared by all states, and the same in every run of a version."""

Named = Mapping[str, torch.nn.Parameter]


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Tensor]:
    """Every state as `PARAMETER:STATE`, on the CPU; numbers (bitsandbytes' count of steps) as int64 []. What is there
    already is not copied: the next step changes it."""
    return {key: torch.as_tensor(state[name]).detach().cpu() for key, state, name in _states(optimizer, named)}


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, named: Named, tensors: Mapping[str, Tensor]) -> None:
    """Copies `optimizer_tensors` into states that were allocated before. Raises `ModelError` that names every state
    that lacks, is not known or has another shape or type."""
    states = list(_states(optimizer, named))
    expected = {key: torch.as_tensor(state[name]) for key, state, name in states}
    if problems := _mismatches(expected, tensors):
        raise ModelError.of([Problem(text, fix="go on from another checkpoint, or train again") for text in problems])
    for key, state, name in states:
        if isinstance(state[name], Tensor):
            state[name].copy_(tensors[key])
        else:
            state[name] = int(tensors[key])


def _states(optimizer: torch.optim.Optimizer, named: Named) -> Iterator[tuple[str, dict[str, Any], str]]:
    for parameter_name, parameter in named.items():
        state = optimizer.state.get(parameter, {})
        yield from ((f"{parameter_name}:{name}", state, name) for name in sorted(state) if name not in CODE_BOOKS)


def _mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    problems = [f"the optimizer's {key} is not in the checkpoint" for key in expected.keys() - found.keys()]
    problems += [f"the checkpoint's {key} is no state of this optimizer" for key in found.keys() - expected.keys()]
    for key in expected.keys() & found.keys():
        wants, has = ((tuple(each.shape), each.dtype) for each in (expected[key], found[key]))
        if wants != has:
            problems.append(f"{key} is {has} in the checkpoint, the optimizer wants {wants}")
    return sorted(problems)


def random_tensors() -> dict[str, Tensor]:
    """The state of every generator: Python's, numpy's, torch's, and one for each CUDA device."""
    _, words, spare = random.getstate()
    _, keys, position, has_spare, numpy_spare = np.random.get_state(legacy=True)
    found = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python.spare": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, np.int64)),
        "numpy.place": torch.tensor([position, has_spare], dtype=torch.int64),
        "numpy.spare": torch.tensor(numpy_spare, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return found | {f"cuda.{index}": state for index, state in enumerate(cuda)}


def restore_random(tensors: Mapping[str, Tensor]) -> None:
    """Puts back `random_tensors`. CUDA devices that this machine lacks are passed over."""
    spare = tensors["python.spare"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), spare[0] if spare else None))
    position, has_spare = tensors["numpy.place"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_spare, float(tensors["numpy.spare"])))
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
