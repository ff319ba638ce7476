"""What decided a run's result: content hashes, revisions, versions, device, seed.

Sees a prepared run. Invariant: it identifies content by hashes and holds no secret.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any

import torch

from qlora_cli import __version__
from qlora_cli.cache.entries import Cache
from qlora_cli.files import sha256
from qlora_cli.workflows.prepare import Prepared

LIBRARIES = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors", "tokenizers")


def lock(ready: Prepared, cache: Cache | None) -> dict[str, Any]:
    """The values of lock.json. Files of a Hub model are identified by its commit, local ones by their hashes, which a
    `cache` remembers from start to start."""
    local = ready.folder.revision is None
    return {
        "qlora": __version__,
        "base": {"name": ready.folder.name, "revision": ready.folder.revision},
        "base_sha256": ready.folder.hashes(cache.hashes.sha256 if cache else sha256) if local else None,
        "base_samples": ready.folder.fingerprint,
        "data": {source.source: source.sha256 for source in ready.data.receipt.sources},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "python": sys.version.split()[0],
        "device": ready.machine.name,
        "threads": torch.get_num_threads() if ready.machine.device.type == "cpu" else None,
        "compute_dtype": str(ready.dtype).removeprefix("torch."),
        "seed": ready.recipe.train.seed,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
