"""Makes a base of a well-known shape with random weights, shard by shard, to measure without a download.

    python scripts/bench/random_base.py llama2-7b --out out/random-7b
    qlora train llama2-7b-guanaco -s model.base=out/random-7b -s data.train=out/tiny-data/train.jsonl \
        -s data.format=messages -s data.loss_on=assistant -s data.eval_split=null -s eval.every=null -s train.steps=20

Invariant: never more than one shard in memory; model.safetensors.index.json is written last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

TOKENIZER = Path(__file__).resolve().parent.parent / "tiny-base"
SHARD_BYTES = 2 * 10**9
COMMON = {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPES = {
    "tiny": {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 2},
    "30m": {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
    "110m": {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    | {"num_attention_heads": 16, "num_key_value_heads": 8},
    "350m": {"vocab_size": 16000, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 12}
    | {"num_attention_heads": 24, "num_key_value_heads": 8},
    "1b": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    | {"num_attention_heads": 32, "num_key_value_heads": 4},
    "llama2-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32},
    "llama2-13b": {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    | {"num_attention_heads": 40},
    "llama-33b": {"vocab_size": 32000, "hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60}
    | {"num_attention_heads": 52},
    "llama-65b": {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80}
    | {"num_attention_heads": 64},
    "llama2-70b": {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
}


def random_tensors(config: LlamaConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every weight in bfloat16, normal with the model's own initial deviation; norms are one."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for name, meta in skeleton.named_parameters():
        if meta.ndim == 1:
            yield name, torch.ones(meta.shape, dtype=torch.bfloat16)
        else:
            values = torch.empty(meta.shape, dtype=torch.bfloat16)
            yield name, values.normal_(std=config.initializer_range, generator=generator)


def write_shards(tensors: Iterator[tuple[str, Tensor]], out: Path) -> dict[str, str]:
    """Writes shards of about SHARD_BYTES; returns which file holds which weight."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        print(f"wrote {out / name}", file=sys.stderr, flush=True)

    for key, value in tensors:
        shard[key] = value
        if sum(t.numel() * t.element_size() for t in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    return weight_map


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a base of a well-known shape with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists; name a new folder with --out")
    args.out.mkdir(parents=True)
    config = LlamaConfig(**COMMON, **SHAPES[args.shape], architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(args.out)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / file, args.out / file)
    weight_map = write_shards(random_tensors(config, args.seed), args.out)
    (args.out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
