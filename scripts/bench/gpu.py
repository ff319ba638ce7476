"""Training at the shapes of well-known models on a GPU, beside transformers + PEFT: speed, share of the limit, memory.

    python scripts/bench/gpu.py --shape llama2-7b --length 512 --length 2048 --out gpu.json

No download: weights are random, made and quantised layer by layer on the device, never a 16-bit copy of the model.
Each measurement is a process of its own; both sides have the same shape, storage, rank, rows of equal length with a
loss on every token, one row a micro-batch, gradient checkpointing. Memory is `max_memory_allocated`, making the base
included. The limit is that of limit.py, with this device's own bf16 rate. Runs with the Python of the machine: beside
torch and transformers it needs bitsandbytes, and peft for the peer.

Without a GPU nothing is measured (exit code 6); `--shape tiny --device cpu` shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from accelerate import init_empty_weights  # noqa: E402
from limit import Counts, flop_per_token  # noqa: E402
from random_base import COMMON, SHAPES  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from qlora_cli.model import nf4  # noqa: E402
from qlora_cli.model.quantizer import four_bit_skeleton  # noqa: E402
from qlora_cli.recipe.schema import LoraSection, QuantizationSection, TrainSection  # noqa: E402

SECTION = QuantizationSection()
NO_DEVICE = 6

Step = Callable[[], None]


def random_model(shape: str, device: torch.device) -> Any:
    """A Llama of this shape with random weights, its linear layers in NF4 with double quantization."""
    config = LlamaConfig(**(COMMON | SHAPES[shape] | {"max_position_embeddings": 4096}))
    config.dtype = torch.bfloat16
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model, _ = four_bit_skeleton(model, SECTION, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for name, meta in list(model.named_parameters()):
        layer, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        values = torch.ones(meta.shape, dtype=torch.bfloat16, device=device)
        if meta.ndim > 1:
            values.normal_(std=0.02, generator=generator)
        if nf4.is_four_bit(layer):
            packed = nf4.quantize(values, SECTION)
            layer.weight = nf4.as_parameter(packed, {**layer.weight.__dict__, "module": layer})
            layer.quant_state = packed.state
        else:
            setattr(layer, leaf, torch.nn.Parameter(values, requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], buffer.to(device))
    nf4.keep_packed_format(model)
    return model.requires_grad_(False)


def our_step(model: Any, args: argparse.Namespace, device: torch.device) -> Step:
    """One optimizer step of qlora's engine."""
    from qlora_cli.data.batches import join
    from qlora_cli.model.base import set_checkpointing
    from qlora_cli.model.engine import build_engine
    from qlora_cli.model.lora import attach
    from qlora_cli.training.loop import _clip, _update
    from qlora_cli.training.optim import build_optimizer

    set_checkpointing(model, args.checkpointing)
    layers = list(attach(model, LoraSection(r=args.rank), torch.bfloat16, 0).values())
    engine = build_engine(model, layers, compiled=True)
    print(engine.line(packing=True), *engine.notes(packing=True), sep="\n", file=sys.stderr)
    parameters = [p for layer in layers for p in (layer.lora_a, layer.lora_b)]
    optimizer = build_optimizer(parameters, TrainSection(optimizer=args.optimizer), device)
    batch = join([_row(args.length, model.config.vocab_size)], 32).to(device)

    def step() -> None:
        engine.loss(batch.inputs, batch.targets, batch.labels).backward()
        _clip(parameters, args.length, 0.3)
        _update(optimizer, 2e-4)

    return step


