"""`qlora quantize`: a 16-bit model in 4 bits, with what that did to it.

Sees a model, and rows to measure it on. Invariant: a folder stands under its final name only once every tensor in it
was read back and found equal to what was computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.export.digest import check_digests
from qlora_cli.export.memory import return_freed_memory
from qlora_cli.export.quantize import Quantizer, layers_left_out
from qlora_cli.export.weights import BaseWeights
from qlora_cli.files import check_space, staged_folder, write_json, write_manifest, write_text
from qlora_cli.model.base import is_packed, load_config
from qlora_cli.model.device import DTYPES, Machine, find_machine
from qlora_cli.model.folder import BaseFolder, find_base
from qlora_cli.model.writer import SHARD_BYTES
from qlora_cli.recipe.hints import nearest_word
from qlora_cli.recipe.schema import QuantizationSection
from qlora_cli.workflows.card import RECIPE_FILE
from qlora_cli.workflows.events import Emit, Meter, Saved
from qlora_cli.workflows.plot import check_plot, plot_damage
from qlora_cli.workflows.prepare import local_rank
from qlora_cli.workflows.quantize_loss import Measured, Measuring, Rows, read_rows_of
from qlora_cli.workflows.quantize_text import QuantizeResult, card
from qlora_cli.workflows.rundir import check_replaceable
from qlora_cli.workflows.storage import check_blocks

REPORT = "quantize_report.json"


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantise, where to, and what to measure. `compare` names variants, e.g. `fp4-nodq-128`."""

    section: QuantizationSection
    output: Path | None = None
    dtype: str = "auto"
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False
    compare: tuple[str, ...] = ()
    plot: Path | None = None
    data: str | None = None
    format: str | None = None
    max_length: int | None = None

    def measuring(
        self, plot: Path | None, data: str | None, format_: str | None, max_length: int | None
    ) -> QuantizeOptions:
        """The same with a picture, and rows to measure on."""
        return replace(self, plot=plot, data=data, format=format_, max_length=max_length)


def section_of(
    kind: str, double_quant: bool, blocksize: int, compute_dtype: str, skip: Sequence[str]
) -> QuantizationSection:
    """What the command line asks for, as a recipe would say it."""
    values = {"type": kind, "double_quant": double_quant, "blocksize": blocksize, "compute_dtype": compute_dtype}
    return QuantizationSection.model_validate({**values, "skip_modules": tuple(skip)})


def run_quantize(model: str, options: QuantizeOptions, emit: Emit) -> QuantizeResult:
    """Quantises `model` (a folder, or a Hub id) into `options.output`; without one, measures the variants of
    `options.compare` only."""
    variants = _variants(options)
    if options.output is not None:
        check_replaceable(options.output, options.overwrite, REPORT, [Path(model)])
    check_plot(options.plot)
    machine = find_machine("auto", local_rank())
    folder = _find(model)
    weights = _weights(folder, options, machine)
    rows = read_rows_of(folder, options.data, options.format, options.max_length, emit) if options.data else None
    cast = None if options.dtype == "auto" else weights.dtype
    quantizer = Quantizer(weights, variants, cast)
    if options.output is not None:
        check_space(options.output, quantizer.estimate(variant_name(options.section)))
    return_freed_memory()
    job = _Job(folder, options, weights, quantizer, rows, machine, emit)
    result = job.write(options.output) if options.output is not None else job.compare()
    if options.plot is not None:
        plot_damage(result.damage, options.plot)
    return result


@dataclass(frozen=True)
class _Job:
    """All that was checked before the first weight is read."""

    folder: BaseFolder
    options: QuantizeOptions
    weights: BaseWeights
    quantizer: Quantizer
    rows: Rows | None
    machine: Machine
    emit: Emit

    def compare(self) -> QuantizeResult:
        """Measures, and writes nothing."""
        total = sum(self.weights.source.entries[name].bytes for name in self.quantizer.layers)
        self.quantizer.measure(Meter("quantising", total, self.emit))
        return self._result(None, self._losses(None))

    def write(self, output: Path) -> QuantizeResult:
        """The folder, complete and read back."""
        weights, options = self.weights, self.options
        total = sum(weights.source.entries[name].bytes for name in weights.names)
        compute = options.section.compute_dtype
        with staged_folder(output, options.overwrite) as staging:
            digests = self.quantizer.write(
                staging,
                variant_name(options.section),
                weights.dtype if compute == "auto" else DTYPES[compute],
                Meter("quantising", total, self.emit),
                options.shard_bytes,
            )
            self._read_back(staging, digests)
            result = self._result(output, self._losses(staging))
            self._write_papers(staging, result)
        self.emit(Saved("4-bit model", output))
        return result

    def _read_back(self, staging: Path, digests: Mapping[str, str]) -> None:
        """Every tensor as it was written, and all that its configuration asks for."""
        size = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
        check_digests(staging, digests, Meter("reading back", size, self.emit))
        written = BaseWeights(
            BaseFolder(staging.name, staging, None), self.options.section, self.weights.dtype, torch.device("cpu")
        )
        layers = [name for name, layer in written.layers.items() if layer.four_bit]
        assert is_packed(written.config) and layers == [n for n in written.names if n in written.constants]
        assert set(layers) == set(self.quantizer.layers), "other layers are in 4 bits than were quantised"

    def _losses(self, staging: Path | None) -> Measured | None:
        if self.rows is None:
            return None
        chosen = variant_name(self.options.section)
        stored = {chosen: staging} if staging is not None else {}
        measuring = Measuring(self.folder, self.rows, self.weights.dtype, self.machine, self.emit)
        return measuring.measure(_variants(self.options), stored)

    def _result(self, output: Path | None, losses: Measured | None) -> QuantizeResult:
        entries = self.weights.source.entries.values()
        return QuantizeResult(
            model=self.folder.name,
            revision=self.folder.revision,
            output=output,
            section=self.options.section,
            chosen=variant_name(self.options.section),
            dtype=str(self.weights.dtype).removeprefix("torch."),
            left_out=tuple(sorted(self.weights.skipped)),
            parameters=sum(entry.elements for entry in entries),
            bytes_before=sum(entry.bytes for entry in entries),
            other_bytes=self.quantizer.other_bytes(),
            damage=self.quantizer.damage,
            losses=losses,
        )

    def _write_papers(self, staging: Path, result: QuantizeResult) -> None:
        """Report and card; the recipe that a tuned model brings along, since it names the template; the manifest."""
        write_json(staging / REPORT, result.as_json() | {"base": self.folder.fingerprint})
        write_text(staging / "README.md", card(result))
        recipe = self.folder.path / RECIPE_FILE
        if recipe.is_file():
            write_text(staging / RECIPE_FILE, recipe.read_text(encoding="utf-8"))
        write_manifest(staging)


