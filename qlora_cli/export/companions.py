"""What lies beside a model's weights: configuration, tokenizer, template.

Knows files. Invariant: nothing but text that transformers reads goes along, never weights, pickles or another run's
receipts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qlora_cli.files import MANIFEST, disk_errors, write_json
from qlora_cli.model.folder import INDEX, TEXT_FILES, read_json

CONFIG = "config.json"
RECEIPTS = ("merge_receipt.json", "quantize_report.json", "origin.json", "adapter_config.json")


def copy_companions(source: Path, target: Path) -> None:
    """Copies the text files beside a model's weights, but for its config, index, manifest and receipts."""
    left_out = {CONFIG, INDEX, MANIFEST, *RECEIPTS}
    with disk_errors(target):
        for file in sorted({file for pattern in TEXT_FILES for file in source.glob(pattern)}):
            if file.is_file() and file.name not in left_out:
                shutil.copyfile(file, target / file.name)


def write_config(
    source: Path, target: Path, dtype: str, quantization: dict[str, Any] | None, vocabulary: int | None = None
) -> None:
    """config.json of `source` with another dtype and quantization (None: 16 or 32 bits), and with embeddings for
    `vocabulary` tokens (None: as many as it has)."""
    config = {key: value for key, value in read_json(source / CONFIG).items() if key != "quantization_config"}
    config.pop("torch_dtype", None)  # what transformers 4 called dtype
    config["dtype"] = dtype
    if vocabulary is not None:
        text = config.get("text_config")
        (text if isinstance(text, dict) else config)["vocab_size"] = vocabulary
    write_json(target / CONFIG, config | ({"quantization_config": quantization} if quantization else {}))
