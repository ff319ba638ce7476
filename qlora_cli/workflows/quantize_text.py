"""What `qlora quantize` says: text for the terminal, JSON, a model card.

Knows figures. Invariant: all three are made of the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli import __version__
from qlora_cli.export.damage import Damage
from qlora_cli.recipe.schema import QuantizationSection
from qlora_cli.workflows.events import size
from qlora_cli.workflows.quantize_loss import Measured
from qlora_cli.workflows.tables import table


@dataclass(frozen=True)
class QuantizeResult:
    """What was quantised, how, and what that did. `output` is None where nothing was written."""

    model: str
    revision: str | None
    output: Path | None
    section: QuantizationSection
    chosen: str
    dtype: str
    left_out: tuple[str, ...]
    parameters: int
    bytes_before: int
    other_bytes: int
    damage: Mapping[str, Damage]
    losses: Measured | None

    @property
    def shown(self) -> str:
        """The variant whose layers are listed: that written, or the first one measured."""
        return self.chosen if self.chosen in self.damage else next(iter(self.damage))

    def bytes_after(self, variant: str) -> int:
        """Tensors of the whole model in a variant."""
        return self.damage[variant].stored_bytes + self.other_bytes

    def bits(self, variant: str) -> float:
        """Bits per parameter over the whole model."""
        return 8 * self.bytes_after(variant) / self.parameters

    def as_json(self) -> dict[str, Any]:
        """Plain values, every layer of every variant."""
        return {
            "event": "result",
            "model": self.model,
            "revision": self.revision,
            "output": str(self.output) if self.output else None,
            "quantization": {**self.section.model_dump(mode="json"), "skip_modules": list(self.left_out)},
            "dtype": self.dtype,
            "variant": self.chosen if self.output else None,
            "parameters": self.parameters,
            "bytes_before": self.bytes_before,
            "variants": {
                name: damage.as_json()
                | {"bytes_after": self.bytes_after(name), "bits_per_parameter_whole_model": self.bits(name)}
                for name, damage in self.damage.items()
            },
            "loss": self.losses.as_json() if self.losses else None,
            "qlora": __version__,
        }

    def text(self) -> str:
        """Tables for the terminal, then the folder."""
        parts = [self._summary(), self._worst(), self._advice(), str(self.output) if self.output else ""]
        return "\n\n".join(part for part in parts if part)

    def _summary(self) -> str:
        head = ["", "size", "bits/weight", "bits/parameter", "rel. error", "max error"]
        none = "" if len(self.damage) == 1 else "-"
        bits = f"{8 * self.bytes_before / self.parameters:.3f}"
        rows = [["as it is", size(self.bytes_before), none, bits, none, none]]
        rows += [[name, *self._figures(name)] for name in self.damage]
        if self.losses is not None:
            before = self.losses.before
            head += ["loss", "perplexity", "difference (95%)"]
            rows[0] += [f"{before.loss:.4f}", f"{before.perplexity:.3f}", ""]
            rows[1:] = [[*row, *self._loss(row[0])] for row in rows[1:]]
        return table([head, *rows])

    def _figures(self, name: str) -> list[str]:
        damage = self.damage[name]
        return [
            size(self.bytes_after(name)),
            f"{damage.bits:.3f}",
            f"{self.bits(name):.3f}",
            f"{damage.error:.5f}",
            f"{damage.largest:.5f}",
        ]

    def _loss(self, name: str) -> list[str]:
        assert self.losses is not None
        after, by = self.losses.after[name], self.losses.difference[name]
        return [f"{after.loss:.4f}", f"{after.perplexity:.3f}", f"{by.mean:+.4f} ({by.low:+.4f} to {by.high:+.4f})"]

    def _worst(self) -> str:
        worst = self.damage[self.shown].worst()
        head = [f"worst layers, {self.shown}", "rel. error", "max error", "bits/weight"]
        rows = [[each.name, f"{each.error:.5f}", f"{each.largest:.5f}", f"{each.bits:.3f}"] for each in worst]
        return table([head, *rows])

    def _advice(self) -> str:
        names = self.damage[self.shown].outliers()
        if not names:
            return ""
        options = " ".join(f"--skip {name}" for name in names)
        return (
            f"{len(names)} of {len(self.damage[self.shown].layers)} layers lie far above the others "
            f"(relative error over {self.damage[self.shown].limit:.5f}). To leave them in {self.dtype}:\n"
            f"  {options}\n  quantization.skip_modules: [{', '.join(names)}]"
        )


def card(result: QuantizeResult) -> str:
    """The model card, in the Hub's format."""
    quant, damage, losses = result.section, result.damage[result.chosen], result.losses
    double = "double quantization" if quant.double_quant else "no double quantization"
    rows = [
        f"| storage | {quant.type}, {double}, blocks of {quant.blocksize}, quantised from {result.dtype} |",
        f"| not in 4 bits | {', '.join(f'`{name}`' for name in result.left_out)}, embeddings, norms |",
        f"| size | {size(result.bytes_before)} before, {size(result.bytes_after(result.chosen))} now |",
        f"| bits per parameter | {damage.bits:.3f} in 4-bit layers, {result.bits(result.chosen):.3f} over all |",
        f"| relative error of the weights | {damage.error:.5f} |",
    ]
    if losses is not None:
        after, by = losses.after[result.chosen], losses.difference[result.chosen]
        difference = f"{by.mean:+.4f}, 95% interval {by.low:+.4f} to {by.high:+.4f}"
        rows.append(
            f"| loss on {len(losses.before.where):,} rows of {Path(losses.data).name} | "
            f"{losses.before.loss:.4f} before, {after.loss:.4f} now ({difference}) |"
        )
    return "\n".join(
        [
            "---",
            f"base_model: {result.model}",
            "base_model_relation: quantized",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [bitsandbytes, 4-bit]",
            "---",
            "",
            f"# {Path(result.model).name} in 4 bits",
            "",
            f"Quantised with qlora {__version__}; `quantize_report.json` beside this file has every layer.",
            "It loads in transformers with bitsandbytes as any model does.",
            "",
            "| | |",
            "|---|---|",
            f"| base | {result.model}, revision {result.revision or 'local files'} |",
            *rows,
            "",
        ]
    )
