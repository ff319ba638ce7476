"""The frozen base model and its tokenizer.

Knows transformers' loading. Invariant: a loaded base is frozen, holds its linear layers in the storage the recipe
names and everything else in one dtype, and its 4-bit layers keep their packed format (see `nf4.keep_packed_format`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_cli.cache.entries import Cache
from qlora_cli.cache.hashes import taken
from qlora_cli.errors import ModelError
from qlora_cli.model.folder import NO_CODE, BaseFolder, own_code, read_json
from qlora_cli.model.lora import linear_shape
from qlora_cli.model.nf4 import (
    four_bit_layers,
    keep_packed_format,
    quantized_shape,
    stored_bytes,
    stored_constants,
    stored_facts,
)
from qlora_cli.model.quantizer import loading_config
from qlora_cli.model.segments import keep_soft_cap
from qlora_cli.model.source import Source, check_files
from qlora_cli.model.stored import Wanted, load_through
from qlora_cli.model.stream import loader, name_after
from qlora_cli.recipe.schema import ModelSection, QuantizationSection

GENERATION_CONFIG = "generation_config.json"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError)
"""What transformers raises for a file whose values it does not understand."""


@dataclass(frozen=True)
class BaseReport:
    """What the base holds: parameters in all and in 4 bits, and bytes of each kind."""

    parameters: int
    four_bit_parameters: int
    four_bit_bytes: int
    other_bytes: int

    @property
    def share_not_four_bit(self) -> float:
        """Share of the parameters that are not in 4 bits: embeddings, head, norms, and MoE experts."""
        return 1 - self.four_bit_parameters / self.parameters

    @property
    def bits_per_parameter(self) -> float:
        """Of those in 4 bits, of which there must be some: codes and constants."""
        return 8 * self.four_bit_bytes / self.four_bit_parameters


def load_config(folder: BaseFolder) -> Any:
    """The model's configuration; code that comes with a repository is not run."""
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    except (*MALFORMED, OSError, StrictDataclassError) as error:
        _refuse_code(folder, "config.json")
        raise ModelError(
            f"{folder.name}: its config.json is not one that the installed transformers knows: {_first_line(error)}",
            why=NO_CODE,
            fix="install a newer transformers, or choose another base",
        ) from error
    stored = getattr(config, "quantization_config", None)
    if stored and not is_packed(config):
        method = stored.get("quant_method") if isinstance(stored, dict) else type(stored).__name__
        raise ModelError(
            f"{folder.name} is already quantised ({method}), and not to bitsandbytes' 4 bits",
            fix="name the original 16-bit model in model.base",
        )
    return config


def is_packed(config: Any) -> bool:
    """Whether the files hold 4-bit weights, as `qlora quantize` or transformers wrote them."""
    stored = getattr(config, "quantization_config", None)
    return (
        isinstance(stored, dict) and stored.get("quant_method") == "bitsandbytes" and bool(stored.get("load_in_4bit"))
    )


def stored_quantization(folder: BaseFolder, config: Any, section: QuantizationSection) -> QuantizationSection:
    """`section` with the type, constants and layers left out that the files have (see `is_packed`)."""
    stored = config.quantization_config
    return section.model_copy(
        update={
            "type": stored.get("bnb_4bit_quant_type", "fp4"),
            "double_quant": bool(stored.get("bnb_4bit_use_double_quant")),
            "storage_dtype": stored.get("bnb_4bit_quant_storage") or "uint8",
            "skip_modules": tuple(stored.get("llm_int8_skip_modules") or ()),
            "blocksize": _stored_blocksize(folder) or section.blocksize,
        }
    )


def _stored_blocksize(folder: BaseFolder) -> int | None:
    """That of the first 4-bit weight in the files; None where there is none, or no file yet (a dry run)."""
    if not folder.weight_files():
        return None
    source = Source(folder)
    packed = stored_constants(source.entries)
    return int(stored_facts(packed[min(packed)], source.read)["blocksize"]) if packed else None


def load_tokenizer(folder: BaseFolder) -> Any:
    """The base's tokenizer; one without a pad token gets none (padding is masked by position)."""
    try:
        return AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more special for a file that it does not understand
        _refuse_code(folder, "tokenizer_config.json")
        raise ModelError(
            f"{folder.name}: its tokenizer cannot be loaded: {_first_line(error)}",
            fix="put the base's tokenizer files (tokenizer.json, tokenizer_config.json) into its folder",
        ) from error


def _refuse_code(folder: BaseFolder, name: str) -> None:
    """Says so where a file of the folder, which could not be loaded, needs Python of its own."""
    if code := own_code(folder.path / name):
        raise ModelError(
            f"{folder.name} needs code of its own: auto_map in its {name} names {code}",
            why=f"transformers has nothing that could stand in for it, and {NO_CODE}",
            fix="install a newer transformers, which may know this model, or choose another base",
        )