def _find(model: str) -> BaseFolder:
    """The model's folder; a Hub model that is quantised already is refused before its weights are downloaded."""
    folder = find_base(model, None, weights=False)
    if is_packed(load_config(folder)):
        raise ModelError(
            f"{model} is already quantised to 4 bits",
            why="quantising its rounded weights again would only add error",
            fix="name the 16-bit model that it was made from",
        )
    return find_base(model, None)


def _weights(folder: BaseFolder, options: QuantizeOptions, machine: Machine) -> BaseWeights:
    """The base with the layers that will be in 4 bits; every name of --skip leaves out at least one."""
    stored = getattr(load_config(folder), "dtype", None) or torch.bfloat16
    dtype = stored if options.dtype == "auto" else DTYPES[options.dtype]
    if dtype not in DTYPES.values():
        raise ModelError(f"{folder.name} says that it is in {dtype}", fix="choose a type with --dtype bf16")
    whole = options.section.model_copy(update={"skip_modules": ()})
    all_layers = BaseWeights(folder, whole, dtype, machine.device)
    for skip in options.section.skip_modules:
        _check_skip(all_layers, skip)
    skips = bool(options.section.skip_modules)
    weights = BaseWeights(folder, options.section, dtype, machine.device) if skips else all_layers
    if not any(layer.four_bit for layer in weights.layers.values()):
        raise ModelError(
            f"{folder.name} has no layer to quantise",
            why="only linear layers become 4-bit ones, but for the head, tied weights and --skip",
            fix="use the model as it is",
        )
    for section in _variants(options).values():
        check_blocks(weights.model, section, torch.device("cpu"))
    return weights


def _check_skip(weights: BaseWeights, skip: str) -> None:
    if layers_left_out(weights, skip):
        return
    names = [layer.name for layer in weights.layers.values() if layer.four_bit]
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = nearest_word(skip, names if "." in skip else ends)
    raise RecipeError(
        f"--skip {skip} names no layer of this model",
        why=f"its 4-bit layers end in {', '.join(ends)}",
        fix=f"did you mean --skip {near}?" if near else "name one of those, or a layer's full name",
    )


def _variants(options: QuantizeOptions) -> dict[str, QuantizationSection]:
    """The sections to measure by their names, that to be written first."""
    found = {} if options.output is None else {variant_name(options.section): options.section}
    for text in options.compare:
        section = _variant(text, options.section)
        found.setdefault(variant_name(section), section)
    return found


def variant_name(section: QuantizationSection) -> str:
    """`nf4`, `fp4-nodq`, `nf4-128`: type, `nodq` without double quantization, a blocksize other than 64."""
    blocksize = [str(section.blocksize)] if section.blocksize != 64 else []
    return "-".join([section.type, *([] if section.double_quant else ["nodq"]), *blocksize])


def _variant(text: str, section: QuantizationSection) -> QuantizationSection:
    kind, *rest = text.strip().lower().split("-")
    sizes = [word for word in rest if word != "nodq"]
    known = {str(size) for size in QuantizationSection.model_fields["blocksize"].annotation.__args__}  # type: ignore
    if kind not in {"nf4", "fp4"} or len(sizes) > 1 or not known.issuperset(sizes):
        raise RecipeError(
            f"--compare: {text!r} is no variant",
            fix="name nf4 or fp4, with -nodq for no double quantization and a blocksize, e.g. nf4,fp4,nf4-nodq-128",
        )
    changes = {"type": kind, "double_quant": "nodq" not in rest, "blocksize": int(sizes[0]) if sizes else 64}
    return section.model_copy(update=changes)
