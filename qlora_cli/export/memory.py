"""Keeps a program that handles one large tensor after another from holding the memory of several.

Knows glibc's allocator. Invariant: it changes when memory is handed back, and nothing of what is computed.
"""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3
"""malloc.h"""


def return_freed_memory() -> None:
    """Makes glibc hand buffers of 2 MB and more back when they are freed. By default its limit rises to 32 MB with what
    a program frees; tensors' buffers then stay in the heap, and more with each."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, 1 << 21)
