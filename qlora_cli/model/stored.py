"""A loaded 4-bit model as files, and back.

Knows a model's modules, parameters and buffers; nothing of where the files lie. Invariant: the model that is read back
has every tensor of the one that was written, bit for bit, under the same names; nothing is converted or renamed.

Tensors on a CPU are mapped from the files, privately, so that their pages are shared between processes and can be
dropped by the system. The weights of a frozen base are only read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from qlora_cli.cache.entries import Cache
from qlora_cli.errors import ModelError
from qlora_cli.files import write_json
from qlora_cli.model.folder import INDEX, BaseFolder, read_json
from qlora_cli.model.nf4 import Packed, as_parameter, four_bit_layers, stored_bytes, stored_packed
from qlora_cli.model.quantizer import FourBitQuantizer, loading_config
from qlora_cli.model.source import DTYPES
from qlora_cli.model.writer import Writer
from qlora_cli.recipe.schema import QuantizationSection

ALIASES = "aliases.json"
SHARD_BYTES = 1 << 26
"""Small enough for several threads to share the work of checking."""


@dataclass(frozen=True)
class Wanted:
    """A base as it is to be loaded: from which files, in which 4-bit storage and type, where to, which attention."""

    folder: BaseFolder
    config: Any
    quantization: QuantizationSection
    dtype: torch.dtype
    device: torch.device
    attention: str

    def key(self, cache: Cache) -> str:
        """Names every bit of the loaded tensors: codes differ between devices in the last bit, structures between
        versions of transformers."""
        files = [self.folder.path / name for name in ("config.json", INDEX)]
        files = [*self.folder.weight_files(), *(file for file in files if file.is_file())]
        section = self.quantization.model_dump(mode="json", exclude={"compute_dtype", "cache"})
        versions = {name: version(name) for name in ("bitsandbytes", "torch", "transformers")}
        return cache.key(files, {**section, "dtype": str(self.dtype), "device": self.device.type, **versions})

    def empty(self) -> Any:
        """The model that `from_pretrained` would load, in 4-bit storage and eval mode, on the meta device."""
        options = {} if self.attention == "auto" else {"attn_implementation": self.attention}
        config = copy.deepcopy(self.config)
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            if part is not None:  # newer versions of transformers do so themselves
                part.dtype = self.dtype
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, trust_remote_code=False, **options)
        quantizer = FourBitQuantizer(loading_config(self.quantization, self.dtype), pre_quantized=False)
        quantizer.preprocess_model(model, dtype=self.dtype, device_map=None)
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        if model.can_generate():
            model.generation_config = generation_config(self.folder)
        return model.eval()


def load_through(cache: Cache, wanted: Wanted, load: Callable[[], Any]) -> Any:
    """The model from the cache; where it has none, what `load` gives, which is kept there."""
    key = wanted.key(cache)
    model = cache.load(key, lambda place: read_model(wanted.empty(), place, wanted.device))
    if model is not None:
        return model
    model = load()
    if reason := difference(model, wanted.empty()):
        cache.warn(f"the 4-bit weights are not kept in {cache.folder}: {reason}")
    else:
        cache.store(key, _bytes(model), lambda place: write_model(model, place))
    return model


def _bytes(model: Any) -> int:
    """About what its files will have."""
    distinct = {id(tensor): tensor for tensor in _tensors(model).values()}.values()
    constants = sum(stored_bytes(layer) - layer.weight.nbytes for layer in four_bit_layers(model).values())
    return constants + sum(tensor.nbytes for tensor in distinct)


def generation_config(folder: BaseFolder) -> GenerationConfig:
    """As `from_pretrained` chooses it: from its own file, else from the model's config.json."""
    try:
        return GenerationConfig.from_pretrained(folder.path)
    except OSError:
        return GenerationConfig.from_pretrained(folder.path, config_file_name="config.json", _from_model_config=True)


def difference(model: Any, empty: Any) -> str:
    """Why `model` is not `empty` with values in it, so that it cannot be read back; empty where it is."""
    if _types(model) != _types(empty):
        return "its modules are not those of its configuration"
    if _shapes(model) != _shapes(empty):
        return "its tensors are not those of its configuration"
    if stray := next(_stray(model), ""):
        return f"{stray} is neither a parameter nor a buffer"
    odd = next((name for name, tensor in _tensors(model).items() if tensor.dtype not in DTYPES.values()), "")
    return f"{odd} is of a type that safetensors lacks" if odd else ""


def _types(model: Any) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Of all tensors but 4-bit weights, which have their shape once they are quantised."""
    packed = {f"{name}.weight" for name in four_bit_layers(model)}
    return {name: () if name in packed else tuple(tensor.shape) for name, tensor in _tensors(model).items()}


def _tensors(model: Any) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _stray(model: Any) -> Iterator[str]:
    """Tensors with values that are plain attributes."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            values = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(each, Tensor) and not each.is_meta for each in values):
                yield f"{name}.{key}"


def write_model(model: Any, folder: Path) -> None:
    """Writes every tensor of `model` into `folder`, one after the other: codes and constants of 4-bit weights, other
    parameters, and all buffers, those too that are not part of its state."""
    layers, first = four_bit_layers(model), dict[int, str]()
    aliases = {name: first[id(t)] for name, t in _tensors(model).items() if first.setdefault(id(t), name) != name}
    parts: dict[str, Tensor] = {}
    for name, tensor in _tensors(model).items():
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is not None:
            parts |= Packed(tensor.data, layer.weight.quant_state).tensors(name)
        elif name not in aliases:
            parts[name] = tensor.data
    with Writer(folder, parts, SHARD_BYTES) as writer:
        for name, tensor in parts.items():
            writer.add(name, tensor)
        writer.finish()
    write_json(folder / ALIASES, aliases)


def read_model(empty: Any, folder: Path, device: torch.device) -> Any:
    """`empty` with the tensors of `folder`, on `device`. `ModelError` where they are not those that it needs."""
    tensors = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in _mapped(file)}
    layers, known = four_bit_layers(empty), _tensors(empty)
    packed: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for name, tensor in tensors.items():
        owner = f"{name}.".partition(".weight.")[0]
        if owner in packed:
            packed[owner][name] = tensor
        elif name in known:
            _put(empty, name, tensor, device)
        else:
            raise ModelError(f"the model has no tensor {name}")
    for name, parts in packed.items():
        _fill(layers[name], f"{name}.weight", parts, device)
    for alias, name in read_json(folder / ALIASES).items():
        setattr(*_place(empty, alias), getattr(*_place(empty, name)))
    if lacking := [name for name, tensor in _tensors(empty).items() if tensor.is_meta]:
        raise ModelError(f"the tensor {lacking[0]} is not there")
    return empty


def _mapped(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt", device="cpu") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is not a mapping
            yield name, opened.get_tensor(name)


def _fill(layer: Any, name: str, parts: dict[str, Tensor], device: torch.device) -> None:
    """Gives a 4-bit layer its weight."""
    if name not in parts or len(parts) == 1:
        raise ModelError(f"the tensor {name} is not there, or not its constants")
    packed = stored_packed(name, parts, device)
    layer.weight = as_parameter(packed, {**layer.weight.__dict__, "module": layer})
    layer.quant_state, layer._is_hf_initialized = packed.state, True


def _put(model: Any, name: str, tensor: Tensor, device: torch.device) -> None:
    """Gives a parameter or buffer its values."""
    module, leaf = _place(model, name)
    value = tensor.to(device)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False) if leaf in module._parameters else value)


def _place(model: Any, name: str) -> tuple[Any, str]:
    """The module that holds a tensor, and the tensor's name there."""
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf
