"""4-bit storage of linear layers, through bitsandbytes.

The only file that knows `bitsandbytes.nn` and `bitsandbytes.functional`. Invariant: a 4-bit layer keeps the packed
codes and constants that quantisation gave it; nothing repacks or rounds them afterwards.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# With AVX512-BF16 and no `kernels` package, bitsandbytes warns at import about a faster eval-time kernel. That kernel
# is the repacking which `keep_packed_format` turns off, so the advice would be wrong here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# It also has its CPU optimizers compiled at first use, and runs them as they stand where that fails. Shapes and steps
# change too often for it to last, two runs may then round differently, and the compiler takes seconds and 40 MB.
_compile = torch.compile
torch.compile = None  # type: ignore[assignment]
try:
    import bitsandbytes as bnb
    import bitsandbytes.functional as bnb_functional
finally:
    torch.compile = _compile

from transformers.pytorch_utils import Conv1D  # noqa: E402

from qlora_cli.model.chunks import by_chunks  # noqa: E402
from qlora_cli.model.codes import Coder  # noqa: E402
from qlora_cli.recipe.schema import QuantizationSection  # noqa: E402

_STATE = ".quant_state.bitsandbytes__"
STATE_BLOCKSIZE = 256
"""Constants that share one constant of theirs (Dettmers et al. 2023, arXiv:2305.14314, section 3)."""


def is_transposed(layer: Any) -> bool:
    """Whether the layer's weight is [in, out] in files: GPT-2's Conv1D."""
    return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)


def is_four_bit(module: nn.Module) -> bool:
    """Whether the layer's weight is stored in 4 bits."""
    return isinstance(module, bnb.nn.Linear4bit)


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """Every 4-bit layer by its full name."""
    return {name: module for name, module in model.named_modules() if is_four_bit(module)}


def keep_packed_format(model: nn.Module) -> int:
    """Turns off bitsandbytes' eval-time repacking on CPU; returns the number of 4-bit layers.

    On CPUs with AVX512-BF16, a `Linear4bit` in eval mode rewrites its weight in place for another kernel: constants
    are rounded for good, the next training step has no gradient through the layer, and dequantising returns garbage.
    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078; to be removed when repacking leaves `weight`
    as it is.
    """
    layers = four_bit_layers(model)
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def dequantize(layer: Any) -> Tensor:
    """The layer's weight [out, in] in the type it was quantised from, with the state that training uses."""
    state = layer.quant_state if layer.quant_state is not None else layer.weight.quant_state
    return bnb_functional.dequantize_4bit(layer.weight.data, state)


class Desk:
    """Where 4-bit weights are written out one after the other, each over the one before, which must be done with. On a
    CPU, taking new memory for each costs several times what dequantising does; bitsandbytes' operator always takes it,
    so its C function is called, if on the first weight it gives the operator's bits."""

    def __init__(self) -> None:
        self._place = torch.empty(0)
        self._usable: bool | None = None

    def weight(self, layer: Any) -> Tensor:
        """`dequantize(layer)`; on a CPU valid until the next call."""
        state = layer.quant_state if layer.quant_state is not None else layer.weight.quant_state
        if self._usable is False or layer.weight.device.type != "cpu" or state.blocksize >= 2048 or state.shape[-1] % 2:
            return dequantize(layer)
        if self._usable is None:
            self._usable = _has_c_functions() and torch.equal(self._written(layer, state), dequantize(layer))
            return self.weight(layer)
        return self._written(layer, state)

    def _written(self, layer: Any, state: Any) -> Tensor:
        out, rows, inputs = self._room(state), math.prod(state.shape[:-1]), state.shape[-1]
        constants, codes = _constants(state), layer.weight.data
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[state.dtype]
        function = getattr(bnb_functional.lib, f"cdequantize_blockwise_cpu_{state.quant_type}_{short}")
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in (codes, constants, out)]
        function(*pointers, *map(ctypes.c_longlong, (state.blocksize, rows, inputs)))
        return out

    def _room(self, state: Any) -> Tensor:
        count = math.prod(state.shape)
        if self._place.dtype != state.dtype or self._place.numel() < count:
            self._place = torch.empty(count, dtype=state.dtype)
        return self._place[:count].view(state.shape)


