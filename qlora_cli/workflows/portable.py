"""`qlora merge --portable-adapter`: an adapter that every server reads the same way.

Sees the adapter and its recipe. Invariant: `alpha` is `r`, so that alpha/r is 1 whatever a server does with rsLoRA or
patterns; and the delta read back is the trained one.

llama.cpp scales by alpha/r of each tensor and knows no rank-stabilised scaling; vLLM knows no rank or alpha patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_cli import __version__
from qlora_cli.errors import ModelError, Problem
from qlora_cli.files import check_space, disk_errors, staged_folder, write_json, write_manifest, write_text
from qlora_cli.model.adapter import CONFIG, WEIGHTS, learned_something, read_adapter, token_ids
from qlora_cli.model.lora import scaling_of
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import LoraSection, Recipe
from qlora_cli.recipe.snapshot import resolved_yaml
from qlora_cli.workflows.card import ORIGIN_FILE, RECIPE_FILE, base_line
from qlora_cli.workflows.events import Emit, Fact, Saved
from qlora_cli.workflows.locate import origin_of, tokenizer_of
from qlora_cli.workflows.merge import MergeOptions
from qlora_cli.workflows.mergeable import check_settings, default_output, find_adapter
from qlora_cli.workflows.rundir import check_replaceable

PORTABLE = "portable.json"
"""Marks a folder that this command wrote."""
MOST_ERROR = 1e-5
"""Relative; float32 products in another order differ by about 1e-7."""


@dataclass(frozen=True)
class PortableResult:
    """The portable adapter, and the largest relative error of a layer's delta in it."""

    output: Path
    scaling: float
    error: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"event": "result", "output": str(self.output), "scaling": self.scaling, "delta_error": self.error}


def run_portable(options: MergeOptions, emit: Emit) -> PortableResult:
    """Writes the adapter with its scaling folded into B. Needs no base."""
    found = find_adapter(options.target, options.adapter, emit)
    folder, lora = found.adapter, found.recipe.lora
    assert folder is not None and lora is not None, "what was found is an adapter"
    output = options.output or default_output(folder, "portable")
    check_replaceable(output, options.overwrite, PORTABLE, [folder])
    config, tensors = read_adapter(folder)
    check_settings(config, lora, folder)
    _check_tokens(token_ids(config, folder), folder)
    _check_pairs(tensors, lora.r, folder)
    check_space(output, sum(tensor.numel() * 4 for tensor in tensors.values()))
    scaling = scaling_of(lora)
    emit(Fact("adapter", f"{folder}, scaling {scaling:g} goes into B"))
    with staged_folder(output, options.overwrite) as staging:
        with disk_errors(staging):
            save_file(_folded(tensors, scaling), staging / WEIGHTS, metadata={"format": "pt"})
            tokenizer_of(found).save_pretrained(staging)
        write_json(staging / CONFIG, _config(config, lora))
        error = _largest_error(tensors, read_adapter(staging)[1], scaling)
        if not error <= MOST_ERROR:
            raise ModelError(f"the portable adapter's delta differs from the trained one by {error:.1e}")
        loaded = load_recipe(folder / RECIPE_FILE, [f"lora.alpha={lora.r}", "lora.rslora=false"])
        write_text(staging / RECIPE_FILE, resolved_yaml(loaded))
        write_json(staging / ORIGIN_FILE, {**origin_of(folder), "base_folder": None})
        write_json(staging / PORTABLE, {"qlora": __version__, "scaling_folded_in": scaling, "delta_error": error})
        write_text(staging / "README.md", _card(found.recipe, folder, scaling, error))
        write_manifest(staging)
    emit(Saved("portable adapter", output))
    return PortableResult(output, scaling, error)


def _check_tokens(ids: tuple[int, ...], folder: Path) -> None:
    if ids:
        raise ModelError(
            f"{folder} holds the embeddings of {len(ids)} new tokens, which no portable adapter can",
            why="servers that read adapters (llama.cpp, vLLM) have no place for rows of an embedding",
            fix="merge it into its base: leave --portable-adapter out",
        )


def _check_pairs(tensors: Mapping[str, Tensor], rank: int, folder: Path) -> None:
    """Raises `ModelError` naming every tensor that is no A [r, in] or B [out, r], or lacks the other."""
    problems = []
    for key, value in tensors.items():
        kind, axis = ("A", 0) if key.endswith(".lora_A.weight") else ("B", 1)
        partner = key.replace(f".lora_{kind}.", f".lora_{'B' if kind == 'A' else 'A'}.")
        if not key.endswith(f".lora_{kind}.weight"):
            problems.append(f"{key} is neither an A nor a B of LoRA")
        elif partner not in tensors:
            problems.append(f"{partner} is not in the file")
        elif value.ndim != 2 or value.shape[axis] != rank:
            problems.append(f"{key} is {tuple(value.shape)}, its rank should be {rank}")
    if not problems and not learned_something(tensors):
        problems.append("the adapter has learned nothing: every B is zero")
    if problems:
        raise ModelError.of([Problem(text, where=str(folder)) for text in sorted(problems)])


def _folded(tensors: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    return {key: value.float() * (scaling if ".lora_B." in key else 1.0) for key, value in tensors.items()}


def _config(config: Mapping[str, Any], lora: LoraSection) -> dict[str, Any]:
    plain = {"r": lora.r, "lora_alpha": lora.r, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return {**config, **plain}


@torch.no_grad()
def _largest_error(trained: Mapping[str, Tensor], portable: Mapping[str, Tensor], scaling: float) -> float:
    """Relative Frobenius error of the worst layer's delta, from [r, r] products alone: |BA|^2 = tr(B'B AA')."""
    worst = 0.0
    for key, a in trained.items():
        if ".lora_A." not in key:
            continue
        other = key.replace(".lora_A.", ".lora_B.")
        wanted, found = trained[other].double() * scaling, portable[other].double()
        gram = a.double() @ a.double().T
        missed = wanted - found
        size = float(((wanted.T @ wanted) * gram).sum())
        error = float(((missed.T @ missed) * gram).sum())
        same_a = torch.equal(a.float(), portable[key])
        worst = max(worst, (error / size) ** 0.5 if size else 0.0, 0.0 if same_a else float("inf"))
    return worst


def _card(recipe: Recipe, adapter: Path, scaling: float, error: float) -> str:
    lora = recipe.lora
    assert lora is not None, "checked by the caller"
    return "\n".join(
        [
            "---",
            *base_line(recipe, origin_of(adapter)),
            "library_name: peft",
            "pipeline_tag: text-generation",
            "tags: [qlora, lora]",
            "---",
            "",
            f"# Adapter for {recipe.model.base}, portable",
            "",
            f"Written by qlora {__version__}: rank {lora.r} everywhere, alpha {lora.r}, the trained scaling of "
            f"{scaling:g} multiplied into B, so that every server adds the same delta. Relative error of the delta "
            f"against the trained adapter: {error:.1e}.",
            "",
        ]
    )
