"""The merge receipt: what a merged model is, how it was compared with what it came from, and its card.

Knows figures and files. Invariant: it says what was measured on the files that carry it, or that nothing was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_cli import __version__
from qlora_cli.evaluation.divergence import Divergence
from qlora_cli.export.merge import Kind
from qlora_cli.recipe.schema import Recipe

LEAST_SURVIVAL = 0.5
"""Of the delta, in the merged weights: below, most of what was learned is gone whatever the rows say."""


OTHER_BASE = "**The base is not the one that the adapter was trained on** (`--allow-changed-base`)."


@dataclass(frozen=True)
class Candidate:
    """A way to merge."""

    base: Kind
    dtype: str

    def __str__(self) -> str:
        return f"--base {self.base}" + (f" --dtype {self.dtype}" if self.base != "requantized" else "")


@dataclass(frozen=True)
class Receipt:
    """One merged model. `divergence` is None where nothing was compared; `delta_survived` and `delta_error` are the
    share of the delta in the weights as written, and the relative error of that."""

    candidate: Candidate
    delta_survived: float
    delta_error: float
    divergence: Divergence | None
    rows_from: str
    tolerance: float
    base_changed: bool = False

    @property
    def distance(self) -> float:
        """What orders candidates: the KL, or the delta's error where nothing was compared; infinite for no number."""
        value = self.divergence.kl if self.divergence else self.delta_error
        return math.inf if math.isnan(value) else value

    @property
    def passed(self) -> bool:
        """Whether it is the model that was trained, as far as was measured."""
        far = self.divergence is not None and not self.divergence.kl <= self.tolerance
        return not far and self.delta_survived >= LEAST_SURVIVAL

    def line(self) -> str:
        """The figures in one line."""
        kept = f"{self.delta_survived:.1%} of the delta survived rounding (error {self.delta_error:.2%})"
        if self.divergence is None:
            return f"{kept}; not compared with base + adapter"
        d = self.divergence
        return (
            f"KL {d.kl:.2e} nats/token (without the adapter {d.kl_without_adapter:.2e}), same top token "
            f"{d.top1_agreement:.2%}, loss {d.reference_loss:.4f} -> {d.other_loss:.4f}; {kept}"
        )

    def as_json(self, others: Sequence[Receipt] = ()) -> dict[str, Any]:
        """The values of merge_receipt.json; `others` were measured too and not taken."""
        return {
            "qlora": __version__,
            **asdict(self.candidate),
            "verified": self.divergence is not None,
            "passed": self.passed if self.divergence else None,
            "base_changed_since_training": self.base_changed,
            "tolerance": self.tolerance,
            "rows_from": self.rows_from,
            "delta_survived": self.delta_survived,
            "delta_error": self.delta_error,
            **(asdict(self.divergence) if self.divergence else {}),
            "others": [other.as_json() for other in others],
        }


def merged_card(recipe: Recipe, base: Sequence[str], adapter: str, receipt: Receipt, others: Sequence[Receipt]) -> str:
    """The model card, in the Hub's format; `base` is its line about the base."""
    kind = receipt.candidate
    compared = (
        f"Compared with base + adapter on {receipt.divergence.rows:,} rows ({receipt.divergence.targets:,} target "
        f"tokens) of {receipt.rows_from}, after reloading these files."
        if receipt.divergence
        else "**Not verified**: this model was not compared with base + adapter (`--no-verify`)."
    )
    lines = [
        "---",
        *base,
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [qlora, merged]",
        "---",
        "",
        f"# {recipe.model.base}, with an adapter merged in",
        "",
        f"Merged by qlora {__version__} from {recipe.model.base} and {adapter}: base {kind.base}, {kind.dtype}. "
        "`recipe.yaml` holds the settings of the training, `merge_receipt.json` every figure below.",
        "",
        compared,
        "",
        *([OTHER_BASE, ""] if receipt.base_changed else []),
        *_table(receipt),
    ]
    if others:
        lines += ["", "Measured too, and not taken:", ""]
        lines += [f"- {other.candidate}: {other.line()}" for other in others]
    return "\n".join([*lines, ""])


def _table(receipt: Receipt) -> list[str]:
    rows = [("share of the delta that survived rounding", f"{receipt.delta_survived:.2%}")]
    rows += [("relative error of the delta as written", f"{receipt.delta_error:.2%}")]
    if d := receipt.divergence:
        rows += [
            ("mean KL from base + adapter", f"{d.kl:.3e} nats per token (tolerance {receipt.tolerance:g})"),
            ("mean KL of the base without the adapter", f"{d.kl_without_adapter:.3e} nats per token"),
            ("same likeliest token", f"{d.top1_agreement:.3%}"),
            ("loss of base + adapter", f"{d.reference_loss:.5f}"),
            ("loss of this model", f"{d.other_loss:.5f}"),
        ]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
