"""What a RUN, an adapter folder, a model or a recipe on the command line stands for.

Sees run directories. Invariant: what is evaluated or talked to uses the base, template and quantization that the
adapter was trained with, read from the recipe saved beside it; another base is refused unless the user allows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import Field

from qlora_cli.cache.entries import Cache, find_cache
from qlora_cli.errors import ModelError
from qlora_cli.model.adapter import CONFIG, put_adapter
from qlora_cli.model.base import is_packed, load_base, load_config, load_tokenizer, stored_quantization
from qlora_cli.model.device import compute_dtype, find_machine
from qlora_cli.model.folder import INDEX, BaseFolder, check_links, check_manifest, find_base, is_folder
from qlora_cli.model.record import Record, read_record
from qlora_cli.recipe.schema import DataSection, ModelSection, QuantizationSection, Recipe
from qlora_cli.recipe.snapshot import read_resolved
from qlora_cli.training.checkpoint import checkpoints
from qlora_cli.workflows.card import ORIGIN_FILE, RECIPE_FILE
from qlora_cli.workflows.events import Emit, Fact, Notice
from qlora_cli.workflows.prepare import local_rank

MERGED = "merge_receipt.json"
"""What `qlora merge` leaves beside a model."""
NO_ROWS = "-"
"""The rows of a model without a recipe."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to compute, its tokenizer, and the recipe it was trained with (or a plain one)."""

    model: Any
    tokenizer: Any
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype


class Origin(Record):
    """origin.json, as `card.py` writes it."""

    base: dict[str, str] = Field(default_factory=dict)
    base_folder: str | None = None
    data: dict[str, str] = Field(default_factory=dict)
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None


