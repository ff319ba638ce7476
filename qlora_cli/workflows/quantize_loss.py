"""What quantising does to the loss: the same rows through the 16-bit model and each 4-bit variant of it.

Sees a model, rows and settings. Invariant: one model is in memory at a time, and all of them compute in the same type.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.dataset import Setting, load_held_out
from qlora_cli.data.encode import Encoded
from qlora_cli.data.formats import FORMATS, fitting
from qlora_cli.data.sources import read_rows
from qlora_cli.errors import DataError, ModelError
from qlora_cli.evaluation.paired import Interval, RowLosses, paired_difference, row_losses
from qlora_cli.model.base import load_base, load_config, load_tokenizer
from qlora_cli.model.device import DTYPES, Machine
from qlora_cli.model.folder import BaseFolder
from qlora_cli.recipe.schema import DataSection, ModelSection, QuantizationSection
from qlora_cli.recipe.snapshot import read_resolved
from qlora_cli.training.guard import memory_guard
from qlora_cli.workflows.card import RECIPE_FILE
from qlora_cli.workflows.events import Emit, Fact, Stage

MOST_LENGTH, BATCH = 1024, 4


@dataclass(frozen=True)
class Rows:
    """The file, and what of it is measured."""

    file: str
    encoded: Sequence[Encoded]


@dataclass(frozen=True)
class Measured:
    """Losses before and, by variant, after, and their paired differences (after - before)."""

    data: str
    dtype: str
    before: RowLosses
    after: Mapping[str, RowLosses]
    difference: Mapping[str, Interval]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "data": self.data,
            "rows": len(self.before.where),
            "targets": int(self.before.targets.sum()),
            "compute_dtype": self.dtype,
            "before": _figures(self.before),
            "after": {
                name: _figures(losses) | {"difference": asdict(self.difference[name])}
                for name, losses in self.after.items()
            },
        }


def _figures(losses: RowLosses) -> dict[str, float]:
    return {"loss": losses.loss, "perplexity": losses.perplexity}


def read_rows_of(folder: BaseFolder, file: str, format_: str | None, max_length: int | None, emit: Emit) -> Rows:
    """The rows of `file`, encoded with the model's own tokenizer and template (that of its training, where it was
    trained here)."""
    positions = getattr(load_config(folder).get_text_config(), "max_position_embeddings", None) or MOST_LENGTH
    length = min(MOST_LENGTH, positions) if max_length is None else max_length
    if length > positions:
        raise ModelError(f"--max-length is {length}, but {folder.name} was trained for {positions} positions")
    source = read_rows(file, "train")
    recipe = folder.path / RECIPE_FILE
    template = read_resolved(recipe).data.template if recipe.is_file() else "auto"
    shape = format_ or _format_of(file, source[0].values)
    section = DataSection.model_validate(
        {"train": file, "eval": file, "format": shape, "max_length": length, "template": template}
    )
    encoded = load_held_out(section, Setting(load_tokenizer(folder))).rows
    used, tokens = encoded.source_rows(), int(encoded.targets.sum())
    dropped = f"; {len(source) - used:,} left out, longer than {length:,} tokens or empty" if used < len(source) else ""
    emit(Fact("data", f"{used:,} of {len(source):,} rows of {file}, {tokens:,} tokens with loss{dropped}"))
    return Rows(file, encoded)


def _format_of(file: str, row: Mapping[str, Any]) -> str:
    names = fitting(row)
    if len(names) == 1:
        return names[0]
    fields = ", ".join(f"`{name}`" for name in sorted(row))
    raise DataError(
        f"{file}: its first row {f'fits {chr(32).join(names)}' if names else 'fits no format'} (it has: {fields})",
        fix=f"name its format with --format: {', '.join(FORMATS)}",
    )


@dataclass(frozen=True)
class Measuring:
    """A model of type `dtype`, and the rows to measure it on."""

    folder: BaseFolder
    rows: Rows
    dtype: torch.dtype
    machine: Machine
    emit: Emit

    def measure(self, variants: Mapping[str, QuantizationSection], stored: Mapping[str, Path]) -> Measured:
        """Losses of the 16-bit model and of each variant: read from its folder where it is in `stored`, else quantised
        on loading."""
        first = next(iter(variants.values()))
        before = self._losses("the model as it is", self.folder, first.model_copy(update={"type": "none"}))
        places = {name: BaseFolder(str(path), path, None) for name, path in stored.items()}
        after = {name: self._losses(name, places.get(name, self.folder), each) for name, each in variants.items()}
        differences = {name: paired_difference(before, each) for name, each in after.items()}
        return Measured(self.rows.file, str(self._compute).removeprefix("torch."), before, after, differences)

    @property
    def _compute(self) -> torch.dtype:
        """The model's type, where the machine computes in it."""
        possible = {DTYPES[name] for name in self.machine.computes}
        return self.dtype if self.dtype in possible else DTYPES[self.machine.preferred]

    def _losses(self, what: str, source: BaseFolder, section: QuantizationSection) -> RowLosses:
        self.emit(Stage(f"measuring {what} on {len(self.rows.encoded):,} rows"))
        with memory_guard(f"measuring {what}"):
            model = load_base(source, ModelSection(base=source.name), section, self._compute, self.machine.device)
            found = row_losses(model.eval(), self.rows.encoded, BATCH)
        del model
        gc.collect()
        return found
