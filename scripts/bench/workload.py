"""What the training benchmarks train on: a random base, chat rows, and the same as token ids for a peer.

    python scripts/bench/workload.py FOLDER      FOLDER/spec.json says what; everything else there is written

Knows `qlora_cli`; nothing of the peer. Invariant: the rows in tokens.jsonl are those of `qlora train recipe.yaml` in
the order in which it draws them, so that who trains on them from the first to the last trains on the same.

The text is invented: words of syllables whose frequency falls with their rank (Zipf), in sentences. The tokenizer is
trained on such text, so that it has the base's vocabulary and a realistic number of characters per token.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

MEDIAN, LOW, HIGH = 1216, 304, 2776
"""Characters of a row: the median, and what a tenth of the rows stays under, and a tenth exceeds."""
DECILE = statistics.NormalDist().inv_cdf(0.9)
WORDS, FLAT = 60_000, 500
"""Words, and how flat their frequencies are, 1 / (rank + FLAT): about 4.3 characters per token, as English has."""
SENTENCES = 2.5
"""Of the tokenizer's training text, per token of its vocabulary."""


@dataclass(frozen=True)
class Spec:
    """One workload. `full`: every row has exactly `max_length` tokens, all of them supervised; else chat rows whose
    answer is supervised. `shape` is one of `random_base.py`, `changes` what its configuration has otherwise;
    `overrides` are KEY=VALUE for our recipe."""

    shape: str
    full: bool
    steps: int
    batch_size: int
    micro_batch_size: int
    max_length: int
    rank: int
    optimizer: str
    checkpointing: str
    lr: float = 2e-4
    max_grad_norm: float = 0.3
    seed: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    @property
    def alpha(self) -> int:
        """Twice the rank."""
        return 2 * self.rank


