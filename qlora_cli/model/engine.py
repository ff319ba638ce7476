"""How a run computes its model: which fast parts are in use.

Knows a model with its adapter, and the fast parts. Invariant: each part was tried on this very model against its slow
twin before it is used; what does not fit falls back alone, and `parts` says so. Trying leaves no gradient behind, no
mode changed, and the random state as it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_cli.model.chunked import chunked_loss
from qlora_cli.model.compiler import keep_compiled, why_no_compiler
from qlora_cli.model.fused import PLAIN, Products, fuse, unfuse
from qlora_cli.model.lora import LoraLinear
from qlora_cli.model.loss import LossSum, TargetLosses, plain_loss, plain_losses
from qlora_cli.model.native.build import NotBuiltError
from qlora_cli.model.native.pointwise import native_kernels
from qlora_cli.model.native.products import native_products
from qlora_cli.model.packing import find_packing
from qlora_cli.model.pointwise import Kernels, compiled_kernels, plain_kernels
from qlora_cli.model.rotary import replace_rotary, restore_rotary
from qlora_cli.model.segments import COMPILED, set_attention
from qlora_cli.model.shortcuts import restore, shorten
from qlora_cli.model.trial import DECLINED, in_mode, in_words

PACKED = "packed rows"
PROBE = (2, 16)
"""Rows and tokens of the small batch on which parts are tried."""
TOLERANCE = {torch.float32: 1e-3}
TOLERANCE_16_BIT = 0.1
"""Relative difference of the adapter's gradient. It is for wrong formulas: in 16 bits a deep model's gradients differ
by some percent when its sums are merely ordered otherwise."""
STIR = 0.02
"""Standard deviation of what is added to B while a part is tried."""


@dataclass(frozen=True)
class Part:
    """A fast part: whether it is in use, and in a few words what it does, or why it is not."""

    name: str
    used: bool
    detail: str


@dataclass(frozen=True)
class Engine:
    """`loss` of the model and `losses` of each target, whether rows may be packed, and which parts stand behind it."""

    loss: LossSum
    losses: TargetLosses
    packs: bool
    parts: tuple[Part, ...]
    compile_seconds: float = 0.0

    def line(self, packing: bool) -> str:
        """The parts in use, where the recipe wants `packing` or does not."""
        used = [part.detail for part in self.parts if part.used and (packing or part.name != PACKED)]
        return ", ".join(used) or "the model's own forward"

    def notes(self, packing: bool) -> list[str]:
        """A sentence for each part that is wanted and not in use."""
        lacking = [part for part in self.parts if not part.used and (packing or part.name != PACKED)]
        return [f"without {part.name}: {part.detail}" for part in lacking]


def plain_engine(model: Any) -> Engine:
    """The slow twin: the model's own forward and loss, rows padded."""
    return Engine(
        partial(plain_loss, model), partial(plain_losses, model), False, (Part(PACKED, False, "model.engine is plain"),)
    )


def build_engine(model: Any, layers: Sequence[LoraLinear], compiled: bool) -> Engine:
    """Tries every part on `model`, which has its adapter (`layers`) and is where it will be trained; without layers,
    when nothing is trained or everything, the loss and packing alone. `compiled`: the pointwise parts are to be
    compiled, where there is a compiler."""
    parts, seconds = list[Part](), 0.0
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), in_mode(model, training=True):
        probe = _Probe.of(model, layers)
        if layers:
            pointwise, seconds = _pointwise(probe, compiled)
            parts = [_fused(probe, compiled), pointwise]
        loss, losses, chunked = _loss(probe)
        packed = _packed(probe, compiled)
    return Engine(loss, losses, packed.used, (packed, chunked, *parts), seconds)


@contextmanager
def _stirred(layers: Sequence[LoraLinear]) -> Iterator[None]:
    """B away from its first value, zero, with which every A has a gradient of zero, whatever computes it."""
    before = [layer.lora_b.data for layer in layers]
    for layer, value in zip(layers, before, strict=True):
        layer.lora_b.data = torch.randn_like(value).mul_(STIR).add_(value)
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.lora_b.data = value


