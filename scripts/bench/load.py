"""Starting on a 4-bit base: quantised, kept in the cache, or read from it; and the peer, transformers + bitsandbytes.

    python scripts/bench/random_base.py 1b --out out/random-1b
    python scripts/bench/load.py load out/random-1b --rounds 3
    python scripts/bench/load.py startup out/random-1b --rounds 3

`load` measures the loading alone, its libraries imported before; `startup` measures `qlora train` from the start of the
process to the loaded base (`loaded_s`) and to the end of its first step (`step_s`), one row of a few tokens.

first   the cache is empty: the base's files are hashed, quantised and kept (written, synced, hashed)
second  the base is read from the cache, which is compared with its hashes
off     `cache: false`
peer    `from_pretrained` with bitsandbytes' 4-bit configuration (`load` only)

Each runs in a process of its own, in turn. Memory is as in `quantize.py`: the most above the interpreter with its
libraries, in MB, all of it and its anonymous part; `over_mb` is the latter less the 4-bit model (below 0 where weights
stay mapped from their files). Ratios are WAY / second. The base's files are read once before, so that all find them in
the system's cache.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))

from quantize import Watch

from qlora_cli.files import sha256

WAYS = {"load": ("first", "second", "off", "peer"), "startup": ("first", "second", "off")}
RECIPE = """\
model: {{base: {base}, device: cpu}}
quantization: {{compute_dtype: bfloat16, cache: {cache}}}
lora: {{r: 8, alpha: 16}}
data: {{train: {rows}, max_length: 64}}
train: {{steps: 1, batch_size: 1}}
output: {out}
"""
ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]}


def ours(base: Path, cached: bool) -> dict[str, float]:
    """`load_base`, through the cache or not."""
    import torch
    from transformers.models.llama import modeling_llama  # what from_pretrained would import while measured

    from qlora_cli.cache.entries import find_cache
    from qlora_cli.model.base import load_base, report
    from qlora_cli.model.folder import find_base
    from qlora_cli.recipe.schema import ModelSection, QuantizationSection

    assert modeling_llama
    section, place = ModelSection(base=str(base)), (QuantizationSection(), torch.bfloat16, torch.device("cpu"))
    watch = Watch()
    model = load_base(find_base(str(base), None), section, *place, find_cache(cached, lambda text: None, fail))
    figures, held = watch.figures(), report(model)
    size = (held.four_bit_bytes + held.other_bytes) / 2**20
    more = {"model_mb": size, "over_mb": figures["anonymous_mb"] - size, "parameters": held.parameters}
    return figures | more


def fail(text: str) -> None:
    """A cache that warns is not what is measured."""
    raise SystemExit(text)


def peer(base: Path) -> dict[str, float]:
    """As transformers' documentation has it."""
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.models.llama import modeling_llama

    assert bitsandbytes and modeling_llama
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    watch = Watch()
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    return watch.figures()


def load(way: str, base: Path, place: Path) -> dict[str, float]:
    """One measurement of the loading, in a fresh process."""
    command = [sys.executable, __file__, "load", str(base), "--child", way]
    environment = os.environ | {"QLORA_CACHE": str(place), "QLORA_CACHE_LIMIT": "500"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def startup(way: str, base: Path, place: Path) -> dict[str, float]:
    """One measurement of `qlora train`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n", encoding="utf-8")
        values = {"base": base, "rows": folder / "rows.jsonl", "out": folder / "run"}
        text = RECIPE.format(**values, cache="false" if way == "off" else "true")
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "qlora_cli", "train", str(folder / "recipe.yaml"), "--json"]
        return dict(events(command, os.environ | {"QLORA_CACHE": str(place), "QLORA_CACHE_LIMIT": "500"}))


def events(command: list[str], environment: dict[str, str]) -> Iterator[tuple[str, float]]:
    """When the base was loaded and the first step done, in seconds from the start of the process."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event.get("label") == "loaded":
                yield "loaded_s", time.perf_counter() - started
            if event["event"] == "step":
                yield "step_s", time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")


def compare(what: str, base: Path, rounds: int) -> dict[str, Any]:
    """Medians of all ways, and their ratios to the second start's."""
    for file in base.glob("*.safetensors"):
        sha256(file)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS[what]}
    measure = {"load": load, "startup": startup}[what]
    with tempfile.TemporaryDirectory(dir=base.parent) as name:
        for _ in range(rounds):
            shutil.rmtree(Path(name) / "cache", ignore_errors=True)
            for way, found in runs.items():
                found.append(measure(way, base, Path(name) / "cache"))
    medians = {
        way: {key: statistics.median(run[key] for run in found) for key in found[0]} for way, found in runs.items()
    }
    times = [key for key in medians["second"] if key in {"seconds", "loaded_s", "step_s"}]
    ratios = {way: {key: medians[way][key] / medians["second"][key] for key in times} for way in medians}
    return {"what": what, "base": base.name, "median": medians, "ratio": ratios, "runs": runs}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure starts on a 4-bit base, with and without the cache.")
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("base", type=Path, help="a 16-bit model, e.g. of random_base.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print every run")
    parser.add_argument("--child", choices=WAYS["load"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(peer(args.base) if args.child == "peer" else ours(args.base, args.child != "off")))
        return 0
    found = compare(args.what, args.base.resolve(), args.rounds)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    columns = list(found["median"]["first"])
    print(f"{'':8}" + "".join(f"{column:>15}" for column in columns) + f"{'x second':>12}")
    for way, values in found["median"].items():
        cells = "".join(f"{values[column]:>15,.2f}" if column in values else f"{'':>15}" for column in columns)
        print(f"{way:8}{cells}{next(reversed(found['ratio'][way].values())):>12.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