def row_lengths(count: int, rng: random.Random) -> list[int]:
    """Characters of `count` rows: log-normal below and above the median, each side with the deviation that its tenth
    asks for. Taken at even quantiles and shuffled, so that few rows have the distribution of many."""
    below, above = math.log(MEDIAN / LOW) / DECILE, math.log(HIGH / MEDIAN) / DECILE
    scores = [statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    lengths = [max(40, round(MEDIAN * math.exp(z * (below if z < 0 else above)))) for z in scores]
    rng.shuffle(lengths)
    return lengths


class Writer:
    """An endless source of text."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        syllables = [c + v + e for c in "bcdfghlmnprstvw" for v in "aeiou" for e in ("", "n", "r", "s", "t", "l")]
        lengths = rng.choices((1, 2, 3, 4), (20, 45, 25, 10), k=WORDS)
        self._words = ["".join(rng.choices(syllables, k=length)) for length in lengths]
        self._weights = list(accumulate(1 / (rank + FLAT) for rank in range(WORDS)))

    def sentence(self) -> str:
        """A few words, a capital, a full stop."""
        words = self._rng.choices(self._words, cum_weights=self._weights, k=self._rng.randint(5, 20))
        if len(words) > 10:
            words[5] += ","
        return " ".join(words).capitalize() + self._rng.choice((".", ".", ".", "?"))

    def text(self, characters: int) -> str:
        """Exactly so many characters."""
        parts, length = [], 0
        while length < characters:
            parts.append(self.sentence())
            length += len(parts[-1]) + 1
        return " ".join(parts)[:characters].rstrip().ljust(characters, ".")


def rows(spec: Spec, writer: Writer, rng: random.Random) -> Iterator[dict[str, Any]]:
    """As many rows as the steps draw, in the format of the recipe."""
    count = spec.steps * spec.batch_size
    if spec.full:
        yield from ({"text": writer.text(8 * spec.max_length)} for _ in range(count))
        return
    for length in row_lengths(count, rng):
        asked = round(length * rng.uniform(0.25, 0.4))
        turns = (("user", writer.text(asked)), ("assistant", writer.text(length - asked)))
        yield {"messages": [{"role": role, "content": text} for role, text in turns]}


def write_base(spec: Spec, folder: Path, writer: Writer) -> None:
    """The random base with a tokenizer of its vocabulary."""
    from random_base import COMMON, SHAPES, TOKENIZER, random_tensors, write_shards
    from transformers import AutoTokenizer, LlamaConfig

    if spec.shape not in SHAPES:
        raise SystemExit(f"no shape is called {spec.shape!r}; there are {', '.join(SHAPES)}")
    folder.mkdir()
    values = COMMON | SHAPES[spec.shape] | spec.changes
    values["max_position_embeddings"] = max(4096, spec.max_length)
    config = LlamaConfig(**values, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    vocabulary = min(config.vocab_size, 16_000)
    corpus = [writer.sentence() for _ in range(round(SENTENCES * vocabulary))]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer = tokenizer.train_new_from_iterator(corpus, vocabulary, show_progress=False)
    tokenizer.model_max_length = values["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    weight_map = write_shards(random_tensors(config, spec.seed), folder)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def recipe(spec: Spec, folder: Path) -> dict[str, Any]:
    """What `qlora train` is told, as a tree."""
    data: dict[str, Any] = {"train": str(folder / "rows.jsonl"), "max_length": spec.max_length, "too_long": "truncate"}
    data |= {"format": "text", "loss_on": "all"} if spec.full else {"format": "messages", "loss_on": "assistant"}
    train: dict[str, Any] = {
        "steps": spec.steps,
        "batch_size": spec.batch_size,
        "micro_batch_size": spec.micro_batch_size,
    }
    train |= {"optimizer": spec.optimizer, "lr": spec.lr, "schedule": "constant", "max_grad_norm": spec.max_grad_norm}
    return {
        "model": {"base": str(folder / "base"), "device": "cpu"},
        "quantization": {"compute_dtype": "bfloat16", "cache": False},  # a peer has none
        "lora": {"r": spec.rank, "alpha": spec.alpha},
        "data": data,
        "train": train | {"gradient_checkpointing": spec.checkpointing, "seed": spec.seed},
        "log": {"every": 1},
    }


def prepare(folder: Path) -> None:
    """Writes base, rows.jsonl, recipe.yaml, tokens.jsonl, adapter.safetensors, and facts.json last."""
    values = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    spec = Spec(**{**values, "overrides": tuple(values["overrides"])})
    rng = random.Random(spec.seed)
    writer = Writer(rng)
    write_base(spec, folder / "base", writer)
    written = list(rows(spec, writer, rng))
    text = "".join(json.dumps(row) + "\n" for row in written)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(json.dumps(recipe(spec, folder), indent=1), encoding="utf-8")
    facts = describe(written) | tokenise(spec, folder) | write_adapter(spec, folder)
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def describe(written: list[dict[str, Any]]) -> dict[str, Any]:
    """Characters of the rows, without template."""
    sizes = [len(r["text"]) if "text" in r else sum(len(m["content"]) for m in r["messages"]) for r in written]
    return {"rows": len(sizes), "characters": sum(sizes), "characters_deciles": deciles(sizes)}


def deciles(sizes: list[int]) -> list[float]:
    """The lowest tenth, the median, the highest tenth."""
    found = statistics.quantiles(sizes, n=10, method="inclusive")
    return [found[0], found[4], found[8]]


def tokenise(spec: Spec, folder: Path) -> dict[str, Any]:
    """tokens.jsonl: per row its ids and labels, in the order of our steps; returns counts per step."""
    from transformers import AutoTokenizer

    from qlora_cli.data.dataset import Setting, load_data
    from qlora_cli.recipe.load import load_recipe
    from qlora_cli.workflows.plan import order_of

    loaded = load_recipe(str(folder / "recipe.yaml"), list(spec.overrides)).recipe
    data = load_data(loaded.data, Setting(AutoTokenizer.from_pretrained(folder / "base")))
    order, total = order_of(loaded, data), spec.steps * spec.batch_size
    steps = [[data.train[i] for i in order.step_rows(step, total)] for step in range(spec.steps)]
    with (folder / "tokens.jsonl").open("w", encoding="utf-8") as file:
        for row in (row for step in steps for row in step):
            ids = row.ids.tolist()
            labels = [token if on else -100 for token, on in zip(ids, row.loss.tolist(), strict=True)]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    tokens = [sum(map(len, step)) for step in steps]
    targets = [sum(row.targets for row in step) for step in steps]
    lengths = [len(row) for step in steps for row in step]
    whole = {"tokens": sum(tokens), "targets": sum(targets), "tokens_deciles": deciles(lengths)}
    return whole | {"step_tokens": tokens, "step_targets": targets}


def write_adapter(spec: Spec, folder: Path) -> dict[str, Any]:
    """The adapter that our run starts from, in PEFT's layout; returns the model's counts for the limit."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from qlora_cli.model.adapter import adapter_tensors
    from qlora_cli.model.lora import attach, linear_layers, linear_shape
    from qlora_cli.recipe.schema import LoraSection

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    shapes = [linear_shape(layer) for layer in linear_layers(model).values()]
    head = model.get_output_embeddings().weight.numel()
    layers = attach(model, LoraSection(r=spec.rank, alpha=spec.alpha), torch.float32, spec.seed)
    save_file(adapter_tensors(layers), folder / "adapter.safetensors", metadata={"format": "pt"})
    linear, edges = sum(a * b for a, b in shapes), sum(a + b for a, b in shapes)
    return {"counts": {"linear": linear, "head": head, "edges": edges}}


def write_spec(folder: Path, spec: Spec) -> None:
    """Makes the folder that `prepare` fills."""
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps(asdict(spec)), encoding="utf-8")


def make(folder: Path, spec: Spec) -> dict[str, Any]:
    """Prepares a folder in a process of its own (see `child`); returns its facts."""
    import child

    write_spec(folder, spec)
    child.run([sys.executable, __file__, folder], folder / "prepare.log")
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return facts


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).resolve())
