"""What is compared with what: configurations, lengths, learning rates to try, claims.

Knows names and recipe keys; nothing of files or results. Invariant: configurations that a claim compares differ in
what the claim is about, and in the learning rate only where the sweep chose one for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FULL, SIXTEEN, DOUBLE, NF4, FP4 = "full fine-tuning", "16-bit LoRA", "QLoRA NF4 + DQ", "NF4", "FP4"
STORAGES: dict[str, dict[str, str | bool]] = {
    FULL: {"type": "none"},
    SIXTEEN: {"type": "none"},
    DOUBLE: {"type": "nf4", "double_quant": True},
    NF4: {"type": "nf4", "double_quant": False},
    FP4: {"type": "fp4", "double_quant": False},
}
"""Name to keys of `quantization`."""
LINEAR, ATTENTION = "all-linear", "attention-only"
TARGETS = {LINEAR: "all-linear", ATTENTION: "[q_proj,k_proj,v_proj,o_proj]"}
RANKS = (4, 16, 64)
SWEPT_RANK = 16
LENGTHS = (16, 48)
"""Steps of a run, in two lengths: the first shows how fast a configuration learns, the second rather where it ends. The
first was chosen in trial runs; the second is three times it, and was so before any run of that length."""
LORA_RATES = (1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2)
RATES = {FULL: (1.5e-4, 3e-4, 4.5e-4, 6e-4, 9e-4, 1.2e-3), LINEAR: LORA_RATES, ATTENTION: LORA_RATES}
"""Learning rates that the sweep tries, for each kind of configuration and each length."""


@dataclass(frozen=True)
class Configuration:
    """How the base is stored and what is trained on it; a full fine-tuning has neither targets nor rank."""

    storage: str
    targets: str = ""
    rank: int = 0

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.storage}, {self.targets}, rank {self.rank}" if self.targets else self.storage

    @property
    def kind(self) -> str:
        """What shares a learning rate."""
        return self.targets or FULL

    @property
    def overrides(self) -> list[str]:
        """The keys in which its recipe differs from the demo's."""
        quantization = [f"quantization.{key}={value}".lower() for key, value in STORAGES[self.storage].items()]
        lora = [f"lora.r={self.rank}", f"lora.targets={TARGETS[self.targets]}"] if self.targets else ["lora=null"]
        return quantization + lora


def configurations() -> list[Configuration]:
    """All that the study compares."""
    loras = [Configuration(s, t, r) for t in TARGETS for r in RANKS for s in (SIXTEEN, DOUBLE, NF4, FP4)]
    return [Configuration(FULL), *loras]


@dataclass(frozen=True)
class Study:
    """Everything that decides the figures; `work` also has the results."""

    work: Path
    base: Path
    configurations: tuple[Configuration, ...]
    seeds: tuple[int, ...]
    rates: Mapping[str, tuple[float, ...]]
    lengths: tuple[int, ...]
    train: int = 1600
    heldout: int = 200
    chats: int = 300
    sweep_seed: int = 99


@dataclass(frozen=True)
class Run:
    """One training run. `rows` names the held-out rows: those of the study, or others for the sweep."""

    configuration: Configuration
    steps: int
    seed: int
    rate: float
    rows: str = "heldout"


@dataclass(frozen=True)
class Comparison:
    """Two groups of configurations, each taken as its mean. `expected` is what the paper says of the first group:
    `same` as the second, or `better`."""

    label: str
    first: tuple[Configuration, ...]
    second: tuple[Configuration, ...]
    expected: str


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the comparisons that test it. `stored` are pairs of storages whose damage to the
    untrained base is compared too."""

    text: str
    comparisons: tuple[Comparison, ...]
    stored: tuple[tuple[str, str], ...] = ()


def _group(storage: str, targets: str, ranks: tuple[int, ...] = RANKS) -> tuple[Configuration, ...]:
    return tuple(Configuration(storage, targets, rank) for rank in ranks)


def _storages(first: str, second: str, expected: str) -> tuple[Comparison, ...]:
    return tuple(
        Comparison(f"{first} against {second}, {t}, mean of ranks", _group(first, t), _group(second, t), expected)
        for t in TARGETS
    )


def _against_full(storage: str) -> Comparison:
    label = f"{storage} against {FULL}, {LINEAR}, mean of ranks"
    return Comparison(label, _group(storage, LINEAR), (Configuration(FULL),), "same")


def _targets() -> tuple[Comparison, ...]:
    pairs = [((rank,), (rank,)) for rank in RANKS] + [((RANKS[0],), (RANKS[-1],))]
    return tuple(
        Comparison(
            f"{DOUBLE}: {LINEAR} rank {one[0]} against {ATTENTION} rank {two[0]}",
            _group(DOUBLE, LINEAR, one),
            _group(DOUBLE, ATTENTION, two),
            "better",
        )
        for one, two in pairs
    )


def _ranks() -> tuple[Comparison, ...]:
    return tuple(
        Comparison(
            f"{DOUBLE}, {LINEAR}: rank {high} against rank {low}",
            _group(DOUBLE, LINEAR, (high,)),
            _group(DOUBLE, LINEAR, (low,)),
            "same",
        )
        for low, high in ((4, 16), (16, 64), (4, 64))
    )


def claims() -> list[Claim]:
    """The paper's claims, settled before any result was seen."""
    matching = (*_storages(DOUBLE, SIXTEEN, "same"), _against_full(DOUBLE), _against_full(SIXTEEN))
    return [
        Claim("4-bit adapters match 16-bit LoRA and full fine-tuning", matching),
        Claim("NF4 is better than FP4", _storages(NF4, FP4, "better"), ((NF4, FP4),)),
        Claim("double quantization costs nothing", _storages(DOUBLE, NF4, "same"), ((DOUBLE, NF4),)),
        Claim("adapters on all linear layers are better than on attention alone", _targets()),
        Claim("the rank matters little", _ranks()),
    ]
