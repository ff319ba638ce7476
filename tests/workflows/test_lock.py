"""lock.json: what decided a run's result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.cache import hashes
from qlora_cli.cache.entries import Cache
from qlora_cli.recipe.load import load_recipe
from qlora_cli.workflows.lock import lock
from qlora_cli.workflows.prepare import prepare


def test_hashes_of_the_base_are_those_that_the_cache_remembers(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)
    ready = prepare(load_recipe(str(recipe_file())), weights=True, emit=lambda event: None)
    cache = Cache(tmp_path / "cache", 10**9, print, print)
    first = lock(ready, cache)["base_sha256"]
    assert first == lock(ready, None)["base_sha256"] and {"config.json", "model.safetensors"} <= first.keys()
    known = json.loads(cache.hashes.memory.read_text())
    assert len(known) == len(first)
    assert all(facts.pop("seal") for facts in known.values())
    marked = {place: hashes.sealed(place, facts | {"sha256": "known"}) for place, facts in known.items()}
    cache.hashes.memory.write_text(json.dumps(marked))
    assert lock(ready, cache)["base_sha256"] == dict.fromkeys(first, "known")
