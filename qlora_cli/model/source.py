"""The tensors of a model folder, one at a time.

Knows safetensors files, their index and their names in the Hub's cache. Invariant: at most the tensor asked for is in
memory; files are opened for each read, so that no mapped page outlives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.model.folder import INDEX, BaseFolder, hub_digest, read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the types that weights have."""
Digests = Callable[[Sequence[Path]], Mapping[Path, str]]
"""SHA-256 of each of some files."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.elements * self.dtype.itemsize


class Source:
    """A model's tensors by their names in its files."""

    def __init__(self, folder: BaseFolder) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file in _files(folder):
            self.entries |= _entries(file)
        _check_index(folder, {name: entry.file for name, entry in self.entries.items()})

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        with _opened(self.entries[name].file) as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    def pieces(self, name: str, most_bytes: int) -> Iterator[Tensor]:
        """The tensor's rows, in order, about `most_bytes` at a time; a scalar or an empty one whole."""
        entry = self.entries[name]
        if not entry.shape or entry.bytes <= most_bytes:
            yield self.read(name)
            return
        step = max(1, most_bytes * entry.shape[0] // entry.bytes)
        for start in range(0, entry.shape[0], step):
            with _opened(entry.file) as file:
                piece = file.get_slice(name)[start : start + step].clone()
            yield piece


def _files(folder: BaseFolder) -> list[Path]:
    """The files that the index names; all of them where there is none."""
    index = folder.path / INDEX
    if not index.is_file():
        return folder.weight_files()
    return sorted({folder.path / name for name in read_json(index)["weight_map"].values()})


def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt", device="cpu")


def check_files(folder: BaseFolder, digests: Digests) -> None:
    """Raises `ModelError`, naming the file, unless every weight file is as long as its header says and holds what the
    index says. Flipped bits of a weight show only in the Hub's cache, which names files by their SHA-256."""
    _check_index(folder, {name: file for file in _files(folder) for name in _header(file)})
    named = {file: digest for file in folder.weight_files() if (digest := hub_digest(file))}
    for file, digest in digests(list(named)).items():
        if digest != named[file]:
            raise ModelError(
                f"{folder.name}: {file.name} is damaged: its SHA-256 is not the one that the Hub's cache names it by",
                fix=f"remove {file.resolve()} and download it again",
            )


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(type, shape) of every tensor in a file."""
    try:
        with _opened(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is damaged or half-written: {error}", fix="download or write the model again"
        ) from error


def _entries(path: Path) -> dict[str, Entry]:
    found = _header(path)
    strange = sorted({dtype for dtype, _ in found.values()} - DTYPES.keys())
    if strange:
        raise ModelError(f"{path} holds tensors of type {strange[0]}", fix="name a model in 16 or 32 bits")
    return {name: Entry(path, DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}


def _check_index(folder: BaseFolder, files: Mapping[str, Path]) -> None:
    """`files`: in which file each tensor is."""
    index = folder.path / INDEX
    if not index.is_file():
        return
    weight_map = read_json(index)["weight_map"]
    missing = sorted(name for name, file in weight_map.items() if name not in files or files[name].name != file)
    if missing:
        raise ModelError(
            f"{folder.name}: {len(missing)} tensors that {INDEX} names are not in their files, e.g. {missing[0]} in "
            f"{weight_map[missing[0]]}",
            fix="download or write the model again",
        )
