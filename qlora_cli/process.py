"""The process of a training run: settings that its libraries read before Python could tell them anything else.

Knows the environment and the command line's words; no library. Invariant: what the user has set stays, and a process is
started anew at most once.

The first two lower the peak of resident memory on a CPU at the same speed, the third saves time (docs/benchmarks.md).
The last two are for Linux with glibc, and not for machines with a GPU, where they were not measured.

- oneDNN and its cache in torch keep a kernel for each of 1,024 shapes of products, half a megabyte each. A micro-batch
  has about a hundred, and making one takes up to 3 ms (on CPUs with AMX; less than one on others).
- torch asks glibc for aligned blocks, of which glibc cuts pieces of some bytes, and puts these into caches of small
  blocks where they no longer merge with their neighbours: the heap grows although much of it is free. The caches can
  only be switched off before a process begins.
- What is freed glibc gives back to the system, to ask for it again a moment later, and the system fills it with zeros,
  page by page. It is told to keep it, and to ask for large pages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

COMMAND = "train"
"""The one for which this was measured."""
KERNELS = 192
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
TUNABLES = "GLIBC_TUNABLES"
HEAP = (
    "glibc.malloc.tcache_count=0",
    "glibc.malloc.mxfast=0",
    f"glibc.malloc.mmap_threshold={2**32}",
    f"glibc.malloc.trim_threshold={2**33}",
    "glibc.malloc.hugetlb=1",
)
GPUS = ("/dev/nvidiactl", "/dev/kfd")
"""Where a driver of NVIDIA or AMD is at work."""


def settle(words: Sequence[str]) -> None:
    """Gives this process, which runs the command line `words` and has loaded nothing yet, what its command needs; may
    replace it by the same program in another environment, and not return."""
    if not words or words[0] != COMMAND:
        return
    for name in CACHES:
        os.environ.setdefault(name, str(KERNELS))
    wanted = tunables(os.environ)
    if wanted is None or not has_glibc() or any(map(os.path.exists, GPUS)) or not sys.executable:
        return
    os.environ[TUNABLES] = wanted
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # it runs as it is, in more memory
        return


def tunables(environment: Mapping[str, str]) -> str | None:
    """The value of GLIBC_TUNABLES with ours; None where it says something about one of them already."""
    given = environment.get(TUNABLES, "")
    if any(setting.partition("=")[0] in given for setting in HEAP):
        return None
    return ":".join([given, *HEAP] if given else HEAP)


def has_glibc() -> bool:
    """Whether this system's C library is glibc."""
    return "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and bool(os.confstr("CS_GNU_LIBC_VERSION"))
