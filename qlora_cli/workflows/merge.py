"""`qlora merge`: one model out of a base and its adapter, compared with both before it gets its name.

Sees run directories and the recipe beside the adapter. Invariant: under the final name stands a whole model that was
read back and found to be the one trained, or one whose card says that nobody looked.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from qlora_cli.data.dataset import load_data, load_held_out
from qlora_cli.data.encode import Encoded
from qlora_cli.data.turns import turn_encoder
from qlora_cli.errors import DataError, ModelError
from qlora_cli.evaluation.divergence import Divergence, diverge
from qlora_cli.export.memory import return_freed_memory
from qlora_cli.export.merge import Delta, Kind, Merger, deltas, merged_bytes
from qlora_cli.export.tokens import NewRows, new_rows
from qlora_cli.export.weights import BaseWeights
from qlora_cli.files import check_space, disk_errors, staged_folder, write_json, write_manifest, write_text
from qlora_cli.model.adapter import parted, read_adapter, token_ids
from qlora_cli.model.base import GENERATION_CONFIG, load_base
from qlora_cli.model.folder import BaseFolder, read_json
from qlora_cli.recipe.schema import DataSection, QuantizationSection
from qlora_cli.training.guard import memory_guard
from qlora_cli.workflows.card import RECIPE_FILE, base_line
from qlora_cli.workflows.events import Emit, Fact, Meter, Notice, Saved, Stage
from qlora_cli.workflows.locate import MERGED, Loaded, base_folder, load_model, origin_of, tell_changes
from qlora_cli.workflows.mergeable import Mergeable, check_mergeable, check_settings, default_output, find_adapter
from qlora_cli.workflows.receipt import LEAST_SURVIVAL, Candidate, Receipt, merged_card
from qlora_cli.workflows.rows import setting_of
from qlora_cli.workflows.rundir import check_replaceable

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Base = Literal["auto", "dequantized", "original", "requantized"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ROWS_AT_ONCE = 1
"""Rows compared at once: two models' logits of one row are many bytes already."""


@dataclass(frozen=True)
class MergeOptions:
    """What to merge, how, and how to prove it."""

    target: str | None = None
    adapter: Path | None = None
    output: Path | None = None
    base: Base = "dequantized"
    dtype: str | None = None
    verify: bool = True
    verify_data: Path | None = None
    verify_rows: int = 64
    tolerance: float = 0.01
    overwrite: bool = False
    allow_changed_base: bool = False


@dataclass(frozen=True)
class MergeResult:
    """The merged model."""

    output: Path
    receipt: Receipt
    others: tuple[Receipt, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"event": "result", "output": str(self.output), **self.receipt.as_json(self.others)}


def run_merge(options: MergeOptions, emit: Emit) -> MergeResult:
    """Merges. Raises `ModelError` when the merged model is further from base + adapter than the tolerance."""
    found = find_adapter(options.target, options.adapter, emit)
    assert found.adapter is not None, "what was found is an adapter"
    output = options.output or default_output(found.adapter, "merged")
    check_replaceable(output, options.overwrite, MERGED, [found.adapter, base_folder(found).path])
    source = check_mergeable(found, options.allow_changed_base, emit)
    return_freed_memory()
    job = _Job(options, source, output, emit)
    with staged_folder(output, options.overwrite) as staging:
        receipt, others = job.fill(staging)
    emit(Saved("merged model", output) if receipt.divergence else Notice(f"{output} was not compared with anything"))
    return MergeResult(output, receipt, tuple(others))


