"""The recipe: every key, its type, range, default and help text, stated once.

Knows pydantic and nothing of torch. The one invariant: a `Recipe` that exists is valid, frozen and complete, so
that no later part checks a value or supplies a default. Pairs of keys that contradict each other are in `rules.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qlora_cli.recipe.data_schema import DataSection
from qlora_cli.recipe.section import Metric, Name, PositiveInt, Section


class ModelSection(Section):
    """The base model."""

    base: Name = Field(description="Base model: a folder (config.json, *.safetensors, tokenizer) or a Hub id.")
    revision: Name | None = Field(None, description="Branch, tag or commit of a Hub model.")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention implementation; `auto` lets the model choose the best one present."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to compute; `auto` takes a CUDA device when there is one."
    )
    engine: Literal["auto", "plain"] = Field(
        "auto",
        description="How to compute: `auto`, with the fast parts that agree with this model (see docs/engine.md), or "
        "`plain`, with the model's own forward and autograd alone.",
    )
    compile: Literal["auto", "off"] = Field(
        "auto",
        description="Compile parts of the engine; `auto`: on a CPU where there is g++, on a GPU where the run is long "
        "enough to gain by it.",
    )


class QuantizationSection(Section):
    """How the frozen base is stored."""

    type: Literal["nf4", "fp4", "none"] = Field(
        "nf4", description="4-bit NormalFloat, 4-bit float, or `none` for 16-bit LoRA and full fine-tuning."
    )
    double_quant: bool = Field(True, description="Quantise the quantization constants too (4.127 bits per weight).")
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="Weights that share one quantization constant."
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of activations and matrix products; `auto`: bfloat16 where the device has it."
    )
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        "uint8", description="Type of the tensor that holds the packed 4-bit weights; no effect on values."
    )
    skip_modules: tuple[Name, ...] = Field(
        (),
        description="Layers to leave in 16 bits besides head and tied weights: full names or their ends (`down_proj`).",
    )
    cache: bool = Field(
        True,
        description="Keep the quantised base on disk, so that the next start takes seconds (see docs/cache.md); with "
        "`type: none` there is nothing to keep.",
    )


class LoraSection(Section):
    """The adapter."""

    r: Annotated[int, Field(ge=1, le=4096)] = Field(16, description="Rank.")
    alpha: Annotated[float, Field(gt=0)] = Field(32, description="Scaling numerator: the delta is scaled by alpha/r.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapter's input.")
    targets: Literal["all-linear"] | Name | Annotated[tuple[Name, ...], Field(min_length=1)] = Field(
        "all-linear",
        description="`all-linear` (every linear layer of the decoder but the head), a list of layer names "
        "(`q_proj` or a full name), or one regular expression that must match a full name.",
    )
    rslora: bool = Field(False, description="Rank-stabilised scaling, alpha/sqrt(r).")
    bias: Literal["none"] = Field("none", description="Which biases are trained.")
    dtype: Literal["compute", "float32"] = Field(
        "float32",
        description="Type of the stored adapter weights; matrix products run in the compute dtype either way.",
    )


class TrainSection(Section):
    """The training loop."""

    steps: PositiveInt | None = Field(None, description="Optimizer steps. Exactly one of `steps` and `epochs` is set.")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="Passes over the training rows.")
    batch_size: PositiveInt = Field(16, description="Rows per optimizer step, over all devices.")
    micro_batch_size: PositiveInt = Field(
        1,
        description="Rows that pass through the model at once, per device; packed, as many as micro_batch_size x "
        "data.max_length tokens hold.",
    )
    packing: bool = Field(
        True,
        description="Lay the rows of a step end to end, each seeing itself alone, instead of padding them. A step has "
        "the same rows either way.",
    )
    group_by_length: bool = Field(
        False, description="Without packing: batch rows of similar length (less padding, less random order)."
    )
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw"] = Field(
        "paged_adamw_8bit", description="Optimizer; paging needs CUDA, on CPU the same states are kept unpaged."
    )
    lr: Annotated[float, Field(gt=0, le=1)] = Field(2e-4, description="Peak learning rate.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="Adam's two decay rates."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "cosine", description="Learning rate over the steps; `linear` and `cosine` end at 0."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps of linear warm-up.")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Warm-up as a share of all steps.")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        0.3, description="Clip the gradient's norm to this; null: never."
    )
    gradient_checkpointing: Literal["auto", "on", "off", "offload"] = Field(
        "auto",
        description="Recompute activations in the backward pass: less memory, a third more work, the same values. "
        "`auto`: only where the run would else need more than half of the free memory; `offload` also keeps what is "
        "left of them in host memory.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of every random draw.")
    deterministic: bool = Field(
        False, description="Ask torch for deterministic kernels alone, some slower; on a CPU every run is so anyway."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="What a loss or gradient that is not finite does before it touches a weight: end the run, or pass "
        "over the step.",
    )
    nonfinite_budget: PositiveInt = Field(3, description="Steps that `on_nonfinite: skip` may pass over in a run.")


class EvalSection(Section):
    """Evaluation on the held-out rows during training."""

    every: PositiveInt | None = Field(None, description="Steps between evaluations; null: once, at the end.")
    batch_size: PositiveInt = Field(4, description="Rows per forward pass.")
    keep_best: bool = Field(False, description="Keep the adapter with the lowest held-out loss instead of the last.")
    patience: PositiveInt | None = Field(
        None, description="Stop early after this many evaluations without a lower held-out loss."
    )
    metrics: tuple[Metric, ...] = Field(
        (),
        description="What greedy answers to held-out prompts are measured by: `exact`, `contains` (the wanted text), "
        "`json` (one JSON value) or `regex:PATTERN` (found anywhere).",
    )
    metric_rows: PositiveInt | None = Field(
        100, description="Held-out rows that are answered for `metrics`, the first ones; null: all."
    )
    samples: tuple[Name, ...] = Field(
        (), description="Prompts that are answered at every evaluation, greedily, into samples.jsonl."
    )
    max_new_tokens: PositiveInt = Field(256, description="Longest answer for `metrics` and `samples`, in tokens.")
    choices: Name | None = Field(
        None,
        description="A .json or .jsonl file of multiple-choice rows to measure at every evaluation (docs/eval.md).",
    )


class SaveSection(Section):
    """Checkpoints."""

    every: PositiveInt | None = Field(None, description="Steps between checkpoints; null: `minutes` alone decides.")
    minutes: Annotated[float, Field(gt=0)] | None = Field(
        10,
        description="Minutes between checkpoints. With `every` or `minutes` the last step is saved too; with neither "
        "only a signal saves one.",
    )
    keep_last: Annotated[int, Field(ge=2)] = Field(2, description="Checkpoints kept.")


class LogSection(Section):
    """The log."""

    every: PositiveInt = Field(10, description="Steps between lines of metrics.jsonl and of a plain console.")
    to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (),
        description="Experiment trackers that show what metrics.jsonl holds as well; each is an extra of its name "
        "(`pip install 'qlora-cli[tensorboard]'`), see docs/runs.md.",
    )


class Recipe(Section):
    """A fine-tuning run."""

    model: ModelSection = Field(description="The base model.")
    quantization: QuantizationSection = Field(
        default_factory=QuantizationSection, description="How the frozen base is stored."
    )
    lora: LoraSection | None = Field(
        default_factory=LoraSection, description="The adapter; null: full fine-tuning of every weight."
    )
    data: DataSection = Field(default_factory=DataSection, description="Rows, and what of them carries loss.")
    train: TrainSection = Field(default_factory=TrainSection, description="The training loop.")
    eval: EvalSection = Field(default_factory=EvalSection, description="Evaluation during training.")
    save: SaveSection = Field(default_factory=SaveSection, description="Checkpoints.")
    log: LogSection = Field(default_factory=LogSection, description="The log.")
    output: Name | None = Field(
        None, description="Run directory; default out/RECIPE-NAME; `-o` wins over both. Not inherited by `extends`."
    )
