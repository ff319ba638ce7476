"""The adapter on disk, in PEFT's layout.

Knows PEFT's file names and keys. Invariant: what `save_adapter` puts under the final name was read back from disk and
equals the layers' tensors bit for bit, is finite, and has a B that is not all zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_cli.errors import ModelError, Problem
from qlora_cli.files import disk_errors, staged_folder, write_json, write_manifest
from qlora_cli.model.folder import read_json
from qlora_cli.model.lora import LoraLinear, linear_layers
from qlora_cli.recipe.schema import LoraSection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_NAMED = 4


def adapter_tensors(layers: Mapping[str, LoraLinear]) -> dict[str, Tensor]:
    """PEFT's keys: `base_model.model.NAME.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], copied to the CPU."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def adapter_config(model: Any, layers: Mapping[str, LoraLinear], lora: LoraSection, base: str) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": _target_modules(model, layers),
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _target_modules(model: nn.Module, layers: Mapping[str, LoraLinear]) -> list[str]:
    """Short names where they select exactly the adapted layers (servers check those), full names otherwise: in a
    vision-language model `q_proj` alone would also hit the vision tower."""
    short = sorted({name.rsplit(".", 1)[-1] for name in layers})
    every = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | LoraLinear) and not n.endswith(".base")}
    hit = {name for name in every | set(linear_layers(model)) if name.rsplit(".", 1)[-1] in short}
    return short if hit == set(layers) else sorted(layers)


def save_adapter(
    final: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], beside: Callable[[Path], None]
) -> None:
    """Writes the adapter under a temporary name with whatever `beside` adds, reads it back, compares, renames.

    Raises `ModelError` when what was read differs, is not finite, or has learned nothing; nothing is renamed then.
    """
    with staged_folder(final) as folder:
        with disk_errors(folder):
            save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, config)
        beside(folder)
        verify_adapter(folder, tensors)
        write_manifest(folder)


def verify_adapter(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Compares the tensors in `folder` with `expected`, bit for bit, and checks that they are finite and B not 0."""
    found = _read(folder)[1]
    if not_finite(found):
        raise ModelError(
            "the adapter holds values that are not finite", fix="lower train.lr, or set train.max_grad_norm"
        )
    wrong = [key for key in expected if key not in found or not torch.equal(found[key], expected[key])]
    if wrong or len(found) != len(expected):
        raise ModelError(
            f"the adapter read back from {folder} differs from the one trained ({len(wrong)} tensors)",
            why="the disk or a program beside this one changed it",
            fix="check the disk and save again",
        )
    if not learned_something(found):
        raise ModelError(
            "the adapter has learned nothing: every B is zero", fix="check that train.lr and the data are as you meant"
        )


def learned_something(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any B is not zero: with all of them zero an adapter changes nothing."""
    return any(bool(value.any()) for key, value in tensors.items() if ".lora_B." in key)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return sorted(key for key, value in tensors.items() if not bool(value.isfinite().all()))


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an adapter folder. Raises `ModelError` for what is missing, unreadable or not finite; see
    `check_manifest` for the manifest."""
    config, tensors = _read(folder)
    if bad := not_finite(tensors):
        more = f" and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        raise ModelError(
            f"{folder / WEIGHTS}: {len(bad)} tensors hold values that are not finite: "
            f"{', '.join(bad[:MOST_NAMED])}{more}",
            why="with them every answer is noise",
            fix="take the adapter from a copy or a checkpoint, or train again",
        )
    return config, tensors


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} is not an adapter: {CONFIG} and {WEIGHTS} must be in it",
            fix="name a run directory, or its adapter/ folder",
        )
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: peft_type is {config.get('peft_type')}; only LORA adapters are read")
    try:
        return config, load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{folder / WEIGHTS} is damaged: {error}", fix="take it from a checkpoint or train again"
        ) from error


def mismatches(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> list[str]:
    """What of an adapter's tensors lacks, fits no layer, or has another shape than expected."""
    problems = [f"{key} is not in the file" for key in expected.keys() - tensors.keys()]
    problems += [f"{key} fits no layer of this model" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        if expected[key] != tuple(tensors[key].shape):
            problems.append(f"{key} is {tuple(tensors[key].shape)}, the layer wants {expected[key]}")
    return sorted(problems)


@torch.no_grad()
def load_into(layers: Mapping[str, LoraLinear], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copies tensors into the layers; every name and shape must match, and all that do not are named at once."""
    targets = {f"{PREFIX}{n}.lora_A.weight": layer.lora_a for n, layer in layers.items()}
    targets |= {f"{PREFIX}{n}.lora_B.weight": layer.lora_b for n, layer in layers.items()}
    problems = mismatches({key: tuple(parameter.shape) for key, parameter in targets.items()}, tensors)
    if problems:
        raise ModelError.of([Problem(text, where=str(source)) for text in problems])
    for key, parameter in targets.items():
        parameter.copy_(tensors[key])