def meta_model(config: Any) -> Any:
    """The model's structure without any weight, for counting and for finding layers."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (*MALFORMED, RuntimeError) as error:
        raise ModelError(
            f"{config.name_or_path}: a model of type {config.model_type} cannot be built for text generation: "
            f"{_first_line(error)[:160]}",
            fix="choose a causal language model as model.base, and check its config.json",
        ) from error


def load_base(
    folder: BaseFolder,
    section: ModelSection,
    quantization: QuantizationSection,
    dtype: torch.dtype,
    device: torch.device,
    cache: Cache | None = None,
) -> Any:
    """The model on `device`, frozen, its unquantised weights in `dtype`. `ModelError` for weights that do not fit.
    Weights that are stored in 4 bits stay as they are, whatever `quantization` says. With a `cache`, a base that was
    quantised before is read from there, bit for bit the same."""
    config = load_config(folder)
    _check_generation_config(folder)
    check_files(folder, cache.hashes.of if cache else taken)

    def load() -> Any:
        return _from_files(folder, section, quantization, dtype, device)

    if cache is None or quantization.type == "none" or is_packed(config):
        model = load()
    else:
        model = load_through(cache, Wanted(folder, config, quantization, dtype, device, section.attention), load)
    keep_packed_format(model)
    keep_soft_cap(model)
    model.requires_grad_(False)
    return model


def _from_files(
    folder: BaseFolder,
    section: ModelSection,
    quantization: QuantizationSection,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True}
    config = load_config(folder)
    packed, from_pretrained = is_packed(config), partial(AutoModelForCausalLM.from_pretrained, folder.path)
    if quantization.type != "none" and not packed:
        options["quantization_config"], from_pretrained = loading_config(quantization, dtype), loader(folder, config)
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
    try:
        model, info = from_pretrained(trust_remote_code=False, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ModelError(f"{folder.name}: a weight file is damaged: {error}", fix="download it again") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise _wrong_shape(folder, _first_line(error)) from error
    except (*MALFORMED, OSError, ImportError) as error:
        raise ModelError(f"{folder.name}: cannot be loaded: {_first_line(error)}", fix=_load_fix(section)) from error
    _check_complete(folder, info)
    _check_shapes(folder, model)
    name_after(folder, model)
    if packed:
        _compute_in(model, dtype)
    return model


def _check_generation_config(folder: BaseFolder) -> None:
    """transformers passes over one that it cannot read."""
    path = folder.path / GENERATION_CONFIG
    if not path.is_file():
        return
    try:
        GenerationConfig.from_dict(read_json(path))
    except MALFORMED as error:
        raise ModelError(f"{path}: {_first_line(error)}", fix="correct it, or download it again") from error


def _load_fix(section: ModelSection) -> str:
    if section.attention != "auto":
        return f"model.attention is {section.attention}; `auto` takes what this model supports"
    return "check that the folder is complete"


def _check_complete(folder: BaseFolder, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        files = ", ".join(file.name for file in folder.weight_files()[:3])
        raise ModelError(
            f"{folder.name}: {len(missing)} weights of its architecture are not in its files ({files}), e.g. "
            f"{missing[0]}",
            why="they would be random numbers",
            fix="download the model again, or check that config.json belongs to these weights",
        )


def _check_shapes(folder: BaseFolder, model: Any) -> None:
    """transformers compares shapes before quantising, and so not those of 4-bit layers."""
    for name, layer in four_bit_layers(model).items():
        if quantized_shape(layer) != linear_shape(layer):
            raise _wrong_shape(folder, f"{name} is {quantized_shape(layer)} there, {linear_shape(layer)} here")


def _compute_in(model: Any, dtype: torch.dtype) -> None:
    """transformers leaves what is stored beside 4-bit weights in the type of the files, and computes in the stored
    compute type."""
    layers = four_bit_layers(model)
    for layer in layers.values():
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
    packed = {id(layer.weight) for layer in layers.values()}
    for parameter in model.parameters():
        if id(parameter) not in packed and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _wrong_shape(folder: BaseFolder, detail: str) -> ModelError:
    return ModelError(
        f"{folder.name}: its weights do not have the shapes that its config.json names: {detail}",
        fix="check that config.json belongs to these weights",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def report(model: Any) -> BaseReport:
    """Counts of a loaded base. Every parameter counts once, tied ones too."""
    layers = four_bit_layers(model)
    packed = {id(layer.weight) for layer in layers.values()}
    others = [p for p in model.parameters() if id(p) not in packed]
    four_bit = sum(layer.in_features * layer.out_features for layer in layers.values())
    return BaseReport(
        parameters=four_bit + sum(p.numel() for p in others),
        four_bit_parameters=four_bit,
        four_bit_bytes=sum(stored_bytes(layer) for layer in layers.values()),
        other_bytes=sum(p.numel() * p.element_size() for p in others),
    )


def set_checkpointing(model: Any, mode: str) -> None:
    """`on` recomputes each layer's activations in the backward pass (non-reentrant); `offload` also keeps the layer
    inputs in host memory; `off` keeps everything."""
    if mode == "off":
        return
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False}, **({"offload": True} if mode == "offload" else {}))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"train.gradient_checkpointing: {mode} does not work with this model and transformers: {error}",
            fix="set train.gradient_checkpointing to on or off, or install a newer transformers",
        ) from error
    # Needed only by reentrant checkpointing; left on, the first layer would compute a gradient nobody reads.
    model.disable_input_require_grads()
