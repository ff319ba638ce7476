"""Merging beside its peer: `qlora merge` against PEFT's `merge_and_unload` on the 16-bit base and `save_pretrained`.

    python scripts/bench/merge.py --shape 1b

Each way runs in a process of its own; memory is the peak of its resident memory above what it had after imports. The
peer merges into the 16-bit weights, which are not those that a 4-bit run trained on; it is what is usually done. Both
write bfloat16; neither compares the result with anything. Ratios are peer / ours: above 1 we are faster or leaner.
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
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

HERE = Path(__file__).resolve().parent
RECIPE = """\
model: {{base: {base}}}
quantization: {{compute_dtype: bfloat16}}
lora: {{r: 16, alpha: 32}}
data: {{train: none.jsonl}}
train: {{steps: 1}}
"""


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def write_adapter(base: Path, folder: Path) -> None:
    """A random adapter for every linear layer, as a run would leave it; needs no weights of the base."""
    from safetensors.torch import save_file

    from qlora_cli.model.adapter import CONFIG, WEIGHTS, adapter_config
    from qlora_cli.model.base import load_config, meta_model
    from qlora_cli.model.folder import find_base
    from qlora_cli.model.lora import attach
    from qlora_cli.recipe.schema import LoraSection

    lora = LoraSection(r=16, alpha=32)
    model = meta_model(load_config(find_base(str(base), None)))
    layers = attach(model, lora, torch.float32, seed=0)
    config = adapter_config(model, layers, lora, str(base))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": torch.empty(shape).normal_(std=0.02, generator=generator)
        for name, layer in layers.items()
        for part, shape in (("A", layer.lora_a.shape), ("B", layer.lora_b.shape))
    }
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base), encoding="utf-8")
    for file in base.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(base / "chat_template.jinja", folder / "chat_template.jinja")


def run_ours(adapter: Path, out: Path) -> None:
    """`qlora merge`, without its comparison."""
    from qlora_cli.workflows.merge import MergeOptions, run_merge

    run_merge(MergeOptions(adapter=adapter, output=out, verify=False), lambda event: None)


def run_peer(base: Path, adapter: Path, out: Path) -> None:
    """PEFT on the 16-bit base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def measure(way: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Seconds and MB of one way, measured in this process."""
    import peft  # noqa: F401 - what both have loaded before the clock starts
    import transformers  # noqa: F401

    import qlora_cli.workflows.merge  # noqa: F401

    before = resident("VmRSS")
    started = time.perf_counter()
    if way == "ours":
        run_ours(adapter, out)
    else:
        run_peer(base, adapter, out)
    seconds = time.perf_counter() - started
    written = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
    return {"seconds": seconds, "peak_mb": resident("VmHWM") - before, "written_mb": written}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure merging beside PEFT.")
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        way, *paths = args.way
        print(json.dumps(measure(way, *map(Path, paths))))
        return 0
    with tempfile.TemporaryDirectory() as place:
        base, adapter = Path(place) / "base", Path(place) / "adapter"
        subprocess.run([sys.executable, HERE / "random_base.py", args.shape, "--out", base], check=True)
        write_adapter(base, adapter)
        found: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
        for _ in range(args.repeat):
            for way, results in found.items():
                out = Path(place) / "out"
                command = [sys.executable, __file__, "--way", way, str(base), str(adapter), str(out)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(out)
    show(found, args.json)
    return 0


def show(found: dict[str, list[dict[str, float]]], as_json: bool) -> None:
    """Medians of both, and their ratios."""
    median = {way: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for way, runs in found.items()}
    ratios: dict[str, Any] = {k: median["peer"][k] / median["ours"][k] for k in ("seconds", "peak_mb")}
    if as_json:
        print(json.dumps({**found, "median": median, "ratio": ratios}))
        return
    for way, values in median.items():
        print(f"{way}: {values['seconds']:.1f} s, {values['peak_mb']:.0f} MB, {values['written_mb']:.0f} MB written")
    print(f"peer / ours: time {ratios['seconds']:.2f}, memory {ratios['peak_mb']:.1f}")


if __name__ == "__main__":
    raise SystemExit(main())
