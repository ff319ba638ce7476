"""Quantising while transformers loads.

Knows transformers' quantizers, their configuration and their order of work; the storage itself is in `nf4.py`.
Invariant: a layer gets the codes and constants that bitsandbytes would give it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_cli.model.nf4 import as_parameter, four_bit_layers, is_transposed, quantize
from qlora_cli.recipe.schema import QuantizationSection

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

    def get_modules_to_not_convert(self, model: Any, skip_modules: Any = None, *args: Any, **kwargs: Any) -> list[str]:
        """Names given are added to the defaults (head, tied weights), where transformers would replace those."""
        usual = super().get_modules_to_not_convert(model, None, *args, **kwargs)
        return [*usual, *(name for name in skip_modules or () if name not in usual)]

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        for layer in four_bit_layers(model).values():
            layer.weight.blocksize = self.quantization_config.blocksize

    def get_quantize_ops(self) -> _Quantize:
        """transformers' operation, with our `quantize` where it is faster."""
        return _Quantize(self)


class _Quantize(Bnb4bitQuantize):
    """Fills a 4-bit layer while loading: bit for bit what bitsandbytes would, on a CPU several times as fast."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """{name of the parameter: its value} -> {name: the 4-bit parameter}."""
        ((name, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        if value.device.type != "cpu":
            return dict(super().convert(input_dict, model=model, **kwargs))
        layer, empty = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        config = self.hf_quantizer.quantization_config
        packed = quantize(value.T if is_transposed(layer) else value, section_of(config))
        layer.quant_state, layer._is_hf_initialized = packed.state, True
        return {name: as_parameter(packed, {**empty.__dict__, "module": layer})}


def section_of(config: FourBitConfig) -> QuantizationSection:
    """What `loading_config` was made from, as far as values depend on it."""
    values = {"type": config.bnb_4bit_quant_type, "double_quant": config.bnb_4bit_use_double_quant}
    storage = str(config.bnb_4bit_quant_storage).removeprefix("torch.")
    return QuantizationSection.model_validate({**values, "blocksize": config.blocksize, "storage_dtype": storage})


def loading_config(section: QuantizationSection, compute_dtype: torch.dtype) -> FourBitConfig:
    """What `from_pretrained` needs to quantise on load."""
    return FourBitConfig(
        blocksize=section.blocksize,
        bnb_4bit_quant_type=section.type,
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=section.storage_dtype,
        llm_int8_skip_modules=list(section.skip_modules) or None,
    )


def stored_config(section: QuantizationSection, dtype: torch.dtype, skipped: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of a config.json whose weights are stored in 4 bits. `skipped` names all layers left out,
    the usual ones too, since naming any replaces those."""
    stored: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.type,
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=section.storage_dtype,
        llm_int8_skip_modules=list(skipped),
    ).to_dict()
    return stored


def four_bit_skeleton(model: Any, section: QuantizationSection, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """(`model`, on the meta device, with the 4-bit layers that loading with `section` would make; names left out)."""
    quantizer = FourBitQuantizer(loading_config(section, dtype), pre_quantized=False)
    quantizer._process_model_before_weight_loading(model, device_map=None)
    return model, list(quantizer.modules_to_not_convert)
