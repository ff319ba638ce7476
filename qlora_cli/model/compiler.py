"""Whether torch can compile on this machine.

Knows what torch's compiler needs. Invariant: finding out compiles nothing; that it works shows when it does.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from qlora_cli.cache.entries import cache_place


def why_no_compiler(device: torch.device) -> str:
    """Empty where torch.compile has what it needs for `device`; else what is missing."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return "" if any(map(shutil.which, names)) else "there is no C++ compiler"


def keep_compiled() -> None:
    """Lets torch keep what it compiles where qlora keeps bases, unless the environment names another place."""
    place = cache_place()
    if place is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place / "compiled"))