def peer_step(model: Any, args: argparse.Namespace, device: torch.device) -> Step:
    """One optimizer step of transformers with PEFT and bitsandbytes, as their documentation sets it up."""
    import bitsandbytes
    from peft import LoraConfig, get_peft_model

    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    config = LoraConfig(r=args.rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    name = {"paged_adamw_8bit": "PagedAdamW8bit", "adamw_8bit": "AdamW8bit"}.get(args.optimizer)
    optimizer = getattr(bitsandbytes.optim, name)(parameters) if name else torch.optim.AdamW(parameters, fused=True)
    ids = torch.from_numpy(_row(args.length, model.config.vocab_size).ids).long()[None].to(device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _row(length: int, vocabulary: int) -> Any:
    import numpy as np

    from qlora_cli.data.encode import Encoded

    ids = np.random.default_rng(0).integers(0, vocabulary, length).astype(np.int32)
    return Encoded(ids, np.ones(length, np.bool_), "")


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def gemm_rate(device: torch.device, hidden: int, intermediate: int, length: int) -> float:
    """FLOP/s of a bfloat16 product of the model's widest layer."""
    x = torch.randn(length, hidden, dtype=torch.bfloat16, device=device)
    weight = torch.randn(intermediate, hidden, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(20):
        _sync(device)
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        _sync(device)
        times.append(time.perf_counter() - started)
    return 2 * length * hidden * intermediate / statistics.median(times[5:])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side in this process."""
    device = torch.device(args.device)
    model = random_model(args.shape, device)
    config, layers = model.config, nf4.four_bit_layers(model).values()
    counts = Counts(
        linear=sum(layer.in_features * layer.out_features for layer in layers),
        head=config.vocab_size * config.hidden_size,
        edges=sum(layer.in_features + layer.out_features for layer in layers),
    )
    step = (our_step if args.side == "ours" else peer_step)(model, args, device)
    times = []
    for _ in range(args.steps + args.skip):
        _sync(device)
        started = time.perf_counter()
        step()
        _sync(device)
        times.append(time.perf_counter() - started)
    pace = args.length / statistics.median(times[args.skip :])
    rate = gemm_rate(device, config.hidden_size, config.intermediate_size, args.length)
    limit = rate / flop_per_token(counts, args.rank, args.checkpointing != "off", 1.0)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    found = {"tokens_per_s": pace, "limit_share": pace / limit, "gemm_flops": rate, "peak_bytes": peak}
    return {"side": args.side, "shape": args.shape, "length": args.length, "optimizer": args.optimizer, **found}


def child(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """`measure` in a process of its own; its error, where it ends with one (out of memory, say)."""
    values = {**{key: getattr(args, key) for key in ("rank", "steps", "skip", "device", "checkpointing")}, **changes}
    command = [sys.executable, __file__, *(part for k, v in values.items() for part in (f"--{k}", str(v)))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {**changes, "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train at well-known shapes on a GPU, beside transformers + PEFT.")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated; default llama2-7b")
    parser.add_argument("--length", action="append", type=int, help="tokens of the row; may be repeated; default 512")
    parser.add_argument("--optimizer", action="append", help="may be repeated; default paged_adamw_8bit")
    parser.add_argument("--side", choices=("ours", "peer"), help="measure one side in this process")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=3, help="first steps that do not count")
    parser.add_argument("--checkpointing", choices=("on", "off", "offload"), default="on")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="write the results there too")
    args = parser.parse_args()
    args.shape, args.length = args.shape or ["llama2-7b"], args.length or [512]
    args.optimizer = args.optimizer or ["paged_adamw_8bit"]
    return args


def main() -> int:
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("not measured: no CUDA device is present", file=sys.stderr)
        return NO_DEVICE
    if args.side:
        args.shape, args.length, args.optimizer = args.shape[-1], args.length[-1], args.optimizer[-1]
        print(json.dumps(measure(args)))
        return 0
    cases = [(s, n, o, side) for s in args.shape for n in args.length for o in args.optimizer for side in SIDES]
    found = []
    for shape, length, optimizer, side in cases:
        found.append(child(args, shape=shape, length=length, optimizer=optimizer, side=side))
        print(json.dumps(found[-1]), flush=True)
    if args.out:
        name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        args.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "results": found}, indent=1) + "\n")
    return 0


SIDES = ("ours", "peer")

if __name__ == "__main__":
    raise SystemExit(main())
