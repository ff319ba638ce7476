"""4-bit storage of linear layers, through bitsandbytes.

The only file that knows `bitsandbytes.nn` and `bitsandbytes.functional`. Invariant: a 4-bit layer keeps the packed
codes and constants that quantisation gave it; nothing repacks or rounds them afterwards.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

# With AVX512-BF16 and no `kernels` package, bitsandbytes warns at import about a faster eval-time kernel. That kernel
# is the repacking which `keep_packed_format` turns off, so the advice would be wrong here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import bitsandbytes as bnb  # noqa: E402
import bitsandbytes.functional as bnb_functional  # noqa: E402
from transformers import BitsAndBytesConfig  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402
from transformers.quantizers.auto import register_quantization_config, register_quantizer  # noqa: E402
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer  # noqa: E402

from qlora_cli.recipe.schema import QuantizationSection  # noqa: E402

METHOD = "qlora_4bit"


@register_quantization_config(METHOD)
class FourBitConfig(BitsAndBytesConfig):
    """bitsandbytes' 4-bit configuration with the blocksize that transformers does not expose."""

    def __init__(self, blocksize: int = 64, **kwargs: Any) -> None:
        super().__init__(load_in_4bit=True, **kwargs)
        self.quant_method = METHOD
        self.blocksize = blocksize


@register_quantizer(METHOD)
class FourBitQuantizer(Bnb4BitHfQuantizer):
    """Quantises while loading, and hands each weight the blocksize before its values arrive."""

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        for layer in four_bit_layers(model).values():
            layer.weight.blocksize = self.quantization_config.blocksize


def loading_config(section: QuantizationSection, compute_dtype: torch.dtype) -> FourBitConfig:
    """What `from_pretrained` needs to quantise on load. Head, embeddings and tied weights are left out by default;
    naming modules to skip would replace that default, so none are named."""
    return FourBitConfig(
        blocksize=section.blocksize,
        bnb_4bit_quant_type=section.type,
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=section.storage_dtype,
    )


def is_four_bit(module: nn.Module) -> bool:
    """Whether the layer's weight is stored in 4 bits."""
    return isinstance(module, bnb.nn.Linear4bit)


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """Every 4-bit layer by its full name."""
    return {name: module for name, module in model.named_modules() if is_four_bit(module)}


def quantizable_layers(model: Any) -> list[nn.Module]:
    """The layers that loading turns into 4-bit ones: linear, but neither the head nor a subclass with a life of its
    own (Falcon's, say); see `loading_config`."""
    head = model.get_output_embeddings()
    plain = [m for m in model.modules() if type(m) is nn.Linear or isinstance(m, Conv1D)]
    return [module for module in plain if module is not head]


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


def quantized_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of the weight that was quantised into this layer."""
    out_features, in_features = layer.weight.quant_state.shape
    return out_features, in_features


def stored_bytes(layer: Any) -> int:
    """Bytes of packed codes and constants."""
    state = layer.weight.quant_state
    constants = [state.absmax, *((state.state2.absmax,) if state.nested else ())]
    return sum(t.numel() * t.element_size() for t in (layer.weight.data, *constants))


def cpu_has_native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16)."""
    return bool(bnb_functional.has_avx512bf16())
