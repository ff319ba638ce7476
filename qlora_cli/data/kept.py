"""Encoded rows from the cache, or made and kept there.

Knows a cache, a source and what its rows are encoded with. Invariant: the key names everything that decides a byte of
the result: the source's content, the format, the template, the tokenizer, the limits, and this program's version.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from qlora_cli.cache.entries import Cache, key_of
from qlora_cli.data.store import Store
from qlora_cli.recipe.data_schema import DataSection, SourceSection

ENCODER = 1
"""Part of every key: raised when the same rows are encoded otherwise."""
SETTINGS = {
    "max_length",
    "source_max_length",
    "target_max_length",
    "too_long",
    "truncate",
    "loss_on",
    "on_bad_row",
}
"""Keys of the data section that decide how a row is encoded."""


def key(
    fingerprint: str, files: tuple[str, ...], source: SourceSection, data: DataSection, settings: Mapping[str, Any]
) -> str:
    """The name of what `source` becomes; `fingerprint` is of its content, `files` are named in its rows' places,
    `settings` are the format, template and tokenizer it came to."""
    window = {} if source.shuffle else source.model_dump(include={"skip", "take"})
    everything = {
        "encoder": ENCODER,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "files": files,
        "columns": source.columns,
        "window": window,
        **settings,
        **data.model_dump(include=SETTINGS),
    }
    return key_of({"source": fingerprint}, everything)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of all that a tokenizer does to a text: vocabulary, rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps([type(tokenizer).__name__, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(f"{rules}\n{special}\n{tokenizer.chat_template}".encode()).hexdigest()


def day_of(tokenizer: Any) -> str:
    """Today, where the template writes it; else empty."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    return datetime.date.today().isoformat() if "strftime_now" in template else ""


def kept(cache: Cache | None, name: str, write: Callable[[Path], None]) -> Store:
    """The store of this name from the cache, or what `write` puts into a folder; that is kept if there is a cache, and
    else goes when nobody uses it any more."""
    found = cache.load(name, Store) if cache else None
    if found is not None:
        store: Store = found
        return store
    folder = Path(tempfile.mkdtemp(prefix=".tmp-rows-", dir=cache.room() if cache else None))
    try:
        write(folder)
        entry = cache.adopt(name, folder) if cache else None
        store = Store(entry or folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if entry is None:
        weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    return store
