"""Finding a base model: a local folder, or a snapshot of a Hub repository.

Knows files and the Hub, and loads nothing. Invariant: a `BaseFolder` holds a config and, when weights were asked for,
safetensors files that all lie inside it; pickles are refused and no code from a repository runs. What a folder says,
in its index, its config or a link, leads to no file outside of it, but for the Hub cache's links to its own blobs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from qlora_cli.errors import MachineError, ModelError, QloraError
from qlora_cli.files import MANIFEST, is_folder, manifest_problems, sample_hash, sha256
from qlora_cli.hub import hub_reachable

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
LONGEST_HUB_ID = 96 + 1 + 96
TRUST_FIX = "get the model from a source that you trust"
NO_CODE = "code that comes with a model repository is never run"
FOLDER_FIX = "or download the model elsewhere and name its folder in model.base"


@dataclass(frozen=True)
class BaseFolder:
    """A base model on this disk: the name the recipe gave, where its files are, and the Hub commit if it has one."""

    name: str
    path: Path
    revision: str | None

    def weight_files(self) -> list[Path]:
        """Its safetensors files, in the order of their names."""
        return sorted(self.path.glob("*.safetensors"))

    def hashes(self, digest: Callable[[Path], str] = sha256) -> dict[str, str]:
        """SHA-256 of every file that decides what the model computes, as `digest` takes it."""
        return {file.name: digest(file) for file in self._deciding()}

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of samples of the same files: quick for any size, and different for weights trained further. Taken
        once, so that every checkpoint of a run names the files as they were."""
        return {file.name: sample_hash(file) for file in self._deciding()}

    def _deciding(self) -> list[Path]:
        return [*self.weight_files(), *sorted(self.path.glob("*.json")), *sorted(self.path.glob("*.jinja"))]


def find_base(name: str, revision: str | None, weights: bool = True) -> BaseFolder:
    """The folder of base `name`; from the Hub it is downloaded, without its weights when `weights` is False.

    Raises `ModelError` for what is missing or unsafe, `MachineError` for a Hub out of reach or a login that lacks.
    """
    local = Path(name).expanduser()
    folder = BaseFolder(name, local, None) if is_folder(local) else _from_hub(name, revision, weights)
    _check_config(folder)
    if weights:
        _check_weights(folder)
    return folder


def _from_hub(name: str, revision: str | None, weights: bool) -> BaseFolder:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or len(name) > LONGEST_HUB_ID:
        raise ModelError(f"{name}: no such folder", fix="name a folder with config.json and *.safetensors, or a Hub id")
    wanted = [*TEXT_FILES, *(["*.safetensors"] if weights else [])]
    try:
        path = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=["*/*", "consolidated*"],
            local_files_only=not hub_reachable(),
        )
    except (OSError, ValueError, hub_errors.HfHubHTTPError, hub_errors.HFValidationError) as error:
        raise _hub_error(name, error) from error
    return BaseFolder(name, Path(path), Path(path).name)


def _hub_error(name: str, error: Exception) -> QloraError:
    if isinstance(error, hub_errors.GatedRepoError):
        return MachineError(
            f"{name} is gated on the Hub",
            why="its owner asks for a login that has accepted the licence",
            fix=f"accept it on the model's page, then run `hf auth login`; {FOLDER_FIX}",
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError | hub_errors.RevisionNotFoundError):
        return ModelError(
            f"{name}: no such folder here, and no such repository or revision on the Hub",
            why="a private repository looks the same without a login",
            fix=f"check the name; for a private one run `hf auth login`; {FOLDER_FIX}",
        )
    return MachineError(
        f"{name}: no such folder here, and the Hub cannot be reached",
        why="offline, a model must lie in a folder or in the Hub cache already",
        fix=f"check the path, or go online (`hf download {name}` fills the cache; `hf auth login` first "
        f"if it is gated), {FOLDER_FIX}",
    )


def _check_config(folder: BaseFolder) -> None:
    if (folder.path / "adapter_config.json").is_file() or (folder.path / "adapter").is_dir():
        raise ModelError(
            f"{folder.name} is an adapter or a run, not a model", fix="name the base that it was trained on"
        )
    if not (folder.path / "config.json").is_file():
        raise ModelError(f"{folder.name} has no config.json", fix="name the folder that holds config.json")
    check_links(folder.name, (file for pattern in (*TEXT_FILES, "*.safetensors") for file in folder.path.glob(pattern)))
    config = read_json(folder.path / "config.json")
    weights = config.get("transformers_weights")  # transformers reads this file in place of the usual ones
    if weights is not None and not _is_weight_file(weights):
        raise _leads_out(f"{folder.name}: transformers_weights in config.json is no *.safetensors beside it", weights)
    if kernel := _kernel(config):
        raise ModelError(
            f"{folder.name}: its config.json asks for the code of {kernel}",
            why=NO_CODE,
            fix="take that entry out of config.json, or choose another base",
        )


