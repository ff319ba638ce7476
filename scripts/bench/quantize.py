"""`qlora quantize` beside its peer: transformers + bitsandbytes, quantised on loading and saved again.

    python scripts/bench/random_base.py 1b --out out/random-1b
    python scripts/bench/quantize.py out/random-1b --rounds 3

Each runs in a process of its own, in turn. Memory is the most resident memory above that of the interpreter with its
libraries imported, in MB: all of it, and its anonymous part (sampled every 5 ms), since mapped files can be dropped by
the system. Ours also measures the damage, reads the result back and writes hashes; the peer does none of it.
Ratios are peer / ours: above 1 we are faster, or leaner.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

FIGURES = ("seconds", "rss_mb", "anonymous_mb")


def memory(name: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


class Watch:
    """Time and memory from its making to `figures`."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the present memory becomes the peak
        self._rss, self._anonymous, self._most = memory("VmRSS:"), memory("RssAnon:"), 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        self._start = time.perf_counter()

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, memory("RssAnon:"))

    def figures(self) -> dict[str, float]:
        """Seconds, and MB above the start."""
        seconds = time.perf_counter() - self._start
        self._done.set()
        self._thread.join()
        return dict(zip(FIGURES, (seconds, memory("VmHWM:") - self._rss, self._most - self._anonymous), strict=True))


def ours(base: Path, out: Path) -> dict[str, float]:
    """The workflow behind `qlora quantize`."""
    from qlora_cli.recipe.schema import QuantizationSection
    from qlora_cli.workflows.quantize import QuantizeOptions, run_quantize

    watch = Watch()
    result = run_quantize(str(base), QuantizeOptions(QuantizationSection(), out), lambda event: None)
    return watch.figures() | {"parameters": result.damage["nf4"].parameters}


def peer(base: Path, out: Path) -> dict[str, float]:
    """As transformers' documentation has it."""
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.models.llama import modeling_llama  # what from_pretrained would import while measured

    assert bitsandbytes and modeling_llama
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    watch = Watch()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return watch.figures()


def run(which: str, base: Path, out: Path) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, str(base), "--child", which, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{which} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(base: Path, rounds: int) -> dict[str, Any]:
    """Medians of both, ratios, and whether they wrote the same."""
    measured: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory(dir=base.parent) as place:
        for _ in range(rounds):
            for which, runs in measured.items():
                shutil.rmtree(Path(place) / which, ignore_errors=True)
                runs.append(run(which, base, Path(place) / which))
        same = same_tensors(Path(place) / "ours", Path(place) / "peer")
    medians = {w: {f: statistics.median(r[f] for r in runs) for f in runs[0]} for w, runs in measured.items()}
    ratios = {figure: medians["peer"][figure] / medians["ours"][figure] for figure in FIGURES}
    pace = medians["ours"]["parameters"] / medians["ours"]["seconds"]
    return {**medians, "ratio": ratios, "same_tensors": same, "parameters_per_second": pace, "runs": measured}


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    import torch

    from qlora_cli.model.folder import BaseFolder
    from qlora_cli.model.source import Source

    first, second = (Source(BaseFolder(path.name, path, None)) for path in (one, other))
    return first.entries.keys() == second.entries.keys() and all(
        torch.equal(first.read(name), second.read(name)) for name in first.entries
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure `qlora quantize` beside transformers + bitsandbytes.")
    parser.add_argument("base", type=Path, help="a 16-bit model, e.g. of random_base.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print every run")
    parser.add_argument("--child", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps({"ours": ours, "peer": peer}[args.child](args.base, args.out)))
        return 0
    found = compare(args.base, args.rounds)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for which in ("ours", "peer", "ratio"):
        print(f"{which:6}" + "".join(f"{figure:>14} {found[which][figure]:9.2f}" for figure in FIGURES))
    print(f"same tensors: {found['same_tensors']}; ours {found['parameters_per_second'] / 1e6:.1f} M weights/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
