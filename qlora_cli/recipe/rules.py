"""Pairs of keys that contradict each other, or of which one would have no effect.

Knows a valid `Recipe` only; places and broken values are `check.py`'s. The invariant: a rule is silent when all keys
have their defaults, and names every key it read, the one most likely at fault first.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from qlora_cli.recipe.clash import Clash, Rule
from qlora_cli.recipe.eval_rules import EVAL_RULES
from qlora_cli.recipe.scalars import written
from qlora_cli.recipe.schema import QuantizationSection, Recipe

# The fields of a row, by `data.format`.
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output"),
    "prompt-completion": ("prompt", "completion", "tools"),
    "text": ("text",),
    "oasst": ("prompt",),
    "guanaco": ("text",),
    "self-instruct": ("prompt", "completion"),
    "chip2": ("text",),
    "hh-rlhf": ("chosen",),
    "longform": ("input", "output"),
    "unnatural-instructions": ("instances",),
}


def clashes(recipe: Recipe) -> list[Clash]:
    """Everything in the recipe that contradicts itself."""
    return [clash for rule in RULES for clash in rule(recipe)]


def _length(recipe: Recipe) -> Iterator[Clash]:
    steps, epochs = recipe.train.steps, recipe.train.epochs
    keys = ("train.steps", "train.epochs")
    why = "a run is either so many steps long or so many passes over the rows"
    if steps is None and epochs is None:
        fix = "write `steps: 1000` or `epochs: 1` under `train:`, e.g. --set train.epochs=1"
        yield Clash(keys, "one of train.steps and train.epochs is required (got neither)", why, fix)
    if steps is not None and epochs is not None:
        what = f"only one of train.steps and train.epochs may be set (got {steps} and {written(epochs)})"
        yield Clash(keys, what, why, "set the other to null, e.g. --set train.steps=null")


def _batch(recipe: Recipe) -> Iterator[Clash]:
    whole, micro = recipe.train.batch_size, recipe.train.micro_batch_size
    if whole % micro:
        what = f"must be a multiple of train.micro_batch_size (got {whole} and {micro})"
        keys = ("train.batch_size", "train.micro_batch_size")
        why = "a step is a whole number of passes of micro_batch_size rows each"
        yield Clash(keys, what, why, f"e.g. --set train.batch_size={-(-whole // micro) * micro}")


def _grouping(recipe: Recipe) -> Iterator[Clash]:
    if recipe.train.group_by_length and recipe.train.packing:
        what = "has no use with train.packing (got true and true)"
        why = "packed rows are not padded, so grouping them would only make their order less random"
        fix = "--set train.group_by_length=false, or --set train.packing=false"
        yield Clash(("train.group_by_length", "train.packing"), what, why, fix)


def _no_warmup(recipe: Recipe) -> Iterator[Clash]:
    train = recipe.train
    if train.schedule != "constant":
        return
    for name in ("warmup_steps", "warmup_ratio"):
        if value := getattr(train, name):
            what = f"has no effect with train.schedule constant (got {written(value)})"
            why = "the constant schedule starts at the full rate"
            fix = f"--set train.schedule=constant_with_warmup, or --set train.{name}=0"
            yield Clash((f"train.{name}", "train.schedule"), what, why, fix)


def _needs_warmup(recipe: Recipe) -> Iterator[Clash]:
    train = recipe.train
    if train.schedule == "constant_with_warmup" and not (train.warmup_steps or train.warmup_ratio):
        what = "constant_with_warmup needs a warm-up (got train.warmup_steps 0 and train.warmup_ratio 0)"
        keys = ("train.schedule", "train.warmup_steps", "train.warmup_ratio")
        fix = "e.g. --set train.warmup_ratio=0.03, or --set train.schedule=constant"
        yield Clash(keys, what, "without one it is the constant schedule", fix)


def _two_warmups(recipe: Recipe) -> Iterator[Clash]:
    train = recipe.train
    if train.warmup_steps and train.warmup_ratio:
        what = f"only one warm-up may be set (got warmup_steps {train.warmup_steps}, warmup_ratio {train.warmup_ratio})"
        keys = ("train.warmup_ratio", "train.warmup_steps")
        yield Clash(keys, what, "both say how long the warm-up lasts", "remove one, e.g. --set train.warmup_ratio=0")


def _long_warmup(recipe: Recipe) -> Iterator[Clash]:
    train = recipe.train
    if train.steps is not None and train.warmup_steps >= train.steps:
        what = f"must be below train.steps (got {train.warmup_steps} and {train.steps})"
        why = "the run would end before the full learning rate is reached"
        fix = f"e.g. --set train.warmup_steps={train.steps // 10}"
        yield Clash(("train.warmup_steps", "train.steps"), what, why, fix)


def _full_fine_tuning(recipe: Recipe) -> Iterator[Clash]:
    if recipe.lora is None and recipe.quantization.type != "none":
        what = f"null trains every weight, but quantization.type is {recipe.quantization.type} (got null)"
        why = "4-bit weights are frozen: without an adapter nothing would be trained"
        fix = "keep an adapter (remove `lora: null`), or --set quantization.type=none"
        yield Clash(("lora", "quantization.type"), what, why, fix)


def _idle_quantization(recipe: Recipe) -> Iterator[Clash]:
    if recipe.quantization.type != "none":
        return
    for name in ("storage_dtype", "double_quant", "blocksize"):
        value = getattr(recipe.quantization, name)
        default = QuantizationSection.model_fields[name].default
        if value != default:
            what = f"has no effect with quantization.type none (got {written(value)})"
            fix = f"--set quantization.{name}={written(default)}, the default, or --set quantization.type=nf4"
            yield Clash((f"quantization.{name}", "quantization.type"), what, "nothing is stored in 4 bits", fix)


def _one_source(recipe: Recipe) -> Iterator[Clash]:
    train, sources = recipe.data.train, recipe.data.sources
    keys = ("data.train", "data.sources")
    if train is None and not sources:
        what = "one of data.train and data.sources is required (got neither)"
        fix = "write `train: rows.jsonl` under `data:`, or pass --set data.train=rows.jsonl"
        yield Clash(keys, what, "there is nothing to train on", fix)
    if train is not None and sources:
        what = f"only one of data.train and data.sources may be set (got {train!r} and {len(sources)} sources)"
        fix = "move it into data.sources, or set the other to null: --set data.train=null"
        yield Clash(keys, what, "all training rows are named in one place", fix)


def _idle_mix(recipe: Recipe) -> Iterator[Clash]:
    data = recipe.data
    if data.mix == "interleave" and len(data.named) < 2:
        what = "interleave needs several sources (got one)"
        why = "there is nothing to mix"
        yield Clash(("data.mix", "data.sources"), what, why, "--set data.mix=concat, or name them in data.sources")
    if data.mix == "concat" and data.stop != "first_exhausted":
        what = f"has no effect with data.mix concat (got {data.stop})"
        why = "every epoch has all rows of all sources"
        yield Clash(("data.stop", "data.mix"), what, why, "--set data.mix=interleave, or remove data.stop")


def _idle_cut(recipe: Recipe) -> Iterator[Clash]:
    data = recipe.data
    if data.truncate != "end" and data.too_long != "truncate":
        what = f"has no effect with data.too_long {data.too_long} (got {data.truncate})"
        fix = "--set data.too_long=truncate, or remove data.truncate"
        yield Clash(("data.truncate", "data.too_long"), what, "rows are not cut", fix)
    texts = {source.format or data.format for source in data.named.values()} <= {"text"}
    if data.too_long == "split" and not texts:
        what = "split needs data.format text (got split)"
        why = "a piece of a conversation would be an answer without its question"
        yield Clash(("data.too_long", "data.format"), what, why, "--set data.too_long=truncate")


def _idle_limit(recipe: Recipe) -> Iterator[Clash]:
    if recipe.data.limits.bad is not None and recipe.data.on_bad_row == "error":
        what = f"has no effect with data.on_bad_row error (got {recipe.data.limits.bad})"
        why = "the first bad row ends the run"
        yield Clash(("data.limits.bad", "data.on_bad_row"), what, why, "--set data.on_bad_row=skip")


def _last_of_text(recipe: Recipe) -> Iterator[Clash]:
    if recipe.data.format == "text" and recipe.data.loss_on == "last":
        what = "last needs answers, but data.format is text (got last)"
        why = "a text has no turns; all of it carries loss"
        yield Clash(("data.loss_on", "data.format"), what, why, "--set data.loss_on=all")


def _template_of_text(recipe: Recipe) -> Iterator[Clash]:
    template = recipe.data.template
    if recipe.data.format == "text" and template not in ("auto", "none"):
        what = f"{template} needs turns, but data.format is text (got {template})"
        why = "a text is trained on as it stands"
        yield Clash(("data.template", "data.format"), what, why, "--set data.template=none")


def _columns(recipe: Recipe) -> Iterator[Clash]:
    yield from _unknown_fields("data", recipe.data.format, recipe.data.columns)
    for name, source in recipe.data.sources.items():
        columns = source.columns or {}
        yield from _unknown_fields(f"data.sources.{name}", source.format or recipe.data.format, columns)


def _unknown_fields(section: str, row_format: str, columns: Mapping[str, str]) -> Iterator[Clash]:
    if row_format == "auto" and columns:
        what = "needs a data.format that is named (got auto)"
        fix = "name the format whose fields these are, e.g. --set data.format=prompt-completion"
        yield Clash((f"{section}.columns", f"{section}.format"), what, "columns are mapped to a format's fields", fix)
        return
    known = FIELDS.get(row_format, ())
    for name in columns:
        if name not in known:
            what = f"data.format {row_format} has no field of this name (got {name!r})"
            why = f"its fields are: {', '.join(known)}"
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}? write FIELD: COLUMN" if near else "write FIELD: COLUMN, or set data.format"
            yield Clash((f"{section}.columns.{name}", f"{section}.format"), what, why, fix)


# Key, value, and why the CPU cannot do it; the last is the value to use instead.
_CPU_LACKS = (
    ("train", "gradient_checkpointing", "offload", "activations are in host memory already", "on"),
    ("model", "attention", "flash_attention_2", "FlashAttention runs on CUDA devices only", "auto"),
    ("quantization", "compute_dtype", "float16", "training in float16 on a CPU is not supported", "auto"),
)


def _cpu(recipe: Recipe) -> Iterator[Clash]:
    if recipe.model.device != "cpu":
        return
    for section, name, value, why, instead in _CPU_LACKS:
        if getattr(getattr(recipe, section), name) == value:
            key = f"{section}.{name}"
            what = f"needs a CUDA device, but model.device is cpu (got {value})"
            yield Clash((key, "model.device"), what, why, f"--set {key}={instead}")


def _tracker_twice(recipe: Recipe) -> Iterator[Clash]:
    names = recipe.log.to
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        what = f"names {' and '.join(twice)} more than once (got {written(names)})"
        fix = f"--set log.to={written(tuple(dict.fromkeys(names)))}"
        yield Clash(("log.to",), what, "a tracker shows every figure once", fix)


RULES: tuple[Rule, ...] = (
    _length,
    _batch,
    _grouping,
    _no_warmup,
    _needs_warmup,
    _two_warmups,
    _long_warmup,
    _full_fine_tuning,
    _idle_quantization,
    _one_source,
    _idle_mix,
    _idle_cut,
    _idle_limit,
    *EVAL_RULES,
    _last_of_text,
    _template_of_text,
    _columns,
    _cpu,
    _tracker_twice,
)
