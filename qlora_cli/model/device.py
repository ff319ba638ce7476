"""The machine: which device computes, in which types it can, and how much memory it has left.

Knows torch's view of the hardware and nothing of models. Invariant: a `Machine` names a device that is present, and
`compute_dtype` returns a type that it computes in.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_cli.errors import MachineError
from qlora_cli.model.nf4 import cpu_has_native_bf16

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Files of a control group: its limit, what is used, and the line of memory.stat that says what can be dropped."""


@dataclass(frozen=True)
class Machine:
    """A device and the types that it computes in, the preferred one among them."""

    device: torch.device
    name: str
    computes: tuple[str, ...]
    preferred: str


def find_machine(wanted: str, local_rank: int = 0) -> Machine:
    """The device that `model.device` asks for: auto, cpu or cuda."""
    present = torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise MachineError(
            "model.device is cuda, but no CUDA device is present",
            why=_why_no_cuda(),
            fix="set model.device to auto or cpu, e.g. -s model.device=cpu",
        )
    return _cuda(local_rank) if present and wanted != "cpu" else _cpu()


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    return f"torch {torch.__version__} finds no device; `nvidia-smi` shows whether the driver does"


def _cuda(index: int) -> Machine:
    device = torch.device("cuda", index)
    native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere brought bfloat16
    computes = ("bfloat16", "float16", "float32") if native else ("float16", "float32")
    return Machine(device, torch.cuda.get_device_name(device), computes, computes[0])


def _cpu() -> Machine:
    preferred = "bfloat16" if cpu_has_native_bf16() else "float32"
    threads = torch.get_num_threads()
    return Machine(torch.device("cpu"), f"CPU ({threads} threads)", ("bfloat16", "float32"), preferred)


def compute_dtype(wanted: str, machine: Machine) -> torch.dtype:
    """The type that `quantization.compute_dtype` asks for on this machine; `auto` takes the machine's preference."""
    name = machine.preferred if wanted == "auto" else wanted
    if name not in machine.computes:
        raise MachineError(
            f"quantization.compute_dtype is {name}, but {machine.name} does not compute in it",
            why=f"it computes in {' and '.join(machine.computes)}",
            fix=f"set quantization.compute_dtype to auto or {machine.preferred}",
        )
    return DTYPES[name]


def peak_memory(device: torch.device) -> int:
    """Most bytes held since `restart_peak`, or so far: allocated on a CUDA device, resident for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return _field(STATUS, "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def restart_peak(device: torch.device) -> int:
    """Forgets the peak so far, where the system can, and returns the bytes that are held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # Linux: proc(5), clear_refs
        CLEAR_REFS.write_text("5", encoding="ascii")
    return _field(STATUS, "VmRSS") or peak_memory(device)


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that this process may take in addition: on CUDA what the driver says is free, on a CPU what Linux can give
    without swapping, or what is left of the control group's limit; None where it is not known. `root`: of the system's
    files."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    known = [_field(root / "proc/meminfo", "MemAvailable"), *_groups_left(root)]
    return min((count for count in known if count is not None), default=None)


def _field(path: Path, name: str) -> int | None:
    """Bytes of a line `name: 123 kB`."""
    with suppress(OSError):
        lines = path.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
    return None


def _groups_left(root: Path) -> Iterator[int]:
    """What each limit leaves of the control groups that this process is in: version 2 (one hierarchy, without a
    controller's name), version 1 (one for memory). In a container, its own group is often the hierarchy's root."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            names = V1 if controllers else V2
            own = base / path.lstrip("/")
            for folder in (own, *(parent for parent in own.parents if parent == base or base in parent.parents)):
                left = _left(folder, *names)
                if left is not None:
                    yield left


def _left(folder: Path, limit: str, usage: str, droppable: str) -> int | None:
    """What is left of a group's limit; pages of files that the system may drop count as left."""
    try:
        most, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
    except (OSError, ValueError):  # no such group or controller; `max`: no limit
        return None
    counts = dict[str, int]()
    with suppress(OSError):
        lines = (folder / "memory.stat").read_text(encoding="ascii").split("\n")
        counts = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value}
    return max(0, most - used + counts.get(droppable, 0))


def make_deterministic(wanted: bool) -> None:
    """Asks torch for deterministic kernels alone. Before the first CUDA call."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
