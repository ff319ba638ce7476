"""The adapter on disk, in PEFT's layout.

Knows PEFT's file names and keys. Invariant: what `save_adapter` puts under the final name was read back from disk and
equals the layers' tensors bit for bit, is finite, and has a B that is not all zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_cli.errors import ModelError, Problem
from qlora_cli.files import disk_errors, staged_folder, write_json, write_manifest
from qlora_cli.model.folder import read_json
from qlora_cli.model.lora import LoraLinear, attach, linear_layers, stored_in
from qlora_cli.model.tokens import TokenRows, add_rows
from qlora_cli.recipe.schema import LoraSection

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
PREFIX = "base_model.model."
TOKENS = "trainable_token_indices"
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
MOST_NAMED = 4


def adapter_tensors(layers: Mapping[str, LoraLinear], rows: TokenRows | None = None) -> dict[str, Tensor]:
    """`adapter_parameters`, copied to the CPU."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in adapter_parameters(layers, rows).items()}


def adapter_parameters(layers: Mapping[str, LoraLinear], rows: TokenRows | None) -> dict[str, nn.Parameter]:
    """By PEFT's keys: `base_model.model.NAME.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]; for new tokens
    `base_model.model.NAME.token_adapter.trainable_tokens_delta` [n, hidden], which despite its name holds values."""
    found = {}
    for name, layer in layers.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a
        found[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b
    trained = rows.by_layer() if rows else {}
    return found | {f"{PREFIX}{name}{TOKEN_ROWS}": parameter for name, parameter in trained.items()}


def adapter_config(
    model: Any, layers: Mapping[str, LoraLinear], lora: LoraSection, base: str, rows: TokenRows | None = None
) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it."""
    tokens = {TOKENS: dict.fromkeys(rows.by_layer(), rows.ids.tolist())} if rows else {}
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
        **tokens,
    }


def _target_modules(model: nn.Module, layers: Mapping[str, LoraLinear]) -> list[str]:
    """Short names where they select exactly the adapted layers (servers check those), full names otherwise: in a
    vision-language model `q_proj` alone would also hit the vision tower."""
    short = sorted({name.rsplit(".", 1)[-1] for name in layers})
    every = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | LoraLinear) and not n.endswith(".base")}
    hit = {name for name in every | set(linear_layers(model)) if name.rsplit(".", 1)[-1] in short}
    return short if hit == set(layers) else sorted(layers)


def save_adapter(
    final: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    beside: Callable[[Path], None],
    result: bool = True,
) -> None:
    """Writes the adapter under a temporary name with whatever `beside` adds, reads it back, compares, renames.

    Raises `ModelError` when what was read differs or is not finite; nothing is renamed then. A run's `result` must have
    learned something too, and takes the place of one that is already there.
    """
    with staged_folder(final, replace=result) as folder:
        with disk_errors(folder):
            save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, config)
        beside(folder)
        verify_adapter(folder, tensors)
        if result and not learned_something(tensors):
            why = "every B is zero"
            raise ModelError(
                "the adapter has learned nothing", why, fix="check that train.lr and the data are as meant"
            )
        write_manifest(folder)


def verify_adapter(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Compares the tensors in `folder` with `expected`, bit for bit, and checks that they are finite."""
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
    if not (folder / WEIGHTS).is_file() and (folder / PICKLE).is_file():
        raise ModelError(
            f"{folder} has its weights as a pickle only ({PICKLE})",
            why="loading a pickle can run any code that it contains, so only safetensors are read",
            fix="load it with PEFT where you trust it, and save it from there: save_pretrained writes safetensors",
        )
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} is not an adapter: {CONFIG} and {WEIGHTS} must be in it",
            fix="name a run directory, or its adapter/ folder",
        )
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: peft_type is {config.get('peft_type')}; only LORA adapters are read")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{folder / WEIGHTS} is damaged: {error}", fix="take it from a checkpoint or train again"
        ) from error
    if strange := sorted(key for key, value in tensors.items() if value.dtype not in FLOATS):
        raise ModelError(
            f"{folder / WEIGHTS}: {strange[0]} is of type {tensors[strange[0]].dtype}",
            fix="take an adapter in 16 or 32 bits, which is what qlora and PEFT write",
        )
    return config, tensors


def mismatches(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> list[str]:
    """What of an adapter's tensors lacks, fits no layer, or has another shape than expected."""
    problems = [f"{key} is not in the file" for key in expected.keys() - tensors.keys()]
    problems += [f"{key} fits no layer of this model" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        if expected[key] != tuple(tensors[key].shape):
            problems.append(f"{key} is {tuple(tensors[key].shape)}, the layer wants {expected[key]}")
    return sorted(problems)


@torch.no_grad()
def load_into(
    layers: Mapping[str, LoraLinear], tensors: Mapping[str, Tensor], source: Path, rows: TokenRows | None = None
) -> None:
    """Copies tensors into the layers and rows; every name and shape must match, and all that do not are named at
    once."""
    targets = adapter_parameters(layers, rows)
    problems = mismatches({key: tuple(parameter.shape) for key, parameter in targets.items()}, tensors)
    if problems:
        raise ModelError.of([Problem(text, where=str(source)) for text in problems])
    for key, parameter in targets.items():
        parameter.copy_(tensors[key])


def put_adapter(model: Any, lora: LoraSection, compute_dtype: torch.dtype, folder: Path) -> None:
    """Puts the adapter of a folder, with its new tokens, into a bare base."""
    config, tensors = read_adapter(folder)
    layers = attach(model, lora, compute_dtype, seed=0)
    load_into(layers, tensors, folder, add_rows(model, token_ids(config, folder), stored_in(lora, compute_dtype)))


def token_ids(config: Mapping[str, Any], source: Path) -> tuple[int, ...]:
    """The new tokens of an adapter, in order, by its config; `ModelError` for what `adapter_config` does not write."""
    said = config.get(TOKENS)
    if said is None:
        return ()
    lists = list(said.values()) if isinstance(said, dict) else []
    if not lists or any(each != lists[0] or not _rising(each) for each in lists):
        raise ModelError(
            f"{source / CONFIG}: {TOKENS} is not as qlora wrote it (got {str(said)[:80]})",
            why="it names, for the embedding and for a head of its own, the same ids in rising order",
            fix="take the adapter from a copy or a checkpoint, or train again",
        )
    return tuple(lists[0])


def _rising(ids: Any) -> bool:
    whole = isinstance(ids, list) and bool(ids) and all(type(i) is int for i in ids)
    return whole and all(a < b for a, b in pairwise(ids))


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of layers, rows of new tokens) of an adapter."""
    rows = {key: value for key, value in tensors.items() if key.endswith(TOKEN_ROWS)}
    return {key: value for key, value in tensors.items() if key not in rows}, rows
