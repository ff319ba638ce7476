"""Makes the demo's base: a tiny Llama, its byte-level BPE tokenizer and its chat template.

The trained base ships with the repository in scripts/tiny-base. By default this script verifies its checksum and
copies it to --out. `--rebuild` trains it anew, `--check` trains it anew aside and compares the two, and `--rows`
makes another base from rows of real text.

Invariants: a folder's model.safetensors is written last, so a folder that has it is complete; pad differs from
end-of-turn; the chat template is prefix-stable and closes every turn with the end-of-turn token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import tiny_corpus
import torch
from tiny_pretrain import HEAD_SIZE, Plan, Quality, build_model, measure, pack, pretrain
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

SHIPPED = Path(__file__).resolve().parent / "tiny-base"
WEIGHTS, CHECKSUM = "model.safetensors", "model.safetensors.sha256"
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL = [PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"]
"""In the order of their ids, which tiny_pretrain counts on."""
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('This chat template knows the roles system, user and assistant only.') -}}
  {%- endif -%}
  {{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
PIECES = r"\p{N}| ?\p{Ll}+|\p{Lu}\p{Ll}*|\p{L}+|\n+|\s| ?[^\s\p{L}\p{N}]"
"""A capitalised word leaves the space before it alone, so a name has the same tokens after a space and a quote."""
CHATS = 30_000
WORST_ACCURACY_DROP, WORST_LOSS_RISE = 0.05, 0.10
"""What --check grants another machine."""

Chat = list[tiny_corpus.Message]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def train_core(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE whose merges stay inside PIECES; a digit is always a token of its own."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return core


def build_tokenizer(chats: list[Chat], vocab: int) -> PreTrainedTokenizerFast:
    contents = (message["content"] for chat in chats for message in chat)
    return PreTrainedTokenizerFast(
        tokenizer_object=train_core(contents, vocab),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, chats: list[Chat]) -> list[list[int]]:
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


def build(pretraining: list[Chat], vocabulary: list[Chat], plan: Plan, out: Path) -> None:
    """The tokenizer from the vocabulary chats, the model from the pretraining chats, both to `out`."""
    tokenizer = build_tokenizer(vocabulary, plan.vocab)
    model = build_model(plan, len(tokenizer))
    rows = pack(encode(tokenizer, pretraining), plan.length)
    say(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(rows)} rows of {plan.length}")
    pretrain(model, rows, plan)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    save(model, tokenizer, out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes bf16 weights, tokenizer and checksum. The template also goes where older readers look for it."""
    with tempfile.TemporaryDirectory() as name:
        draft = Path(name)
        model.to(torch.bfloat16).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        settings = json.loads((draft / "tokenizer_config.json").read_text())
        settings["chat_template"] = CHAT_TEMPLATE
        (draft / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (draft / CHECKSUM).write_text(f"{sha256(draft / WEIGHTS)}  {WEIGHTS}\n")
        copy_base(draft, out)


def copy_base(source: Path, out: Path) -> None:
    """Each file appears whole or not at all, the weights last."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: (path.name == WEIGHTS, path.name)):
        draft = out / f"{path.name}.part"
        draft.write_bytes(path.read_bytes())
        draft.replace(out / path.name)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify_shipped() -> None:
    weights, checksum = SHIPPED / WEIGHTS, SHIPPED / CHECKSUM
    if weights.is_file() and checksum.is_file() and checksum.read_text().split()[0] == sha256(weights):
        return
    raise SystemExit(
        f"{weights} is missing or does not match its sha256; restore it with `git checkout -- scripts/tiny-base`."
    )


def is_current(out: Path) -> bool:
    def same(path: Path) -> bool:
        return (out / path.name).is_file() and (out / path.name).read_bytes() == path.read_bytes()

    return all(same(path) for path in SHIPPED.iterdir())


def install_shipped(out: Path) -> None:
    verify_shipped()
    if is_current(out):
        say(f"{out} is current")
        return
    copy_base(SHIPPED, out)
    say(f"copied the shipped base to {out}")


def rebuild(out: Path, plan: Plan) -> None:
    """The demo's base. Its tokenizer also sees instruction rows, so that their fixed words are single tokens."""
    pretraining = list(tiny_corpus.pretraining_chats(plan.seed, CHATS))
    instructions = [row["messages"] for row in tiny_corpus.instruction_rows(plan.seed, 1000)]
    build(pretraining, pretraining[:6000] + instructions, plan, out)
    say(f"built {out}: {describe(quality(out))}")


def quality(folder: Path) -> Quality:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return measure(model, encode(tokenizer, list(tiny_corpus.pretraining_chats(0, 300, held_out=True))))


def describe(found: Quality) -> str:
    return f"held-out answers {found.accuracy:.3f} right, loss {found.loss:.4f}"


def check(plan: Plan) -> None:
    """Fails if a base trained here is clearly worse than the shipped one."""
    verify_shipped()
    shipped = quality(SHIPPED)
    with tempfile.TemporaryDirectory() as name:
        rebuild(Path(name), plan)
        found = quality(Path(name))
    say(f"shipped: {describe(shipped)}\nrebuilt: {describe(found)}")
    accuracy_drop, loss_rise = shipped.accuracy - found.accuracy, found.loss - shipped.loss
    if accuracy_drop > WORST_ACCURACY_DROP or loss_rise > WORST_LOSS_RISE:
        raise SystemExit(
            f"The rebuilt base is worse than the shipped one: accuracy fell by {accuracy_drop:.3f} (at most "
            f"{WORST_ACCURACY_DROP}), loss rose by {loss_rise:.3f} (at most {WORST_LOSS_RISE}). "
            "Did tiny_corpus.py or tiny_pretrain.py change without a new scripts/tiny-base?"
        )


def read_chats(path: Path, fields: list[str]) -> Iterator[Chat]:
    """A row's fields as turns: user, assistant, user and so on."""
    if not path.is_file():
        raise SystemExit(f"{path} is no file; give --rows a JSONL file.")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise SystemExit(f"{path}:{number} is not JSON; --rows takes one JSON object per line.") from None
        missing = [field for field in fields if field not in row]
        if missing:
            raise SystemExit(f"{path}:{number} has no field {missing[0]!r}; name its fields with --fields.")
        yield tiny_corpus.chat(*(str(row[field]) for field in fields))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the demo's base model: copy the shipped one, or train it.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--rebuild", action="store_true", help="train the demo's base anew and write it to --out")
    mode.add_argument("--check", action="store_true", help="train it anew aside and compare it with the shipped one")
    mode.add_argument("--rows", type=Path, help="make another base from this JSONL file")
    parser.add_argument("--fields", default="input,output", help="with --rows: the fields that take turns, user first")
    parser.add_argument("--out", type=Path, default=Path("out/tiny-base"), help="folder to write to")
    for option in ("hidden", "layers", "vocab", "length", "steps", "seed"):
        parser.add_argument(f"--{option}", type=int, help=f"default {getattr(Plan(), option)}")
    return parser.parse_args()


def plan_from(args: argparse.Namespace) -> Plan:
    given = {name: getattr(args, name) for name in ("hidden", "layers", "vocab", "length", "steps", "seed")}
    plan = replace(Plan(), **{name: value for name, value in given.items() if value is not None})
    if plan.hidden < 2 * HEAD_SIZE or plan.hidden % HEAD_SIZE:
        raise SystemExit(f"--hidden {plan.hidden} must be a multiple of {HEAD_SIZE}, and at least {2 * HEAD_SIZE}.")
    if plan.layers < 3:
        raise SystemExit(f"--layers {plan.layers} is too few: the guide of the pretraining needs 3.")
    if plan.vocab < 256 + len(SPECIAL):
        raise SystemExit(f"--vocab {plan.vocab} is too small: bytes and special tokens take {256 + len(SPECIAL)}.")
    return plan


def main() -> int:
    args = parse_arguments()
    plan = plan_from(args)
    disable_progress_bar()
    if args.rows:
        chats = list(read_chats(args.rows, args.fields.split(",")))
        build(chats, chats, replace(plan, prompt_weight=1.0), args.out)
        say(f"built {args.out}")
    elif args.check:
        check(plan)
    elif args.rebuild:
        rebuild(args.out, plan)
    else:
        install_shipped(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