def adapter_folder(path: Path) -> Path:
    """The adapter in `path`: a run directory's adapter/, or the folder itself. Its files are as they were written."""
    if not is_folder(path):
        raise ModelError(f"{str(path)[:80]}: no such folder", fix="name a run directory or an adapter folder")
    for folder in (path / "adapter", path):
        if (folder / CONFIG).is_file():
            check_links(str(folder), folder.iterdir())
            check_manifest(str(folder), folder)
            return folder
    saved = [each.path for each in checkpoints(path / "checkpoints") if not each.problem]
    raise ModelError(
        f"{path} holds no adapter",
        why=f"neither {path / 'adapter' / CONFIG} nor {path / CONFIG} exists",
        fix=f"name a finished run directory or an adapter folder{f', say the checkpoint {saved[-1]}' if saved else ''}",
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
    """A recipe, and the adapter to put on its base, if any. `quantization` is what was asked for a model as it is
    (`auto`: what its files say); None stands for the recipe's. `base_named` tells that the command line named the base
    of the adapter."""

    recipe: Recipe
    adapter: Path | None
    quantization: str | None = None
    base_named: bool = False


def find(target: str | None, adapter: Path | None, quantization: str = "auto") -> Found:
    """What `target` (a run, an adapter folder, or a model) and `--adapter` name. A target beside an adapter is the
    base to put it on; otherwise the base is the one that the adapter was trained on."""
    found = _on_base(target, adapter) if adapter is not None else _find(str(target), quantization)
    if found.adapter is not None and quantization not in {"auto", found.recipe.quantization.type}:
        raise ModelError(
            f"--quantization {quantization} does not go with {found.adapter}",
            why=f"an adapter fits the base as it was trained, in {found.recipe.quantization.type}",
            fix="leave --quantization out",
        )
    return found


def _on_base(target: str | None, adapter: Path) -> Found:
    found = _of_adapter(adapter)
    if target is None:
        return found
    _check_named(target)
    tuned = Path(target) / "model"
    base = str(tuned) if is_folder(tuned) and (tuned / RECIPE_FILE).is_file() else target
    moved = found.recipe.model.model_copy(update={"base": base, "revision": None})
    return replace(found, recipe=found.recipe.model_copy(update={"model": moved}), base_named=True)


def _of_adapter(path: Path) -> Found:
    folder = adapter_folder(path)
    recipe = recipe_of(folder)
    if recipe.lora is None:
        raise ModelError(f"{folder / RECIPE_FILE} has no lora section", fix="name an adapter that `qlora train` wrote")
    return Found(recipe, folder)


def _find(target: str, quantization: str) -> Found:
    path = Path(target)
    if not is_folder(path):
        _check_named(target)
        return Found(plain_recipe(target), None, quantization)
    if (path / "model" / RECIPE_FILE).is_file() and not is_model(path):
        path = path / "model"
    if is_model(path) and (path / RECIPE_FILE).is_file():
        return Found(_tuned_model(path), None, quantization)
    return Found(plain_recipe(target), None, quantization) if is_model(path) else _of_adapter(path)


def _check_named(target: str) -> None:
    """Raises `ModelError` for what is no folder and cannot be a Hub id."""
    try:
        if not is_folder(Path(target).expanduser()):
            validate_repo_id(target)
    except (RuntimeError, HFValidationError) as error:  # there is no home of that user
        raise ModelError(
            f"{target[:80]}: no such run, folder or Hub id",
            fix="name a run directory, a folder with config.json and *.safetensors, or a Hub id",
        ) from error


def is_model(path: Path) -> bool:
    """Whether the folder holds a model rather than a run."""
    return is_folder(path) and (path / "config.json").is_file()


def _tuned_model(folder: Path) -> Recipe:
    """The recipe that lies beside a model (of a full fine-tuning, or merged), with that model as the base."""
    check_manifest(str(folder), folder, {RECIPE_FILE})
    recipe = recipe_of(folder)
    moved = recipe.model.model_copy(update={"base": str(folder), "revision": None})
    return recipe.model_copy(update={"model": moved, "lora": None})


def tell_changes(kind: str, now: Mapping[str, str], adapter: Path, emit: Emit) -> None:
    """Says which of the base's files or data sources differ from those that the adapter was trained on."""
    then = origin_of(adapter).get(kind, {})
    changed = sorted(name for name in then.keys() & now.keys() if then.get(name) != now.get(name))
    if changed:
        emit(Notice(f"the {kind} is no longer what {adapter} was trained on: {', '.join(changed)} changed"))


def trained_base(adapter: Path) -> dict[str, str]:
    """Hashes of the base's files that decide what the adapter computes with: weights and config.json, by name. The
    tokenizer and template in use are those beside the adapter."""
    return _deciding(origin_of(adapter).get("base", {}))


def _deciding(files: Mapping[str, str]) -> dict[str, str]:
    return {n: h for n, h in files.items() if n.endswith(".safetensors") or n in {"config.json", INDEX}}


def check_base(folder: BaseFolder, adapter: Path, emit: Emit, allow_changed: bool) -> bool:
    """Refuses a base that is not the one that the adapter was trained on, or says so where that is allowed; returns
    whether it is known to be another."""
    then, now = trained_base(adapter), _deciding(folder.fingerprint)
    if not then:
        emit(Notice(f"{adapter} has no record of its base's files: whether {folder.name} is that base is not known"))
    changed = [_change(name, then, now) for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if not then or not changed:
        return False
    what = f"the base {folder.name} is not the one that {adapter} was trained on: {', '.join(changed)}"
    if not allow_changed:
        raise ModelError(
            what,
            why="on other weights an adapter computes what nobody has trained or measured",
            fix="name that base (a folder, or a Hub id) before --adapter, or add --allow-changed-base",
        )
    emit(Notice(what))
    return True


def _change(name: str, then: Mapping[str, str], now: Mapping[str, str]) -> str:
    return f"{name} {'changed' if name in then and name in now else 'is new' if name in now else 'is missing'}"


def origin_of(adapter: Path) -> dict[str, Any]:
    """What lies beside an adapter about where it came from; empty where nothing does."""
    path = adapter / ORIGIN_FILE
    return read_record(path, Origin).model_dump(exclude_unset=True) if path.is_file() else {}


def base_folder(found: Found) -> BaseFolder:
    """The base's files. One that was a folder is looked for where it was when the adapter was trained, should the
    recipe's path lead nowhere from here, or to another base; it is never taken for a Hub id."""
    name, revision = found.recipe.model.base, found.recipe.model.revision
    was = origin_of(found.adapter).get("base_folder") if found.adapter and not found.base_named else None
    if found.adapter is None or was is None:
        return find_base(name, revision)
    here, there = Path(name).expanduser(), Path(was)
    if not is_folder(here) or (is_folder(there) and not _is_trained(here, found.adapter)):
        return find_base(was, None)
    return find_base(name, revision)


def _is_trained(folder: Path, adapter: Path) -> bool:
    """Whether it is the base that the adapter was trained on, as far as that was recorded."""
    then = trained_base(adapter)
    return not then or then == _deciding(BaseFolder(str(folder), folder, None).fingerprint)


def tokenizer_of(found: Found) -> Any:
    """The tokenizer saved beside the adapter, or the base's."""
    return load_tokenizer(BaseFolder(str(found.adapter), found.adapter, None) if found.adapter else base_folder(found))


def plain_recipe(model: str) -> Recipe:
    """The recipe for talking to a model as it is: 4-bit, no adapter, its own template."""
    return Recipe(model=ModelSection(base=model), lora=None, data=DataSection(train=NO_ROWS))


def load_bare(found: Found, emit: Emit, allow_changed_base: bool = False, others: Sequence[Path | None] = ()) -> Loaded:
    """The base as it is to be loaded, without the adapter but with the tokenizer (and so the template) saved beside
    that. It must be the base of the adapters in `others` too. Tells what it is loaded as."""
    machine = find_machine(found.recipe.model.device, local_rank())
    folder = base_folder(found)
    config = load_config(folder)
    for adapter in filter(None, (found.adapter, *others)):
        check_base(folder, adapter, emit, allow_changed_base)
    quantization = _quantization(found, folder, config)
    recipe = found.recipe.model_copy(update={"quantization": quantization})
    dtype = compute_dtype(quantization.compute_dtype, machine)
    stored = " as stored in its files" if is_packed(config) else ""
    emit(Fact("model", f"{folder.name}, {loaded_as(quantization, dtype)}{stored}"))
    cache = cache_of(quantization, emit)
    model = load_base(folder, recipe.model, quantization, dtype, machine.device, cache)
    return Loaded(model.eval(), tokenizer_of(found), recipe, machine.device, dtype)


def cache_of(quantization: QuantizationSection, emit: Emit) -> Cache | None:
    """Where a quantised base is kept, unless the recipe or the environment says that none is. Of the processes of a run
    only the first one writes there."""
    cache = find_cache(quantization.cache, lambda text: emit(Fact("cache", text)), lambda text: emit(Notice(text)))
    return replace(cache, keeps=local_rank() == 0) if cache else None


def _quantization(found: Found, folder: BaseFolder, config: Any) -> QuantizationSection:
    """How the base is to be stored: as its files are where those are in 4 bits; else what was asked for; else as the
    adapter's or the tuned model's recipe says. A merged model is never quantised unasked: it is shipped in 16 bits."""
    section, asked = found.recipe.quantization, found.quantization
    if is_packed(config):
        stored = stored_quantization(folder, config, section)
        if asked not in {None, "auto", stored.type}:
            raise ModelError(f"{folder.name} is already quantised ({stored.type})", fix="leave --quantization out")
        return stored
    if asked is None or (asked == "auto" and not (folder.path / MERGED).is_file()):
        return section
    return section.model_copy(update={"type": "none" if asked == "auto" else asked})


def loaded_as(quantization: QuantizationSection, dtype: torch.dtype) -> str:
    """How weights are stored, in words."""
    kind = str(dtype).removeprefix("torch.")
    if quantization.type == "none":
        return f"not quantised, in {kind}"
    double = " with double quantization" if quantization.double_quant else ""
    return f"in 4 bits ({quantization.type}{double}), computing in {kind}"


def load_model(found: Found, emit: Emit, allow_changed_base: bool = False) -> Loaded:
    """The base as the recipe says, with the adapter's values where there is one."""
    loaded = load_bare(found, emit, allow_changed_base)
    if found.adapter is not None:
        lora = loaded.recipe.lora
        assert lora is not None, "an adapter's recipe has a lora section"
        put_adapter(loaded.model, lora, loaded.dtype, found.adapter)
    return replace(loaded, model=loaded.model.eval())