class _Job:
    """A merge under way."""

    def __init__(self, options: MergeOptions, source: Mergeable, output: Path, emit: Emit) -> None:
        self._options, self._source, self._emit = options, source, emit
        data = source.found.recipe.data
        self._stop_ids = turn_encoder(source.tokenizer, data.template, data.format).stop_ids
        self._rows, self._rows_from = self._read_rows(data) if options.verify else ((), "")
        self._weights = BaseWeights(source.folder, source.found.recipe.quantization, source.dtype, source.device)
        self._deltas, self._new = self._read_adapter()
        self._candidates = self._possible()
        needed = max(merged_bytes(self._weights, each.base, DTYPES[each.dtype]) for each in self._candidates)
        check_space(output, needed * min(2, len(self._candidates)))

    def _read_adapter(self) -> tuple[dict[str, Delta], dict[str, NewRows]]:
        adapter, lora = self._source.adapter, self._source.found.recipe.lora
        assert lora is not None, "an adapter's recipe has a lora section"
        config, tensors = read_adapter(adapter)
        check_settings(config, lora, adapter)
        layers, tokens = parted(tensors)
        found = deltas(self._weights, layers, lora, adapter)
        ids = token_ids(config, adapter)
        rows = new_rows(self._weights, ids, tokens, adapter)
        four_bit = sum(layer.four_bit for layer in self._weights.layers.values())
        self._emit(Fact("base", f"{self._source.folder.name}, {four_bit} layers in 4 bits"))
        new = f", {len(ids)} new tokens" if ids else ""
        self._emit(Fact("adapter", f"{adapter}, {len(found)} layers{new}"))
        return found, rows

    def _read_rows(self, data: DataSection) -> tuple[Sequence[Encoded], str]:
        """Rows to compare on, and where they come from."""
        count = self._options.verify_rows
        if self._options.verify_data is not None:
            data = data.model_copy(update={"eval": str(self._options.verify_data), "eval_split": None})
        setting = setting_of(self._source.found.recipe, self._source.tokenizer, self._emit)
        try:
            if data.eval is None and data.eval_split is None:
                self._emit(Notice("the run held no rows out: the models are compared on rows that it trained on"))
                return load_data(data, setting).train[:count], f"{data.title} (trained on)"
            rows, sources, _ = load_held_out(data, setting)
            tell_changes("data", sources, self._source.adapter, self._emit)
            return rows[:count], data.eval or f"{data.title} (held out)"
        except DataError as error:
            raise DataError(
                f"no rows to compare the merged model on: {error.problems[0].what}",
                why="a merged model counts as good once it was compared with base + adapter",
                fix="name rows of the recipe's format with --verify-data FILE, or add --no-verify",
                where=error.problems[0].where,
            ) from error

    def _possible(self) -> list[Candidate]:
        """The ways to merge that were asked for; `auto` stands for all that this base allows."""
        asked = KINDS if self._options.base == "auto" else (self._options.base,)
        refused = {kind: problem for kind in asked if (problem := self._impossible(kind))}
        if len(refused) == len(asked):
            raise refused[asked[0]]
        return [Candidate(kind, self._dtype_of(kind)) for kind in asked if kind not in refused]

    def _dtype_of(self, kind: Kind) -> str:
        """What is stored in 4 bits keeps the type that training computed in."""
        if kind != "requantized":
            return self._options.dtype or "bf16"
        return next(name for name, dtype in DTYPES.items() if dtype == self._weights.dtype)

    def _impossible(self, kind: Kind) -> ModelError | None:
        name = self._source.folder.name
        if kind == "original" and self._weights.is_packed:
            return ModelError(
                f"{name} holds 4-bit weights: there are no original ones to merge into",
                fix="merge with --base dequantized, or name the 16-bit base before --adapter",
            )
        if kind == "requantized" and self._weights.section.type == "none":
            return ModelError(f"the run did not quantise {name}", fix="merge with --base dequantized")
        return None

    def fill(self, staging: Path) -> tuple[Receipt, list[Receipt]]:
        """Writes the merged model into `staging`; returns its receipt, and those of what was measured beside it."""
        measured = sorted(self._measured(staging), key=lambda receipt: receipt.distance)
        if not measured:
            raise ModelError("no way of merging gives finite weights", fix="merge with --dtype fp32")
        best, *others = measured
        if not best.passed:
            raise self._refusal(best, others, staging)
        self._take(staging, best, others)
        return best, others

    def _measured(self, staging: Path) -> Iterator[Receipt]:
        """Writes and measures every candidate; the folder of the best one so far is kept."""
        best: Receipt | None = None
        for candidate in self._candidates:
            folder = _place(staging, candidate)
            folder.mkdir()
            receipt = self._attempt_or_none(candidate, folder)
            if receipt is None:
                shutil.rmtree(folder)
                continue
            yield receipt
            if best is None or receipt.distance < best.distance:
                best, receipt = receipt, best or receipt
            if receipt is not best:
                shutil.rmtree(_place(staging, receipt.candidate))

    def _attempt_or_none(self, candidate: Candidate, folder: Path) -> Receipt | None:
        """A candidate that cannot be written (values that its type cannot hold, say) is only told where there are
        others."""
        try:
            return self._attempt(candidate, folder)
        except ModelError as error:
            if len(self._candidates) == 1:
                raise
            self._emit(Notice(f"{candidate}: {error.problems[0].what}"))
            return None

    def _attempt(self, candidate: Candidate, folder: Path) -> Receipt:
        """Writes one candidate, reads it back and compares it."""
        merger = Merger(self._weights, self._deltas, candidate.base, DTYPES[candidate.dtype], self._new)
        total = sum(self._weights.source.entries[name].bytes for name in self._weights.names)
        merger.write(folder, Meter(f"merging, {candidate}", total, self._emit))
        divergence = self._compare(folder, candidate) if self._rows else None
        kept, error = merger.survival.share, merger.survival.error
        changed, limit = self._source.base_changed, self._options.tolerance
        receipt = Receipt(candidate, kept, error, divergence, self._rows_from, limit, changed)
        self._emit(Fact("receipt", receipt.line()))
        return receipt

    def _compare(self, folder: Path, candidate: Candidate) -> Divergence:
        self._emit(Stage(f"comparing it with base + adapter on {len(self._rows):,} rows"))
        section = self._source.found.recipe.model
        dtype = DTYPES[candidate.dtype]
        with memory_guard("comparing the merged model"):
            reference = self._reference.model
            plain = QuantizationSection(type="none", double_quant=False)
            merged = load_base(BaseFolder(str(folder), folder, None), section, plain, dtype, self._source.device)
            return diverge(reference, merged.eval(), self._rows, ROWS_AT_ONCE, self._source.device)

    @cached_property
    def _reference(self) -> Loaded:
        return load_model(self._source.found, lambda event: None, self._options.allow_changed_base)

    def _refusal(self, best: Receipt, others: Sequence[Receipt], staging: Path) -> ModelError:
        """Says why the best candidate is not good enough, and which other way would be: measured, not guessed."""
        tried = {best.candidate, *(other.candidate for other in others)}
        ways = [way for dtype in DTYPES if (way := Candidate("dequantized", dtype)) not in tried]
        passing = next((way for way in ways if best.divergence and self._passes(way, staging)), None)
        nothing = (
            "no other --base or --dtype passes: serve base and adapter as they are, or accept a larger --tolerance"
        )
        return ModelError(
            f"the merged model ({best.candidate}) is not the one that was trained: {best.line()}",
            why=f"mean KL may be at most {best.tolerance:g} nats per token, and at least {LEAST_SURVIVAL:.0%} of the "
            "delta must survive",
            fix=f"`{passing}` passes" if passing else nothing,
        )

    def _passes(self, candidate: Candidate, staging: Path) -> bool:
        self._emit(Notice(f"measuring whether {candidate} would do"))
        try:
            with tempfile.TemporaryDirectory(dir=staging) as folder:
                return self._attempt(candidate, Path(folder)).passed
        except ModelError as error:
            self._emit(Notice(f"{candidate}: {error.problems[0].what}"))
            return False

    def _take(self, staging: Path, receipt: Receipt, others: Sequence[Receipt]) -> None:
        """Puts the chosen candidate in place, with everything that belongs beside it."""
        chosen = _place(staging, receipt.candidate)
        with disk_errors(staging):
            for file in list(chosen.iterdir()):
                file.replace(staging / file.name)
            chosen.rmdir()
            self._source.tokenizer.save_pretrained(staging)
            shutil.copyfile(self._source.adapter / RECIPE_FILE, staging / RECIPE_FILE)
        write_json(staging / GENERATION_CONFIG, self._generation_config(staging))
        write_json(staging / MERGED, receipt.as_json(others))
        recipe, adapter = self._source.found.recipe, self._source.adapter
        card = merged_card(recipe, base_line(recipe, origin_of(adapter)), adapter.name, receipt, others)
        write_text(staging / "README.md", card)
        write_manifest(staging)

    def _generation_config(self, folder: Path) -> dict[str, Any]:
        """The base's, ending answers where training did."""
        path = folder / GENERATION_CONFIG
        return {**(read_json(path) if path.is_file() else {}), "eos_token_id": sorted(self._stop_ids)}


def _place(staging: Path, candidate: Candidate) -> Path:
    """Where a candidate is written while others are measured."""
    return staging / f".{candidate.base}"