def _kernel(config: dict[str, Any]) -> str:
    """The Hub repository whose code a configuration, or a part of it, wants to compute with; empty for none."""
    parts: list[tuple[str, Any]] = [("", config)]
    while parts:
        key, value = parts.pop()
        if isinstance(value, dict):
            parts += [(key if "_implementation" in key else name, inner) for name, inner in value.items()]
        elif isinstance(value, list):
            parts += [(key, inner) for inner in value]
        elif isinstance(value, str) and "_implementation" in key and "/" in value:
            return value
    return ""


def own_code(path: Path) -> str:
    """The Python that a JSON file of transformers wants to be loaded with; empty for none."""
    wanted = read_json(path).get("auto_map") if path.is_file() else None
    values = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
    return "" if not wanted or not values else str(values[0])[:80]


def check_links(name: str, files: Iterable[Path]) -> None:
    """Raises `ModelError` for a file of a folder that is a link to somewhere else."""
    for file in files:
        if file.is_symlink() and not _leads_home(file):
            raise _leads_out(f"{name}: {file.name} is a link that leads out of its folder", os.path.realpath(file))


def _leads_home(file: Path) -> bool:
    """Whether a link ends in its folder, or, from a snapshot in the Hub's cache, among the blobs of its repository or
    of that cache."""
    home, end = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    blobs = [above / "blobs" for above in home.parents[1:3]] if home.parent.name == "snapshots" else []
    return any(end.is_relative_to(place) for place in (home, *blobs))


def hub_digest(file: Path) -> str | None:
    """SHA-256 by whose name the Hub's cache keeps a large file; None for a file of which it is not known."""
    if not file.is_symlink():
        return None
    blob = Path(os.path.normpath(Path(os.path.realpath(file.parent)) / file.readlink()))
    return blob.name if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) else None


def _leads_out(what: str, where: object) -> ModelError:
    why = "a model's folder must not read files elsewhere on this machine, nor anything but safetensors"
    return ModelError(f"{what}: {str(where)[:200]}", why=why, fix=f"{TRUST_FIX}, or copy the file into the folder")


def _is_weight_file(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _check_weights(folder: BaseFolder) -> None:
    check_manifest(folder.name, folder.path)
    index = folder.path / INDEX
    if index.is_file():
        _check_index(folder, read_json(index, unique=True))
    elif not folder.weight_files():
        raise _no_safetensors(folder)


_UNDAMAGED: set[tuple[object, ...]] = set()


def check_manifest(name: str, folder: Path, names: Collection[str] | None = None) -> None:
    """Raises `ModelError` unless every file of the manifest (or those of `names`) but the card, which anybody may edit,
    is as it was written. Every byte is read, once for files that nobody has touched since."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    state = (folder, str(names), *((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files))
    if state in _UNDAMAGED:
        return
    problems = [problem for problem in manifest_problems(folder, names) if not problem.startswith("README.md")]
    if problems:
        raise ModelError(
            f"{name} is damaged: {'; '.join(problems[:3])}",
            why=f"{MANIFEST} beside it says what was written",
            fix=f"take it from a copy, or write it again; if you changed it yourself, delete its {MANIFEST}",
        )
    _UNDAMAGED.add(state)


def _check_index(folder: BaseFolder, index: Any) -> None:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelError(f"{folder.name}: {INDEX} has no `weight_map` of file names", fix="download it again")
    shards = sorted(set(weight_map.values()))
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise ModelError(
            f"{folder.name}: {INDEX} names a file outside of its folder: {outside[0]}",
            why="a weight index must not read files elsewhere on this machine",
            fix=TRUST_FIX,
        )
    if other := [name for name in shards if not _is_weight_file(name)]:
        raise _leads_out(f"{folder.name}: {INDEX} names a file that is no *.safetensors", other[0])
    there = {file.name for file in folder.weight_files() if file.is_file()}
    if missing := [name[:80] for name in shards if name not in there]:
        names = f"{', '.join(missing[:3])} (by {INDEX})"
        raise ModelError(f"{folder.name}: {len(missing)} weight files are missing: {names}", fix="download it again")


def _no_safetensors(folder: BaseFolder) -> ModelError:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.path.glob(pattern))
    if not pickles:
        return ModelError(f"{folder.name} has no *.safetensors", fix="name the folder that holds the weights")
    return ModelError(
        f"{folder.name} has its weights as pickles only ({pickles[0]})",
        why="loading a pickle can run any code that it contains, so only safetensors are read",
        fix='convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder.path}', dtype='auto').save_pretrained('{folder.path}-safetensors')\", "
        "and copy the tokenizer's files beside it",
    )


def read_json(path: Path, unique: bool = False) -> Any:
    """The JSON object in `path`, or a `ModelError` that names it. `unique`: a key that comes twice is an error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once if unique else None)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}", fix="download or write it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)[:80]} comes twice")
    return found
