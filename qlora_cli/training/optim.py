"""Optimizer and learning rate.

Knows one recipe section. Invariant: the learning rate is a pure function of the step, so that it cannot jump when a
run is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from qlora_cli.recipe.schema import TrainSection

BITSANDBYTES_ON_CUDA: Mapping[str, str] = {
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "adamw_8bit": "AdamW8bit",
}
BITSANDBYTES_ON_CPU: Mapping[str, str] = {  # nothing pages there: the same states, kept in plain memory
    "paged_adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "AdamW32bit",
    "adamw_8bit": "AdamW8bit",
}
STATE_BYTES: Mapping[str, float] = {
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "adamw": 8,
}
"""Optimizer state per trained parameter: two moments, and one float32 constant per 256 values where they are 8-bit."""


def build_optimizer(
    parameters: Sequence[torch.nn.Parameter], train: TrainSection, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names, for this device; `adamw` is torch's fused one."""
    options: dict[str, Any] = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    import bitsandbytes.optim  # here, so that `model/nf4.py` comes first and quiets its import

    names = BITSANDBYTES_ON_CUDA if device.type == "cuda" else BITSANDBYTES_ON_CPU
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, names[train.optimizer])(parameters, **options)
    return optimizer


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the state that the first step would make, so that memory which does not suffice is missed before it."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if hasattr(optimizer, "init_state"):  # bitsandbytes
                optimizer.init_state(group, parameter, group_index, index)
            else:
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": step, **moments}


def paging_note(train: TrainSection, device: torch.device) -> str:
    """What the console says when a paged optimizer cannot page; empty when there is nothing to say."""
    if device.type == "cuda" or not train.optimizer.startswith("paged_"):
        return ""
    return f"{train.optimizer}: nothing pages on a CPU; the same optimizer states are kept in plain memory"


def warmup_steps(train: TrainSection, total: int) -> int:
    """Steps of warm-up, from `warmup_steps` or `warmup_ratio` (rounded up)."""
    return train.warmup_steps or math.ceil(train.warmup_ratio * total)


def lr_at(step: int, total: int, train: TrainSection, raised: Sequence[tuple[int, int]] = ()) -> float:
    """Learning rate of 0-based `step` of `total`. Warm-up rises linearly to the peak at its last step; then it is
    constant, or falls as a line or half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983) towards 0 at `total`.

    `raised` are (step, new total) of each time that the run was resumed there with more steps: from there on the rate
    falls anew, from the value that it had towards 0 at the new total, so that it never jumps. A warm-up is as long as
    the first total made it.
    """
    warmup = warmup_steps(train, total)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    start, peak, end = warmup, train.lr, total
    for at, later in raised:
        if step < at:
            break
        if at > warmup:
            peak *= DECAY[train.schedule]((at - start) / max(1, end - start))
            start = at
        end = later
    return peak * DECAY[train.schedule]((step - start) / max(1, end - start))


DECAY: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "constant_with_warmup": lambda progress: 1.0,
    "linear": lambda progress: max(0.0, 1.0 - progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))),
}
