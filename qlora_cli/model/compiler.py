"""Whether parts of the engine can be compiled on this machine.

Knows what compilers need. Invariant: finding out compiles nothing; that it works shows when it does.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from qlora_cli.cache.entries import cache_place
from qlora_cli.model.native.build import why_not


def why_no_compiler(device: torch.device) -> str:
    """Empty where there is what compiling for `device` needs; else what is missing."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    return why_not()


def keep_compiled() -> None:
    """Lets torch keep what it compiles where qlora keeps bases, unless the environment names another place."""
    place = cache_place()
    if place is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place / "compiled"))
