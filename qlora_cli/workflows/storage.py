"""Whether the base can be stored as the recipe says.

Sees the whole recipe. Invariant: a base that is stored in 4 bits is computed with as it is, so a recipe that says
otherwise is refused rather than ignored; and no blocksize is used that this machine reads wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import torch

from qlora_cli.errors import RecipeError
from qlora_cli.model.base import is_packed, meta_model, stored_quantization
from qlora_cli.model.folder import BaseFolder
from qlora_cli.model.lora import linear_shape
from qlora_cli.model.nf4 import four_bit_layers, misreads
from qlora_cli.model.quantizer import four_bit_skeleton
from qlora_cli.recipe.schema import QuantizationSection, Recipe

WHY = "its 4-bit weights are used as they are; there is nothing to quantise them from"


def check_stored(recipe: Recipe, folder: BaseFolder, config: Any) -> None:
    """Raises `RecipeError` when the base's files hold 4-bit weights that differ from what the recipe asks for."""
    if not is_packed(config):
        return
    if recipe.lora is None:
        raise RecipeError(
            f"{folder.name} is stored in 4 bits, but the recipe trains every weight (lora: null)",
            why="4-bit weights have no gradient",
            fix="name the 16-bit model that it was made from, or train an adapter",
        )
    stored = stored_quantization(folder, config, recipe.quantization)
    settings = [*_differing(recipe.quantization, stored), *_other_layers(recipe.quantization, stored, config)]
    if settings:
        raise RecipeError(
            f"{folder.name} is stored in 4 bits in another way than quantization says", WHY, f"set {' '.join(settings)}"
        )


def _differing(asked: QuantizationSection, stored: QuantizationSection) -> list[str]:
    keys = ("type", "double_quant", "blocksize")
    values = {key: (getattr(asked, key), getattr(stored, key)) for key in keys}
    return [f"-s quantization.{key}={str(has).lower()}" for key, (wanted, has) in values.items() if wanted != has]


def _other_layers(asked: QuantizationSection, stored: QuantizationSection, config: Any) -> list[str]:
    """The setting that leaves out the layers that the files leave out; none where the recipe does so already."""
    usual = _skeleton(config, stored, ())[1]
    names = tuple(name for name in stored.skip_modules if name not in usual)
    wanted, found = (four_bit_layers(_skeleton(config, stored, skip)[0]) for skip in (asked.skip_modules, names))
    return [] if wanted.keys() == found.keys() else [f"-s 'quantization.skip_modules=[{', '.join(names)}]'"]


def _skeleton(config: Any, section: QuantizationSection, skip: tuple[str, ...]) -> tuple[Any, list[str]]:
    """The model without weights, and the names left out."""
    return four_bit_skeleton(meta_model(config), section.model_copy(update={"skip_modules": skip}), torch.float32)


def check_blocks(skeleton: Any, section: QuantizationSection, device: torch.device) -> None:
    """Raises `RecipeError` when `device` would compute with other values than the 4-bit layers of `skeleton` store; see
    `misreads`."""
    layers = four_bit_layers(skeleton)
    wrong = {inputs for inputs in _inputs(layers.values()) if misreads(inputs, section, device)}
    if not wrong:
        return
    named = [name for name, layer in layers.items() if linear_shape(layer)[1] in wrong]
    sizes = sorted(get_args(QuantizationSection.model_fields["blocksize"].annotation))
    right = [size for size in sizes if not any(_misreads(inputs, size, section, device) for inputs in wrong)]
    best = min(right, key=lambda size: abs(size - section.blocksize), default=None)
    raise RecipeError(
        f"quantization.blocksize is {section.blocksize}, but {len(named)} layers have {min(wrong)} inputs, "
        f"e.g. {named[0]}",
        why="bitsandbytes on this CPU mixes up the constants where a block does not end with a row: the model would "
        "compute with wrong weights",
        fix=f"set the blocksize to {best}" if best else "leave those layers out with quantization.skip_modules",
    )


def _misreads(inputs: int, blocksize: int, section: QuantizationSection, device: torch.device) -> bool:
    """Whether `device` misreads layers of this many inputs in blocks of `blocksize`."""
    return misreads(inputs, section.model_copy(update={"blocksize": blocksize}), device)


def _inputs(layers: Iterable[Any]) -> set[int]:
    return {linear_shape(layer)[1] for layer in layers}
