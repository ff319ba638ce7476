"""Decoding beside its peer: `generation.Decoder` against `transformers.generate` with PEFT, on the same 4-bit base and
the same adapter, in one process, turn by turn.

    python scripts/bench/decode.py --shape 110m --tokens 64 --prompt 256

The peer runs with its defaults; on CPUs with AVX512-BF16 that includes bitsandbytes' repacking of the weights in place.
Ratios are peer / ours: above 1 we are faster. Memory is resident memory of this process, in MB; ours is measured first,
and so what the libraries keep from their first use counts as ours. With other work on the machine, OMP_NUM_THREADS=1
gives ratios that can be compared.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from qlora_cli.generation.decoder import Decoder
from qlora_cli.generation.sampling import Decoding
from qlora_cli.model.adapter import CONFIG, WEIGHTS, adapter_config, adapter_tensors, load_into, read_adapter
from qlora_cli.model.base import load_base
from qlora_cli.model.folder import find_base
from qlora_cli.model.lora import attach
from qlora_cli.model.switch import Adapters
from qlora_cli.recipe.schema import LoraSection, ModelSection, QuantizationSection

Run = Callable[[list[int], int], list[float]]
"""Prompt and limit -> seconds from the start to each token."""


def resident(peak: bool = False) -> float:
    """Resident memory now, freed memory handed back first; or the most since `forget_peak`. In MB."""
    if not peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    """Makes the present resident memory the peak."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def load_bare(base: Path) -> Any:
    """The base as our commands load it."""
    folder, section = find_base(str(base), None), ModelSection(base=str(base))
    return load_base(folder, section, QuantizationSection(), torch.bfloat16, torch.device("cpu"))


def write_adapter(folder: Path, model: Any, layers: Any, lora: LoraSection, base: Path, seed: int) -> None:
    """A random adapter in PEFT's layout."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: torch.empty_like(value).normal_(std=0.02, generator=generator)
        for key, value in adapter_tensors(layers).items()
    }
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(adapter_config(model, layers, lora, str(base))), encoding="utf-8")


def ours(base: Path, adapter: Path, lora: LoraSection) -> tuple[Decoder, Run]:
    """The decoder, and a run that starts without a cache."""
    model = load_bare(base)
    load_into(attach(model, lora, torch.bfloat16, seed=0), read_adapter(adapter)[1], adapter)
    decoder = Decoder(model, frozenset())

    def run(prompt: list[int], tokens: int) -> list[float]:
        decoder.forget()
        return timed(decoder, prompt, tokens)

    return decoder, run


def timed(decoder: Decoder, prompt: list[int], tokens: int) -> list[float]:
    """Seconds to each token, with whatever the decoder's cache holds."""
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in decoder.stream(prompt, Decoding(tokens))]


class Clock(BaseStreamer):
    """Notes when `generate` hands out each token; its first call is the prompt."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called with each token as it comes."""
        self.times.append(time.perf_counter() - self.start)

    def end(self) -> None:
        """Nothing is left to note."""