def _has_c_functions() -> bool:
    """Whether bitsandbytes found its compiled library; what stands in for it raises when it is called."""
    return isinstance(getattr(bnb_functional.lib, "_lib", None), ctypes.CDLL)


def _constants(state: Any) -> Tensor:
    """The quantization constants in float32, theirs undone."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb_functional.dequantize_blockwise(absmax, state.state2) + state.offset
    constants: Tensor = absmax.float()
    return constants


@dataclass(frozen=True)
class Stored:
    """What a 4-bit weight [out, in] on a CPU is made of, for kernels of ours: `table` [16] in float32 says what codes
    mean; `constants` are float32, or uint8 with `meaning` [256], one of `nested` for each 256, and `offset`."""

    codes: Tensor
    table: Tensor
    constants: Tensor
    nested: Tensor | None
    meaning: Tensor | None
    offset: float
    blocksize: int
    shape: tuple[int, int]


def stored(layer: Any, dtype: torch.dtype) -> Stored | None:
    """None where the weight does not lie on a CPU, dequantises to another type, or its rows are not whole blocks."""
    state = layer.quant_state if layer.quant_state is not None else layer.weight.quant_state
    out_features, inputs = state.shape
    if layer.weight.device.type != "cpu" or state.dtype != dtype or inputs % state.blocksize:
        return None
    codes, table, shape = layer.weight.data, state.code, (out_features, inputs)
    if not state.nested:
        return Stored(codes, table, state.absmax, None, None, 0.0, state.blocksize, shape)
    inner = state.state2
    if inner.blocksize != STATE_BLOCKSIZE:
        return None
    return Stored(codes, table, state.absmax, inner.absmax, inner.code, float(state.offset), state.blocksize, shape)


@dataclass(frozen=True)
class Packed:
    """A quantised weight: codes [elements/2, 1], two in a byte, and what it takes to undo it."""

    codes: Tensor
    state: Any

    def dequantize(self) -> Tensor:
        """The weight in the type that it was quantised from."""
        weight: Tensor = bnb_functional.dequantize_4bit(self.codes, self.state)
        return weight

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What transformers stores for a weight of this name."""
        state = self.state.as_dict(packed=True)
        return {name: self.codes, **{f"{name}.{key}": value.cpu() for key, value in state.items()}}

    @property
    def bytes(self) -> int:
        """Codes and constants; the tables of code values, equal for all layers, are not counted."""
        return self.codes.numel() * self.codes.element_size() + constant_bytes(self.state)


def quantize(weight: Tensor, section: QuantizationSection) -> Packed:
    """`weight` in 4 bits, bit for bit as bitsandbytes quantises it; on a CPU in threads and much faster."""
    flat = weight.reshape(-1)
    whole = flat.numel() // section.blocksize * section.blocksize if flat.device.type == "cpu" else 0
    parts = by_chunks(lambda chunk: _coder(section.type).encode(chunk, section.blocksize), flat[:whole])
    if whole < flat.numel():
        rest = bnb_functional.quantize_4bit(flat[whole:], blocksize=section.blocksize, quant_type=section.type)
        parts.append((rest[0].view(-1), rest[1].absmax))
    codes, absmax = (torch.cat(each) for each in zip(*parts, strict=True))
    state = _state(absmax, weight, section)
    return Packed(codes.view(getattr(torch, section.storage_dtype)).unsqueeze(1), state)


@cache
def _coder(kind: str) -> Coder:
    return Coder(bnb_functional.get_4bit_type(kind, device="cpu"))


def _state(absmax: Tensor, weight: Tensor, section: QuantizationSection) -> Any:
    """The quantisation state, its constants quantised too where `section` says so."""
    offset, nested = None, None
    if section.double_quant:
        offset = absmax.mean()
        absmax, nested = bnb_functional.quantize_blockwise(absmax - offset, blocksize=STATE_BLOCKSIZE)
    return bnb_functional.QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=section.blocksize,
        code=bnb_functional.get_4bit_type(section.type, device=weight.device),
        quant_type=section.type,
        offset=offset,
        state2=nested,
    )


