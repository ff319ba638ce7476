"""What lies beside a saved adapter or model: tokenizer, recipe, model card.

Sees the whole recipe. Invariant: the card states what this run measured, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli import __version__
from qlora_cli.evaluation.perplexity import EvalResult
from qlora_cli.files import disk_errors, write_json, write_text
from qlora_cli.recipe.schema import Recipe
from qlora_cli.workflows.prepare import Prepared

RECIPE_FILE, ORIGIN_FILE = "recipe.yaml", "origin.json"


@dataclass(frozen=True)
class Outcome:
    """What a run has reached when something is saved."""

    step: int
    train_loss: float
    held_out: EvalResult | None


def beside(ready: Prepared, resolved: str, outcome: Outcome) -> Callable[[Path], None]:
    """A function that puts tokenizer, template, resolved recipe, origin and model card into a folder. The origin is
    what a later reader compares to learn whether base or data are still those of the training."""
    data = {source.source: source.sha256 for source in ready.data.receipt.sources}
    place = str(ready.folder.path.absolute()) if ready.folder.revision is None else None
    computed = str(ready.dtype).removeprefix("torch.")
    origin = {"base": ready.folder.fingerprint, "base_folder": place, "data": data, "compute_dtype": computed}

    def write(folder: Path) -> None:
        with disk_errors(folder):
            ready.tokenizer.save_pretrained(folder)
        write_text(folder / RECIPE_FILE, resolved)
        write_json(folder / ORIGIN_FILE, origin)
        write_text(folder / "README.md", model_card(ready, outcome))

    return write


def model_card(ready: Prepared, outcome: Outcome) -> str:
    """The card, in the Hub's format."""
    recipe, receipt = ready.recipe, ready.data.receipt
    held = outcome.held_out
    result = f"{held.loss:.4f} (perplexity {held.perplexity:.3f}, {held.targets:,} tokens)" if held else "not measured"
    return "\n".join(
        [
            "---",
            *base_line(recipe, {"base_folder": None if ready.folder.revision else "local"}),
            "library_name: peft" if recipe.lora else "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [qlora, lora]" if recipe.lora else "tags: [fine-tuned]",
            "---",
            "",
            f"# {'Adapter for' if recipe.lora else 'Fine-tuned'} {recipe.model.base}",
            "",
            f"Trained with qlora {__version__}; `{RECIPE_FILE}` beside this file holds every setting.",
            "",
            "| | |",
            "|---|---|",
            f"| base | {recipe.model.base}, revision {ready.folder.revision or 'local files'} |",
            f"| quantization | {_quantization(recipe)} |",
            f"| adapter | {_adapter(recipe)} |",
            f"| rows trained on | {receipt.train.rows:,} ({receipt.train.supervised_tokens:,} tokens with loss) |",
            f"| steps | {outcome.step:,} of {ready.plan.steps:,}, {recipe.train.batch_size} rows each |",
            f"| training loss, last step | {outcome.train_loss:.4f} |",
            f"| held-out loss | {result} |",
            "",
        ]
    )


def base_line(recipe: Recipe, origin: Mapping[str, Any]) -> list[str]:
    """The card's `base_model`, which the Hub reads as the id of a repository: left out for a folder of this machine."""
    return [] if origin.get("base_folder") else [f"base_model: {recipe.model.base}"]


def _quantization(recipe: Recipe) -> str:
    quant = recipe.quantization
    return quant.type + (" with double quantization" if quant.double_quant and quant.type != "none" else "")


def _adapter(recipe: Recipe) -> str:
    if recipe.lora is None:
        return "none: every weight was trained"
    return f"LoRA, r {recipe.lora.r}, alpha {recipe.lora.alpha:g}{', rank-stabilised' if recipe.lora.rslora else ''}"
