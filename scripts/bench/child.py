"""A process of its own: how long it took and the most memory it held.

Knows commands; nothing of what they measure. Imports the standard library only: a child inherits its parent's peak of
resident memory until its own is larger, so whoever measures children stays small.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = ("qlora-cli", "bitsandbytes", "transformers", "torch")
PEER = ("trl", "peft", "bitsandbytes", "transformers", "accelerate", "datasets", "torch")
"""Packages whose versions belong to a result."""
UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of what the system counts a peak in."""
VERSIONS = """\
import importlib.metadata as m, json, platform, sys
found, missing = {"python": platform.python_version()}, []
for name in sys.argv[1:]:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        missing.append(name)
print(json.dumps([found, missing]))
"""


@dataclass(frozen=True)
class Finished:
    """A child that ended well."""

    seconds: float
    peak_rss: int


def run(command: Sequence[str | Path], log: Path) -> Finished:
    """Waits for a command whose output goes to `log`; ends this program with the log's end where it fails."""
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([str(part) for part in command], stdout=file, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
        raise SystemExit(f"{' '.join(map(str, command[:4]))} ... ended with {process.returncode}:\n{end}")
    return Finished(time.perf_counter() - started, usage.ru_maxrss * UNIT)


def versions(python: str, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(versions of the packages that `python` finds, names of those it does not)."""
    try:
        done = subprocess.run([python, "-c", VERSIONS, *names], capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"{python} cannot be started: {error.strerror}") from error
    if done.returncode:
        raise SystemExit(f"{python} is no working Python:\n{done.stderr}")
    found, missing = json.loads(done.stdout)
    return found, missing


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        values = {key.strip(): value.strip() for key, value in lines.items()}
        model, flags = values.get("model name", model), set(values.get("flags", "").split())
    features = sorted(flags & {"amx_bf16", "avx512_bf16", "avx512f", "avx2"})
    return {"cpu": model, "features": features, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