@dataclass(frozen=True)
class _Probe:
    """A small batch of random tokens, and the gradient that the slow twin has for it."""

    model: Any
    layers: Sequence[LoraLinear]
    inputs: Mapping[str, Any]
    targets: Tensor
    labels: Tensor
    gradient: tuple[Tensor, ...]
    vocabulary: int

    @classmethod
    def of(cls, model: Any, layers: Sequence[LoraLinear]) -> _Probe:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, PROBE, generator=torch.Generator().manual_seed(0)).to(model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        targets = torch.ones_like(ids, dtype=torch.bool)
        targets[:, -1] = False
        labels = torch.roll(ids, -1, dims=1)[targets]
        probe = cls(model, layers, inputs, targets, labels, (), vocabulary)
        return replace(probe, gradient=probe.measure()) if layers else probe

    def measure(self) -> tuple[Tensor, ...]:
        """The gradients of every A and B: as much memory as a step's."""
        torch.manual_seed(0)
        factors = [factor for layer in self.layers for factor in (layer.lora_a, layer.lora_b)]
        with _stirred(self.layers):
            loss = plain_loss(self.model, self.inputs, self.targets, self.labels)
            return torch.autograd.grad(loss, factors)

    def off(self) -> str:
        """Empty where the model still has the gradient that it had."""
        try:
            found = _difference(self.measure(), self.gradient)
        except DECLINED as error:
            return in_words(error)
        allowed = TOLERANCE.get(self.model.dtype, TOLERANCE_16_BIT)
        return "" if found <= allowed else f"gradients differ by {found:.1%}"


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Relative, of all tensors together."""
    apart = [(a.float() - b.float()).norm() for a, b in zip(found, wanted, strict=True)]
    return float(torch.stack(apart).norm() / torch.stack([b.float().norm() for b in wanted]).norm())


def _fused(probe: _Probe, compiled: bool) -> Part:
    name, on_cpu = "fused projections", probe.model.device.type == "cpu"
    count, problem, how = 0, "no layer can be", ""
    for products, words in _products(compiled and on_cpu):
        count, how = fuse(probe.model, probe.layers, probe.inputs, products), words
        problem = probe.off() if count else "no layer can be"
        if not problem:
            break
    if problem:
        unfuse(probe.layers)
        return Part(name, False, problem)
    groups = len({layer.group for layer in probe.layers if layer.group})
    return Part(name, True, f"{count} of {len(probe.layers)} projections fused in {groups} groups{how}")


def _products(compiled: bool) -> Iterator[tuple[Products, str]]:
    """Ways to compute products, fastest first, and words for them."""
    if compiled:
        with suppress(NotBuiltError):
            yield native_products(), " and compiled"
    yield PLAIN, ""


def _pointwise(probe: _Probe, compiled: bool) -> tuple[Part, float]:
    """The part, and the seconds that compiling took."""
    started, reason = time.perf_counter(), "not compiled"
    if compiled:
        try:
            part = _shortened(probe, _compiled(probe.model.device), "compiled")
            if part.used:
                return part, time.perf_counter() - started
            reason = f"compiled: {part.detail}"
        except NotBuiltError as error:
            reason = str(error)
    return _shortened(probe, plain_kernels(), f"fused ({reason})"), 0.0


def _compiled(device: torch.device) -> Kernels:
    """For a CPU, what is written for it; for a GPU, what torch's compiler makes of the plain ones."""
    if reason := why_no_compiler(device):
        raise NotBuiltError(reason)
    if device.type == "cpu":
        return native_kernels()
    keep_compiled()
    return compiled_kernels()


def _shortened(probe: _Probe, kernels: Kernels, how: str) -> Part:
    name = "fused norms and gates"
    norms, gates = shorten(probe.model, kernels)
    rotations = replace_rotary(probe.model, kernels.rotate) if kernels.rotate else 0
    problem = probe.off() if norms + gates + rotations else "the model has none that are known"
    if problem:
        restore(probe.model)
        restore_rotary(probe.model)
        return Part(name, False, problem)
    rotary = f", {rotations} rotary embeddings" if rotations else ""
    return Part(name, True, f"{norms} norms{rotary} and {gates} gated activations {how}")


def _packed(probe: _Probe, compiled: bool) -> Part:
    found = find_packing(probe.model, probe.vocabulary, compiled)
    if found.attention is None:
        return Part(PACKED, False, found.reason)
    set_attention(probe.model, found.attention)
    if found.attention == COMPILED:
        return Part(PACKED, True, f"{PACKED}, attention compiled")
    return Part(PACKED, True, f"{PACKED} (attention not compiled: {found.reason})" if found.reason else PACKED)


def _loss(probe: _Probe) -> tuple[LossSum, TargetLosses, Part]:
    try:
        found = chunked_loss(probe.model, probe.inputs, probe.targets, probe.labels)
    except DECLINED as error:
        found = in_words(error)
    if isinstance(found, str):
        own = partial(plain_loss, probe.model), partial(plain_losses, probe.model)
        return *own, Part("chunked loss", False, found)
    return found, found.each, Part("chunked loss", True, "loss at target tokens in chunks")
