"""What `qlora merge` starts from: an adapter, the base it was trained on, and how that was computed.

Sees run directories and the records beside an adapter. Invariant: base and adapter are, bit for bit, those of the
training, or the user has allowed another base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.model.device import DTYPES, compute_dtype, find_machine
from qlora_cli.model.folder import BaseFolder, is_folder, read_json
from qlora_cli.recipe.schema import LoraSection
from qlora_cli.workflows.events import Emit, Fact, Stage
from qlora_cli.workflows.locate import (
    Found,
    base_folder,
    check_base,
    find,
    is_model,
    origin_of,
    tokenizer_of,
)
from qlora_cli.workflows.rundir import STATUS

RUNS = Path("out")
"""Where runs are when nothing else is said."""


@dataclass(frozen=True)
class Mergeable:
    """An adapter with its base. `dtype` is the type that the training computed in."""

    found: Found
    adapter: Path
    folder: BaseFolder
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    base_changed: bool


def default_output(adapter: Path, name: str) -> Path:
    """RUN/NAME for a run's adapter, ADAPTER-NAME for any other."""
    adapter = adapter if adapter.name not in {"", ".."} else adapter.resolve()
    return adapter.parent / name if adapter.name == "adapter" else adapter.with_name(f"{adapter.name}-{name}")


def check_mergeable(found: Found, allow_changed_base: bool, emit: Emit) -> Mergeable:
    """The adapter found with its base, checked against the record of the training."""
    assert found.adapter is not None, "what was found is an adapter"
    folder = base_folder(found)
    changed = check_base(folder, found.adapter, emit, allow_changed_base)
    if not allow_changed_base:
        _check_every_byte(folder, found.adapter, emit)
    machine = find_machine(found.recipe.model.device)
    name = origin_of(found.adapter).get("compute_dtype")
    dtype = DTYPES[name] if name else compute_dtype(found.recipe.quantization.compute_dtype, machine)
    return Mergeable(found, found.adapter, folder, tokenizer_of(found), machine.device, dtype, changed)


def find_adapter(target: str | None, adapter: Path | None, emit: Emit) -> Found:
    """The adapter that a RUN and `--adapter` name; without either, that of the newest finished run below out/."""
    if target is None and adapter is None:
        target = str(_newest_run(emit))
    if target is not None and adapter is None and not is_folder(Path(target)):
        raise ModelError(f"{target[:80]}: no such folder", fix="name a run directory, or --adapter DIR")
    return _with_adapter(find(target, adapter), target)


def check_settings(config: Mapping[str, Any], lora: LoraSection, adapter: Path) -> None:
    """Raises `ModelError` where the adapter's own config would scale it otherwise than its recipe."""
    said = (config.get("r"), config.get("lora_alpha"), config.get("use_rslora"))
    if said != (lora.r, lora.alpha, lora.rslora):
        raise ModelError(
            f"{adapter}: adapter_config.json says r, lora_alpha, use_rslora are {said}",
            why=f"its recipe says {(lora.r, lora.alpha, lora.rslora)}, and the two scale the adapter differently",
            fix="take the adapter from a copy, or train again",
        )


def _newest_run(emit: Emit) -> Path:
    """The run below out/ that finished last and has an adapter; says which."""
    finished = {path.parent: ended for path in RUNS.glob(f"*/{STATUS}") if (ended := _finished_at(path)) is not None}
    if not finished:
        raise ModelError(f"no finished run with an adapter is in {RUNS}/", fix="name a run directory, or --adapter DIR")
    newest = max(finished, key=finished.__getitem__)
    emit(Fact("run", f"{newest}, the newest that finished"))
    return newest


def _finished_at(status: Path) -> float | None:
    """When the run of this status.json finished with an adapter; None if it did not, or the file is no run's."""
    try:
        values = json.loads(status.read_text(encoding="utf-8"))
        done = values["state"] == "finished" and (status.parent / "adapter").is_dir()
        return float(values["updated"]) if done else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _with_adapter(found: Found, target: str | None) -> Found:
    if found.adapter is not None:
        return found
    if target is not None and is_model(Path(target)):
        raise ModelError(f"{target} is a model: there is no adapter to merge", fix="name a run, or add --adapter DIR")
    raise ModelError(
        f"{target} trained every weight: there is nothing to merge",
        why="a run without lora writes a whole model",
        fix=f"use {target}/model as it is",
    )


def _check_every_byte(folder: BaseFolder, adapter: Path, emit: Emit) -> None:
    """Compares the base's files with the SHA-256 that the run recorded, if it did: those of a local base."""
    lock = next((path for parent in adapter.parents[:3] if (path := parent / "lock.json").is_file()), None)
    then = read_json(lock).get("base_sha256") if lock else None
    if not then:
        return
    if not isinstance(then, dict):
        raise ModelError(f"{lock}: base_sha256 is not as it was written", fix="take the run from a copy")
    emit(Stage(f"checking {folder.name} against {lock}"))
    now = folder.hashes()
    changed = sorted(name for name in then if name.endswith(".safetensors") and then[name] != now.get(name))
    if changed:
        raise ModelError(
            f"the base {folder.name} is not the one that {adapter} was trained on: {', '.join(changed)} changed",
            why=f"its SHA-256 is not the one in {lock}",
            fix="name that base before --adapter, or add --allow-changed-base",
        )
