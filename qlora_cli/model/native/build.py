"""The C++ files beside this one as a library, compiled for this machine and kept for the next start.

Knows compilers and files; nothing of what the functions compute. Invariant: what is loaded was compiled from these very
sources by this compiler for this processor, and is byte for byte what was kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from qlora_cli.cache.entries import cache_place
from qlora_cli.files import sha256

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in {".cpp", ".h"})
ROUNDING = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
"""What is written as two operations is rounded twice."""
WIDE = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
FLAGS = ("-std=c++17", "-O3", "-march=native", *WIDE, *ROUNDING, "-fopenmp", "-shared", "-fPIC")
SECONDS = 120
"""That compiling may take; it takes two."""


class NotBuiltError(Exception):
    """There is no library here; why, in a few words."""


def compiler() -> str | None:
    """The C++ compiler's path: what CXX names, or g++."""
    return shutil.which(os.environ.get("CXX") or "g++")


def why_not() -> str:
    """Empty where the library can be expected to build, else what is missing."""
    if sys.platform != "linux":
        return "not on this system"
    return "" if compiler() else "there is no C++ compiler"


@cache
def library() -> ctypes.CDLL:
    """Compiled if it was not kept. `NotBuiltError`."""
    if reason := why_not():
        raise NotBuiltError(reason)
    found = compiler()
    assert found
    return _library(found)


def run(function: str, call: ctypes.Structure) -> None:
    """One of the library's functions that take a structure and say whether they lacked memory: `MemoryError`."""
    if getattr(library(), function)(ctypes.byref(call)):
        raise MemoryError(function)


def _library(compiler: str) -> ctypes.CDLL:
    try:
        key = _key(compiler)
        place = cache_place()
        if place is not None:
            with suppress(OSError):
                return _kept(compiler, place / "compiled", key)
        with tempfile.TemporaryDirectory(prefix="qlora-", ignore_cleanup_errors=True) as folder:
            return _kept(compiler, Path(folder), key)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotBuiltError(_in_words(compiler, error)) from error


def _key(compiler: str) -> str:
    """Names what decides how the library comes out."""
    version = _run([compiler, "--version"])
    facts = [*(path.read_text() for path in SOURCES), version, *FLAGS, *_processor()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _run(command: list[str]) -> str:
    """What it says."""
    said: bytes = subprocess.check_output(command, stderr=subprocess.STDOUT, timeout=SECONDS)
    return said.decode(errors="replace")


def _processor() -> list[str]:
    """What decides which instructions -march=native is."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    about = {line for line in lines if re.match(r"flags|features|model|vendor_id|cpu family|cpu part", line, re.I)}
    return [platform.machine(), *sorted(about)]


def _kept(compiler: str, folder: Path, key: str) -> ctypes.CDLL:
    """A file's name holds the hash of its content, so that damage shows."""
    for path in folder.glob(f"{key}-*.so"):
        if path.stem == f"{key}-{sha256(path)[:16]}":
            return _load(path)
        path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as staging:
        made = Path(staging) / "made.so"
        command = [compiler, *FLAGS, "-o", str(made), *(str(path) for path in SOURCES if path.suffix == ".cpp")]
        _run(command)
        path = folder / f"{key}-{sha256(made)[:16]}.so"
        made.replace(path)
    return _load(path)


def _load(path: Path) -> ctypes.CDLL:
    """With the OpenMP of torch: another one would bring threads of its own, which fight with those for the cores."""
    before = _openmp()
    found = ctypes.CDLL(str(path))
    if not before or before != _openmp():
        raise NotBuiltError("its OpenMP is not torch's")
    return found


def _openmp() -> set[str]:
    """The OpenMP libraries of this process."""
    words = Path("/proc/self/maps").read_text(errors="replace").split()
    return {word for word in words if re.match(r"lib(g|i)?omp", Path(word).name)}


def _in_words(compiler: str, error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.output.decode(errors="replace").splitlines()
        said = next((line for line in lines if "error" in line), f"exit code {error.returncode}")
        return f"{Path(compiler).name}: {said.strip()[:200]}"
    return str(error)