def peer(base: Path, adapter: Path) -> Run:
    """transformers' generate on a PEFT model, as their documentation has it."""
    from peft import PeftModel

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    model = PeftModel.from_pretrained(model, adapter).eval()
    model.generation_config.eos_token_id = None

    def run(prompt: list[int], tokens: int) -> list[float]:
        ids, clock = torch.tensor([prompt]), Clock()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
        )
        return clock.times[1:]

    return run


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Medians in ms, and the median and the range of the ratios peer / ours of neighbouring repetitions."""
    ratios = [theirs / mine for mine, theirs in pairs]
    mine, theirs = zip(*pairs, strict=True)
    return {
        "ours_ms": 1e3 * statistics.median(mine),
        "peer_ms": 1e3 * statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def per_token(times: list[float]) -> float:
    """Seconds from one token to the next, after the first."""
    return (times[-1] - times[0]) / (len(times) - 1)


def measure(base: Path, adapters: list[Path], lora: LoraSection, args: argparse.Namespace) -> dict[str, Any]:
    """Loads both sides, lets each warm up, and times them turn by turn."""
    memory: dict[str, float] = {}

    def tracked(name: str, make: Callable[[], Any]) -> Any:
        before = resident()
        forget_peak()
        made = make()
        memory[f"{name}_peak"] = resident(peak=True) - before
        memory[f"{name}_held"] = resident() - before
        return made

    prompt = [5 + (i * 7919) % 900 for i in range(args.prompt)]
    decoder, mine = tracked("ours_load", lambda: ours(base, adapters[0], lora))
    tracked("ours_answer", lambda: mine(prompt, args.tokens))
    theirs = tracked("peer_load", lambda: peer(base, adapters[0]))
    tracked("peer_answer", lambda: theirs(prompt, args.tokens))
    memory["ours_packed_copies"] = decoder.packed_bytes / 2**20
    return turns(decoder, mine, theirs, prompt, args) | {"switch": switching(base, adapters, lora), "memory_mb": memory}


def turns(decoder: Decoder, mine: Run, theirs: Run, prompt: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """First token, each further token, and the first token after a second question of 32 tokens: ours still holds the
    conversation then, `generate` does not."""
    first, further, second = [], [], []
    for i in range(args.repeat):
        sides = [mine, theirs] if i % 2 == 0 else [theirs, mine]
        times = {side: side(prompt, args.tokens) for side in sides}
        first.append((times[mine][0], times[theirs][0]))
        further.append((per_token(times[mine]), per_token(times[theirs])))
        longer = [*decoder.held, *range(5, 37)]
        second.append((timed(decoder, longer, 1)[0], theirs(longer, 1)[0]))
    return {"first_token": summary(first), "per_token": summary(further), "next_turn": summary(second)}


def switching(base: Path, folders: list[Path], lora: LoraSection) -> dict[str, float]:
    """Milliseconds of a switch, and memory per adapter beside the size of its file, in MB."""
    model = load_bare(base)
    adapters = Adapters(model, torch.bfloat16)
    held = []
    for i in range(8):
        before = resident()
        adapters.add(str(i), lora, read_adapter(folders[i % 2])[1], folders[i % 2])
        held.append(resident() - before)
    times = []
    for i in range(40):
        start = time.perf_counter()
        adapters.use(str(i % 8))
        times.append(time.perf_counter() - start)
    size = (folders[0] / WEIGHTS).stat().st_size / 2**20
    return {"ms": 1e3 * statistics.median(times), "mb_each": statistics.mean(held[2:]), "file_mb": size}


def show(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints a table."""
    print(
        f"{args.shape}: prompt {args.prompt}, answer {args.tokens} tokens, {args.repeat} repetitions, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}"
    )
    for name in ("first_token", "per_token", "next_turn"):
        row = found[name]
        print(
            f"{name:12} ours {row['ours_ms']:8.2f} ms  peer {row['peer_ms']:8.2f} ms  "
            f"peer/ours {row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        )
    row = found["switch"]
    print(f"switch       {row['ms']:.2f} ms; {row['mb_each']:.1f} MB for each adapter of {row['file_mb']:.1f} MB")
    print("memory (MB)  " + ", ".join(f"{name} {value:.0f}" for name, value in found["memory_mb"].items()))


def main() -> int:
    """Builds the base and two adapters, measures, prints."""
    parser = argparse.ArgumentParser(description="Decoding beside transformers.generate with PEFT.")
    parser.add_argument("--shape", default="110m", help="one that random_base.py knows")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    lora = LoraSection(r=args.rank, alpha=2 * args.rank)
    with tempfile.TemporaryDirectory() as folder:
        base, adapters = Path(folder) / "base", [Path(folder) / "adapter0", Path(folder) / "adapter1"]
        maker = Path(__file__).with_name("random_base.py")
        subprocess.run([sys.executable, str(maker), args.shape, "--out", str(base)], check=True, capture_output=True)
        model = load_bare(base)
        layers = attach(model, lora, torch.bfloat16, seed=0)
        for seed, adapter in enumerate(adapters):
            write_adapter(adapter, model, layers, lora, base, seed)
        del model, layers
        found = measure(base, adapters, lora, args)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
