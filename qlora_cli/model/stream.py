"""A base's tensors for transformers to quantise, each read from its file when its turn comes.

Knows safetensors' layout and what `from_pretrained` takes; nothing of quantising. Invariant: at most the tensor whose
turn it is is in memory, and no page of a file stays mapped. Names, types, ties, buffers and errors are transformers'
own, which only gets its tensors from here instead of from files that it maps as a whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.model.folder import INDEX, BaseFolder
from qlora_cli.model.source import Entry, Source
from qlora_cli.model.stored import generation_config

WHOLE = "model.safetensors"
"""The file that transformers reads before it looks for an index."""


@dataclass(frozen=True)
class Streamed:
    """A tensor that lies in a file, from its byte `start` on."""

    entry: Entry
    start: int

    def __getitem__(self, whole: EllipsisType) -> Tensor:
        """The tensor, as transformers asks for it when its turn comes."""
        if not self.entry.elements:
            return torch.empty(self.entry.shape, dtype=self.entry.dtype)
        content = mmap(-1, self.entry.bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)  # a heap would keep it when it is free
        with self.entry.file.open("rb") as file:
            file.seek(self.start)
            if file.readinto(content) != len(content):
                raise ModelError(f"{self.entry.file} became shorter while it was read", fix="download it again")
        return torch.frombuffer(content, dtype=self.entry.dtype).view(self.entry.shape)[whole]


def loader(folder: BaseFolder, config: Any) -> partial[Any]:
    """`from_pretrained` for the folder: from its tensors, streamed; or from its files, where transformers is to choose
    between them, or to say what is wrong with them."""
    kind = _class(config)
    tensors = _tensors(folder) if kind and _plain(folder, config) else {}
    if not tensors:
        return partial(AutoModelForCausalLM.from_pretrained, folder.path)
    own = config if isinstance(config, kind.config_class) else config.get_text_config()  # as the auto class does
    return partial(kind.from_pretrained, None, config=own, state_dict=tensors)


def _class(config: Any) -> Any:
    """The one that `AutoModelForCausalLM` takes for it; None where it would choose between several, or has none."""
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if known else None
    return kind if isinstance(kind, type) else None


def name_after(folder: BaseFolder, model: Any) -> None:
    """What `from_pretrained` takes from a folder beside tensors."""
    model.config.name_or_path = str(folder.path)
    for part in model.modules():  # those of its own configuration: parts of a composite one have names of their own
        if isinstance(part, PreTrainedModel) and part.config is model.config:
            part.name_or_path = model.config.name_or_path
    if model.can_generate():
        model.generation_config = generation_config(folder)


def _plain(folder: BaseFolder, config: Any) -> bool:
    """Whether it is clear which files hold the weights: those of an index, or a single one."""
    special = getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None)
    names = [file.name for file in folder.weight_files()]
    return not special and (WHOLE not in names if (folder.path / INDEX).is_file() else names == [WHOLE])


def _tensors(folder: BaseFolder) -> dict[str, Streamed]:
    """All tensors by their names in the files; none where a file is damaged or holds something strange."""
    try:
        entries = Source(folder).entries
    except ModelError:
        return {}
    starts = {file: _starts(file) for file in {entry.file for entry in entries.values()}}
    return {name: Streamed(entry, starts[entry.file][name]) for name, entry in entries.items()}


def _starts(path: Path) -> dict[str, int]:
    """Where each tensor begins: eight bytes tell the length of a JSON header, and tensors follow it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + facts["data_offsets"][0] for name, facts in header.items() if name != "__metadata__"}
