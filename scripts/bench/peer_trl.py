"""The peer of `train_vs_peer.py`: TRL's SFT trainer, or transformers' own, with PEFT and bitsandbytes.

    python scripts/bench/peer_trl.py JOB.json      prints one line of JSON at the end

Knows a base, rows of token ids, and libraries; nothing of `qlora_cli`, so that it can run in an environment without
it. Settings are those that these libraries' documentation recommends for QLoRA. A step's seconds run from its first
micro-batch to the end of the optimizer's step: reading rows and writing logs count as nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Job:
    """What to train. `packed` rows are packed by TRL to `max_length`; a `plain` job uses transformers' trainer."""

    base: str
    rows: str
    adapter: str
    plain: bool
    packed: bool
    micro_batch_size: int
    accumulation: int
    max_length: int
    rank: int
    alpha: int
    optimizer: str
    checkpointing: bool
    lr: float
    max_grad_norm: float
    seed: int
    output: str


class Clock(TrainerCallback):
    """Seconds, tokens, targets and loss of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._started = 0.0
        self._sums = torch.zeros(3, dtype=torch.float64)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before the first micro-batch of a step."""
        self._started = time.perf_counter()
        self._sums.zero_()

    def add(self, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        """One micro-batch. Its loss is already its share of the step's mean."""
        real = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        targets = (inputs["labels"][:, 1:] != -100).sum()
        self._sums += torch.tensor([float(real), float(targets), float(loss)], dtype=torch.float64)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After the optimizer."""
        seconds = time.perf_counter() - self._started
        tokens, targets, loss = self._sums.tolist()
        self.steps.append({"tokens": int(tokens), "targets": int(targets), "loss": loss, "seconds": seconds})


def timed(trainer: type[Trainer], clock: Clock, sequential: bool) -> type[Trainer]:
    """A trainer that reports to `clock`, and takes its rows as they come where `sequential`."""

    class Timed(trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            clock.add(inputs, loss)
            return loss

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            if sequential:
                return SequentialSampler(self.train_dataset)
            return super()._get_train_sampler(*args, **kwargs)

    return Timed


def arguments(job: Job) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": job.output,
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.accumulation,
        "num_train_epochs": 1,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "optim": OPTIMIZERS[job.optimizer],
        "weight_decay": 0.0,
        "max_grad_norm": job.max_grad_norm,
        "gradient_checkpointing": job.checkpointing,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "seed": job.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def load(job: Job) -> Any:
    """The base in 4 bits, as transformers' documentation has it."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.bfloat16, quantization_config=config)


def trl_trainer(job: Job, clock: Clock) -> Trainer:
    """TRL's: packed rows keep TRL's own random order, since a pack holds rows of several of our steps."""
    trl = importlib.import_module("trl")  # here: a plain job needs none
    config = trl.SFTConfig(**arguments(job), packing=job.packed, max_length=job.max_length)
    trainer: Trainer = timed(trl.SFTTrainer, clock, sequential=not job.packed)(
        model=load(job),
        args=config,
        train_dataset=Dataset.from_json(job.rows, cache_dir=job.output),
        processing_class=AutoTokenizer.from_pretrained(job.base),
        peft_config=lora(job),
        callbacks=[clock],
    )
    return trainer


def plain_trainer(job: Job, clock: Clock) -> Trainer:
    """transformers' own, as PEFT's documentation has it; every row has the same length."""
    model = prepare_model_for_kbit_training(load(job), use_gradient_checkpointing=job.checkpointing)
    model.config.use_cache = False
    return timed(Trainer, clock, sequential=True)(
        model=get_peft_model(model, lora(job)),
        args=TrainingArguments(**arguments(job)),
        train_dataset=Dataset.from_json(job.rows, cache_dir=job.output),
        data_collator=default_data_collator,
        callbacks=[clock],
    )


def lora(job: Job) -> LoraConfig:
    """Every linear layer, no dropout."""
    return LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=TARGETS,
    )


def main() -> int:
    started = time.perf_counter()
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    clock = Clock()
    trainer = plain_trainer(job, clock) if job.plain else trl_trainer(job, clock)
    loaded = set_peft_model_state_dict(trainer.model, load_file(job.adapter))
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    ready = time.perf_counter() - started
    trainer.train()
    print(json.dumps({"steps": clock.steps, "load_seconds": ready, "trainable": trainable}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
