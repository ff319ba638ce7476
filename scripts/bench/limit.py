"""The limit that a run is held against: what the machine's matrix products allow. See docs on the engine.

    python scripts/bench/limit.py        measures and prints FLOP/s

Per real token and parameter of a frozen linear layer: 2 FLOP forward, 2 for the gradient of its input, 2 more where the
forward pass is repeated (gradient checkpointing). Its adapter of rank r has r (in + out) parameters: 2 FLOP each
forward, 4 backward (they do need a gradient of their own), 2 more where repeated. The projection to the vocabulary:
4 FLOP per parameter, at supervised tokens only, never repeated. Attention, norms, the loss and the optimizer count as
nothing: the limit is a bound, not a forecast.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import child

ROWS, IN, OUT = 2048, 1024, 2816
"""The product that is timed: a micro-batch of 2,048 tokens through the widest layer of the benchmark's shape."""


@dataclass(frozen=True)
class Counts:
    """What of a model costs: parameters of its adapted linear layers and of its head, and `edges`, the sum of
    in + out over the adapted layers."""

    linear: int
    head: int
    edges: int


def flop_per_token(counts: Counts, rank: int, checkpointing: bool, target_share: float) -> float:
    """FLOP that training on one real token takes at least, where `target_share` of the tokens are supervised."""
    repeated = 2 if checkpointing else 0
    base = (4 + repeated) * counts.linear
    adapters = (6 + repeated) * rank * counts.edges
    return base + adapters + 4 * counts.head * target_share


def measure_gemm(seconds: float = 1.5) -> dict[str, float]:
    """FLOP/s of a bfloat16 product with torch's default threads: median and best of all within about `seconds`."""
    import torch

    x, weight = torch.randn(ROWS, IN, dtype=torch.bfloat16), torch.randn(OUT, IN, dtype=torch.bfloat16)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 8 or time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - started)
    work = 2 * ROWS * IN * OUT
    kept = times[3:]  # the first ones make the kernel
    return {"median": work / statistics.median(kept), "best": work / min(kept), "threads": torch.get_num_threads()}


def gemm(folder: Path) -> float:
    """The median now, measured by a process of its own; its log goes to `folder`."""
    log = folder / "gemm.log"
    child.run([sys.executable, __file__], log)
    found: dict[str, float] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return found["median"]


if __name__ == "__main__":
    print(json.dumps(measure_gemm()))