def misreads(inputs: int, section: QuantizationSection, device: torch.device) -> bool:
    """Whether bitsandbytes gives back other values than the codes and constants say for layers of this many inputs.
    Version 0.50.2 does so on CPUs with AVX512 where the blocksize does not divide the inputs: blocks run on from row to
    row, and its kernel takes the constants as if each row began one. Tried out, so that a mended version passes."""
    rows = 8 + 4 * section.blocksize // inputs
    ramp = torch.linspace(0.1, 1, rows * inputs, device=device).view(rows, inputs)
    packed = quantize(ramp, section.model_copy(update={"double_quant": False}))
    codes = packed.codes.view(torch.uint8).view(-1)
    values = packed.state.code[torch.stack([codes >> 4, codes & 0xF], -1).view(-1).long()]
    constants = packed.state.absmax.repeat_interleave(section.blocksize)[: values.numel()]
    return not torch.allclose(packed.dequantize().view(-1), values * constants, atol=1e-5)


def as_parameter(packed: Packed, settings: Mapping[str, Any]) -> nn.Parameter:
    """The weight of a 4-bit layer; `settings` are the other attributes that bitsandbytes gives it."""
    own = {"quant_state": packed.state, "bnb_quantized": True}
    parameter: nn.Parameter = bnb.nn.Params4bit(packed.codes, requires_grad=False, **{**settings, **own})
    return parameter


def stored_packed(name: str, tensors: Mapping[str, Tensor], device: torch.device) -> Packed:
    """A weight from what transformers stored for it (`Packed.tensors`)."""
    state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key != name}
    return Packed(tensors[name].to(device), bnb_functional.QuantState.from_dict(state, device=device))


def stored_names(name: str) -> list[str]:
    """Names of all tensors that may be stored for a weight of this name."""
    constants = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    return [name, *(f"{name}.{constant}" for constant in constants)]


def stored_constants(names: Iterable[str]) -> dict[str, list[str]]:
    """Of the tensors in a model's files: each weight that is stored in 4 bits, and the names of its constants."""
    known = list(names)
    packed = [name.partition(_STATE)[0] for name in known if _STATE in name]
    return {weight: [name for name in known if name.startswith(f"{weight}.")] for weight in packed}


def stored_facts(constants: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, Any]:
    """blocksize, shape, dtype and quant_type of a weight that is stored in 4 bits; of its `constants`, named here, the
    small one that holds them is read."""
    state = read(next(name for name in constants if _STATE in name))
    facts: dict[str, Any] = json.loads(bytes(state.tolist()))
    return facts


def quantized_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of the weight that was quantised into this layer."""
    out_features, in_features = layer.weight.quant_state.shape
    return out_features, in_features


def stored_bytes(layer: Any) -> int:
    """Bytes of packed codes and constants."""
    return Packed(layer.weight.data, layer.weight.quant_state).bytes


def constant_bytes(state: Any) -> int:
    """Bytes of the quantization constants, and of theirs."""
    constants = [state.absmax, *((state.state2.absmax,) if state.nested else ())]
    return sum(constant.numel() * constant.element_size() for constant in constants)


def cpu_has_native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16)."""
    return bool(bnb_functional.has_avx512bf16())


# What a copy in the layout of bitsandbytes' AVX512-BF16 kernel is made from; see `packed.py`.


def scales(layer: Any) -> Tensor:
    """[out, in / blocksize] the constants of a 4-bit layer in float32, whose rows must be whole blocks."""
    state = layer.weight.quant_state
    return _constants(state).view(state.shape[0], -1)


def packed_kernel(layer: Any) -> Any:
    """bitsandbytes' C function for this layer's type, where the CPU has AVX512-BF16; else None."""
    name = f"gemv_4bit_inference_cpu_{layer.weight.quant_state.quant_type}_bf16"
    return getattr(bnb_functional.lib, name) if cpu_has_native_bf16() else None
