"""The machine: which device computes, and in which types it can.

Knows torch's view of the hardware and nothing of models. Invariant: a `Machine` names a device that is present, and
`compute_dtype` returns a type that it computes in.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

from qlora_cli.errors import MachineError
from qlora_cli.model.nf4 import cpu_has_native_bf16

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    """Most bytes held so far: allocated on a CUDA device, resident for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
