"""What a RUN, an adapter folder, a model or a recipe on the command line stands for.

Sees run directories. Invariant: what is evaluated or talked to uses the base, template and quantization that the
adapter was trained with, read from the recipe saved beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.model.adapter import CONFIG, load_into, read_adapter
from qlora_cli.model.base import load_base, load_config, load_tokenizer
from qlora_cli.model.device import compute_dtype, find_machine
from qlora_cli.model.folder import BaseFolder, find_base, read_json
from qlora_cli.model.lora import attach
from qlora_cli.recipe.schema import DataSection, ModelSection, Recipe
from qlora_cli.recipe.snapshot import read_resolved
from qlora_cli.workflows.card import ORIGIN_FILE, RECIPE_FILE
from qlora_cli.workflows.events import Emit, Notice
from qlora_cli.workflows.prepare import local_rank


@dataclass(frozen=True)
class Loaded:
    """A model ready to compute, its tokenizer, and the recipe it was trained with (or a plain one)."""

    model: Any
    tokenizer: Any
    recipe: Recipe
    device: torch.device


def adapter_folder(path: Path) -> Path:
    """The adapter in `path`: a run directory's adapter/, or the folder itself."""
    for folder in (path / "adapter", path):
        if (folder / CONFIG).is_file():
            return folder
    raise ModelError(
        f"{path} holds no adapter",
        why=f"neither {path / 'adapter' / CONFIG} nor {path / CONFIG} exists",
        fix="name a finished run directory or an adapter folder",
    )


def recipe_of(adapter: Path) -> Recipe:
    """The resolved recipe that lies beside an adapter."""
    if not (adapter / RECIPE_FILE).is_file():
        raise ModelError(
            f"{adapter} has no {RECIPE_FILE}",
            why="without it, base, quantization and template of the training are not known",
            fix="name an adapter that `qlora train` wrote",
        )
    return read_resolved(adapter / RECIPE_FILE)


@dataclass(frozen=True)
class Found:
    """A recipe, and the adapter to put on its base, if any."""

    recipe: Recipe
    adapter: Path | None


def find(target: str | None, adapter: Path | None) -> Found:
    """What `target` (a run, an adapter folder, or a model) and `--adapter` name. A target beside an adapter is the
    base to put it on; otherwise the base is the one that the adapter was trained on."""
    if adapter is not None:
        recipe = recipe_of(adapter_folder(adapter))
        moved = recipe.model.model_copy(update={"base": target, "revision": None}) if target else recipe.model
        return Found(recipe.model_copy(update={"model": moved}), adapter_folder(adapter))
    path = Path(str(target))
    if not path.is_dir() or is_model(path):
        return Found(plain_recipe(str(target)), None)
    if (path / "model" / RECIPE_FILE).is_file():
        return Found(_tuned_model(path / "model"), None)
    return Found(recipe_of(adapter_folder(path)), adapter_folder(path))


def is_model(path: Path) -> bool:
    """Whether the folder holds a model rather than a run."""
    return (path / "config.json").is_file()


def _tuned_model(folder: Path) -> Recipe:
    """The recipe of a full fine-tuning, with its result as the base."""
    recipe = recipe_of(folder)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(folder), "revision": None})})


def tell_changes(kind: str, now: Mapping[str, str], adapter: Path, emit: Emit) -> None:
    """Says which of the base's files or data sources differ from those that the adapter was trained on."""
    then = _origin(adapter).get(kind, {})
    files = then.keys() | now.keys() if kind == "base" else then.keys() & now.keys()
    changed = sorted(name for name in files if then.get(name) != now.get(name))
    if then and changed:
        emit(Notice(f"the {kind} is no longer what {adapter} was trained on: {', '.join(changed)} changed"))


def _origin(adapter: Path) -> dict[str, Any]:
    path = adapter / ORIGIN_FILE
    origin: dict[str, Any] = read_json(path) if path.is_file() else {}
    return origin


def _base_folder(found: Found) -> BaseFolder:
    """The base's files. One that was a folder is looked for where it was when the adapter was trained, should the
    recipe's path lead nowhere from here; it is never taken for a Hub id."""
    name, revision = found.recipe.model.base, found.recipe.model.revision
    was = _origin(found.adapter).get("base_folder") if found.adapter else None
    if was is None or Path(name).expanduser().is_dir():
        return find_base(name, revision)
    return find_base(was, None)


def tokenizer_of(found: Found) -> Any:
    """The tokenizer saved beside the adapter, or the base's."""
    return load_tokenizer(BaseFolder(str(found.adapter), found.adapter, None) if found.adapter else _base_folder(found))


def plain_recipe(model: str) -> Recipe:
    """The recipe for talking to a model as it is: 4-bit, no adapter, its own template."""
    return Recipe(model=ModelSection(base=model), lora=None, data=DataSection(train="-"))


def load_model(found: Found, emit: Emit) -> Loaded:
    """The base as the recipe says, with the adapter's values where there is one. The tokenizer (and with it the
    template) is the one saved beside the adapter."""
    recipe, adapter = found.recipe, found.adapter
    machine = find_machine(recipe.model.device, local_rank())
    dtype = compute_dtype(recipe.quantization.compute_dtype, machine)
    folder = _base_folder(found)
    load_config(folder)
    if adapter is not None:
        tell_changes("base", folder.fingerprint, adapter, emit)
    model = load_base(folder, recipe.model, recipe.quantization, dtype, machine.device)
    if adapter is not None:
        assert recipe.lora is not None, "an adapter's recipe has a lora section"
        tensors = read_adapter(adapter)[1]
        load_into(attach(model, recipe.lora, dtype, seed=0), tensors, adapter)
    return Loaded(model.eval(), tokenizer_of(found), recipe, machine.device)
