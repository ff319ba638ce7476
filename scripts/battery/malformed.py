"""Malformed recipes, rows, adapters and model folders: each is refused with its exit code, in one error.

Knows the command line and what can be wrong with what it reads: a table of cases, each a fault, a command, the exit
code that docs/runs.md gives it, and what the error must name. Invariant: a case passes only when the command ended with
that code, told one error that names the file (of text the line too) with no traceback, printed no result, and left
every file as it was and none behind.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from battery.common import Failures, draws, result, sha256
from qlora_cli.cli.app import main
from qlora_cli.files import write_manifest
from tests.conftest import RECIPE, chat_rows, save_base, write_jsonl

TITLE = (
    "malformed recipes, rows, adapters, model folders: exit code, one error that names the file, nothing overwritten"
)
SMALL = 20
RECIPE_ERROR, DATA, MODEL, MACHINE, TAKEN = 3, 4, 5, 6, 10
DEEP = "[" * 100_000
WEIGHTS, ADAPTER, CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """What a case may spoil: a recipe with its rows, a base folder, a finished run of that recipe."""

    root: Path

    @property
    def recipe(self) -> Path:
        """Six lines, one section each."""
        return self.root / "mine.yaml"

    @property
    def rows(self) -> Path:
        """24 good rows."""
        return self.root / "rows.jsonl"

    @property
    def base(self) -> Path:
        """A tiny model."""
        return self.root / "my-base"

    @property
    def adapter(self) -> Path:
        """That of the run."""
        return self.root / "my-run" / "adapter"


Spoil = Callable[[Place], Any]


@dataclass(frozen=True)
class Case:
    """A fault, and what must come of it; paths are relative to the place. `begun`: the fault shows after the run has
    begun, so that its directory holds a record that it failed."""

    name: str
    code: int
    command: str
    named: str
    spoil: Spoil
    begun: bool = False


TRAIN = "train mine.yaml -o my-out"
CHAT = "chat my-run -p q --max-new-tokens 2"
EVAL = "eval my-run"
MERGE = "merge my-run -o my-out"
QUANTIZE = "quantize my-base -o my-out"


# What stands in the recipe, what is written in its place, and the line that the error must name.
IN_A_RECIPE: list[tuple[str, str, str, int]] = [
    ("a tab", "log: {every: 1}", "log:\n\tevery: 1", 7),
    ("a brace that is not closed", "alpha: 8}", "alpha: 8", 4),
    ("a quote that is not closed", '"off"', '"off', 5),
    ("a colon without a space", "log: {every: 1}", "log: a: b", 6),
    ("a value that begins with @", "every: 1", "every: @1", 6),
    ("a key twice", "log: {every: 1}", "log: {every: 1}\nlog: {every: 2}", 7),
    ("a key twice in a section", "r: 4,", "r: 4, r: 5,", 3),
    ("an anchor", "r: 4", "r: &a 4", 3),
    ("an alias", "r: 4", "r: *a", 3),
    ("a tag", "r: 4", "r: !!int 4", 3),
    ("a tag that would run code", "r: 4", "r: !!python/object/apply:os.system [ls]", 3),
    ("a merge key", "lora: {r: 4", "lora: {<<: {r: 4}", 3),
    ("a second document", "log: {every: 1}", "---\nlog: {every: 1}", 6),
    ("an unknown section", "log: {every: 1}", "logging: {every: 1}", 6),
    ("a misspelt key", "alpha: 8", "alhpa: 8", 3),
    ("a key of another section", "alpha: 8", "alpha: 8, lr: 1e-3", 3),
    ("a dotted key", "log: {every: 1}", "log.every: 1", 6),
    ("a key that is a number", "every: 1", "5: 1", 6),
    ("a key that is a list", "log: {every: 1}", "[log]: {every: 1}", 6),
    ("text for a number", "r: 4", "r: four", 3),
    ("a quoted number", "r: 4", 'r: "4"', 3),
    ("a fraction for a whole number", "r: 4", "r: 4.5", 3),
    ("a list for a number", "r: 4", "r: [4]", 3),
    ("a mapping for a number", "r: 4", "r: {a: 4}", 3),
    ("null for a number", "r: 4", "r: null", 3),
    ("true for a number", "r: 4", "r: true", 3),
    ("a number below its range", "r: 4", "r: 0", 3),
    ("a number above its range", "r: 4", "r: 4097", 3),
    ("a number of 400 digits", "r: 4", "r: " + "9" * 400, 3),
    ("a number of 5,000 digits", "r: 4", "r: " + "9" * 5000, 3),
    ("a leading zero", "r: 4", "r: 04", 3),
    ("alpha 0", "alpha: 8", "alpha: 0", 3),
    ("a learning rate that is not a number", "lr: 1e-2", "lr: .nan", 5),
    ("a learning rate beyond all numbers", "lr: 1e-2", "lr: 1e999", 5),
    ("a learning rate of 2", "lr: 1e-2", "lr: 2", 5),
    ("an unknown optimizer", "optimizer: adamw", "optimizer: sgd", 5),
    ("true for a word", '"off"', "true", 5),
    ("one of two decay rates", "lr: 1e-2", "betas: [0.9]", 5),
    ("steps and epochs", "steps: 6", "steps: 6, epochs: 1", 5),
    ("neither steps nor epochs", "steps: 6, ", "", 5),
    ("a batch that its parts do not divide", "batch_size: 4", "batch_size: 5", 5),
    ("a section that is null", "log: {every: 1}", "log:", 6),
    ("a section that is a list", "log: {every: 1}", "log: [1]", 6),
    ("a block size that is none", "compute_dtype: float32", "blocksize: 65", 2),
    ("an unknown storage", "compute_dtype: float32", "type: nf5", 2),
    ("yes for true", "compute_dtype: float32", "double_quant: yes", 2),
    ("a share above 1", "eval_split: 4", "eval_split: 1.5", 4),
    ("a template that is none", "eval_split: 4", "template: nothing", 4),
    ("columns that are numbers", "eval_split: 4", "columns: {messages: 5}", 4),
    ("an unknown format of rows", "eval_split: 4", "format: parquet", 4),
    ("an empty name of rows", "max_length: 64", "split: ''", 4),
    ("one checkpoint kept", "log: {every: 1}", "save: {keep_last: 1}", 6),
    ("a parent that does not exist", "log: {every: 1}", "extends: nowhere.yaml", 6),
    ("itself as its parent", "log: {every: 1}", "extends: mine.yaml", 6),
    ("a list of parents", "log: {every: 1}", "extends: [a, b]", 6),
    ("a parent that is a folder", "log: {every: 1}", "extends: my-base", 6),
    ("a control character", "r: 4", "r: 4\x1b", 3),
    ("a NUL", "r: 4", "r: 4\0", 3),
    ("brackets without end", "r: 4", f"r: {DEEP}", 3),
]
# The whole of a recipe, and the line.
WHOLE_RECIPES: list[tuple[str, bytes, str]] = [
    ("an empty recipe", b"", ":1"),
    ("a recipe of comments", b"# nothing\n", ":1"),
    ("a recipe that is a list", b"- model\n", ":1"),
    ("a recipe that is text", b"\n\nmodel\n", ":3"),
    ("a recipe in UTF-16", "model: {base: b}\n".encode("utf-16"), ":1"),
    ("a recipe that is not UTF-8", b"model: {base: b}\n# caf\xe9\n", ":2"),
    ("a recipe of 2 MiB", b"# " + b"a" * (1 << 21), ":1"),
    ("a recipe of zeros", bytes(100), ":1"),
]
# Overrides, and what the error must name.
OVERRIDES: list[tuple[str, str]] = [
    ("train.lr", "train.lr: an override is KEY=VALUE"),
    ("train..lr=1", "train..lr"),
    ("=1", "names joined by dots"),
    ("train.lrr=1", "train.lrr"),
    ("train.lr=5", "train.lr"),
    ("train.lr=", "train.lr"),
    ("lora.r=four", "lora.r"),
    ("train.steps=[1]", "train.steps"),
    ("output={a:1}", "output"),
    ("data.train=*x", "data.train"),
    ("data.train='", "data.train"),
    ("extends=tiny-demo", "extends"),
    ("log=5", "log"),
    ("lora.targets=[q_porj]", "lora.targets"),
    ("lora.targets='['", "lora.targets"),
    ("data.max_length=129", "data.max_length"),
    ("train.batch_size=3", "train.batch_size"),
]


def message(*turns: Any) -> bytes:
    """A row of messages."""
    return json.dumps({"messages": list(turns)}).encode() + b"\n"


GOOD = json.dumps(chat_rows(1)[0]).encode() + b"\n"
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
NO_FILE = b"-"
# A suffix, the bytes of the file behind one good row, and what follows its name in the error. Of a file that is not
# made of lines, or not even of that format, no line is named.
ROWS: list[tuple[str, str, bytes, str]] = [
    ("half an object", ".jsonl", b'{"messages": [\n', ":2"),
    ("an object that is cut off", ".jsonl", GOOD[:-9], ":2"),
    ("no JSON", ".jsonl", b"hello\n", ":2"),
    ("bytes that are no UTF-8", ".jsonl", b'{"messages": "\xff"}\n', ":2"),
    ("a NUL", ".jsonl", b"\0\n", ":2"),
    ("NaN", ".jsonl", b'{"messages": NaN}\n', ":2"),
    ("a number beyond all numbers", ".jsonl", b'{"messages": 1e999}\n', ":2"),
    ("a number of 5,000 digits", ".jsonl", b'{"messages": ' + b"9" * 5000 + b"}\n", ":2"),
    ("half of a character", ".jsonl", b'{"messages": "\\ud800"}\n', ":2"),
    ("a key twice", ".jsonl", b'{"messages": [], "messages": []}\n', ":2"),
    ("brackets without end", ".jsonl", DEEP.encode() + b"\n", ":2"),
    ("a list for a row", ".jsonl", b"[]\n", ":2"),
    ("text for a row", ".jsonl", b'"hello"\n', ":2"),
    ("null for a row", ".jsonl", b"null\n", ":2"),
    ("two rows on a line", ".jsonl", GOOD.strip() + GOOD, ":2"),
    ("an empty object", ".jsonl", b"{}\n", ":2"),
    ("a row of another format", ".jsonl", b'{"text": "a"}\n', ":2"),
    ("messages that are text", ".jsonl", b'{"messages": "hi"}\n', ":2"),
    ("messages that are a number", ".jsonl", b'{"messages": 7}\n', ":2"),
    ("no messages", ".jsonl", message(), ":2"),
    ("a message that is text", ".jsonl", message("hi"), ":2"),
    ("a message without a role", ".jsonl", message({"content": "q"}, ASSISTANT), ":2"),
    ("a message without content", ".jsonl", message({"role": "user"}, ASSISTANT), ":2"),
    ("content that is a number", ".jsonl", message({"role": "user", "content": 7}, ASSISTANT), ":2"),
    ("content that is null", ".jsonl", message(USER, {"role": "assistant", "content": None}), ":2"),
    ("an unknown role", ".jsonl", message({"role": "bot", "content": "q"}, ASSISTANT), ":2"),
    ("a role that is a number", ".jsonl", message({"role": 1, "content": "q"}), ":2"),
    ("no answer", ".jsonl", message(USER), ":2"),
    ("an answer that does not count", ".jsonl", message(USER, {**ASSISTANT, "train": False}), ":2"),
    ("a weight", ".jsonl", message(USER, {**ASSISTANT, "weight": 0}), ":2"),
    ("a picture", ".jsonl", message({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT), ":2"),
    ("tool calls of a user", ".jsonl", message({**USER, "tool_calls": [{}]}, ASSISTANT), ":2"),
    ("UTF-16 under a suffix of text", ".jsonl", "{}\n".encode("utf-16") * 99, ""),
    ("nothing but space", ".jsonl", b" \n\n", ""),
    ("one array", ".jsonl", b"[" + GOOD.strip() + b"]", ""),
    ("an array that is cut off", ".json", b"[" + GOOD.strip() + b", {", ""),
    ("an object that wraps the rows", ".json", b'{"data": [' + GOOD.strip() + b"]}", ""),
    ("a table without a name for a column", ".csv", b"messages,\na,b\n", ""),
    ("a table with a name twice", ".csv", b"messages,messages\na,b\n", ""),
    ("a table with a field too many", ".csv", b"messages,id\na,b,c\n", ":2"),
    ("a table with a quote that is not closed", ".csv", b'messages,id\n"a,b\n', ":2"),
    ("Parquet that is none", ".parquet", b"PAR1 hello PAR1", ""),
    ("Parquet that is cut off", ".parquet", b"PAR1", ""),
    ("Arrow that is none", ".arrow", b"ARROW1 hello", ""),
    ("gzip that is none", ".jsonl.gz", b"hello", ""),
    ("gzip that is cut off", ".jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab", ""),
    ("zstd that is none", ".jsonl.zst", b"hello", ""),
    ("a pickle", ".pkl", b"\x80\x04N.", ""),
    ("an archive", ".zip", b"PK\x03\x04", ""),
    ("a suffix that nobody knows", ".xyz", GOOD, ""),
    ("no file at all", ".jsonl", NO_FILE, ""),
]


def recipes() -> Iterator[Case]:
    """Recipes and overrides."""

    def written(content: bytes) -> Spoil:
        return lambda place: place.recipe.write_bytes(content)

    def replaced(old: str, new: str) -> Spoil:
        return lambda place: place.recipe.write_text(_once(place.recipe.read_text(), old, new), newline="")

    for name, old, new, line in IN_A_RECIPE:
        yield Case(f"recipe: {name}", RECIPE_ERROR, TRAIN, f"mine.yaml:{line}:", replaced(old, new))
    for name, content, at in WHOLE_RECIPES:
        yield Case(f"recipe: {name}", RECIPE_ERROR, TRAIN, f"mine.yaml{at}", written(content))
    for override, named in OVERRIDES:
        yield Case(f"override: {override}", RECIPE_ERROR, f"{TRAIN} -s {override}", named, _nothing)
    for name in ("nowhere.yaml", "base", "n" * 300, "my-base/config.json/mine.yaml"):
        yield Case(f"recipe: {name[:20]}", RECIPE_ERROR, f"train {name} -o my-out", name, _nothing)
    yield Case("recipe: no such file to show data of", RECIPE_ERROR, "data nowhere.yaml", "nowhere", _nothing)


def rows() -> Iterator[Case]:
    """Files of rows."""

    def written(file: str, content: bytes) -> Spoil:
        whole = content.startswith((b"[{", b"\xff")) or not content.strip()  # the fault is that of the file, not a line
        before = b"" if whole or not file.endswith(".jsonl") else GOOD
        return lambda place: None if content == NO_FILE else (place.root / file).write_bytes(before + content)

    for name, suffix, content, line in ROWS:
        file = f"bad{suffix}"
        command = f"{TRAIN} -s data.train={file}"
        yield Case(f"rows: {name}", DATA, command, f"{file}{line}", written(file, content))
    broken = b'{"messages": 1}\n'
    held_out = f"{TRAIN} -s data.eval=bad.jsonl -s data.eval_split=null"
    yield Case("rows: held out", DATA, held_out, "bad.jsonl:2", written("bad.jsonl", broken))
    shown = "data mine.yaml -q -s data.train=bad.jsonl"
    yield Case("rows: to be shown", DATA, shown, "bad.jsonl:2", written("bad.jsonl", broken))
    empty = f"{TRAIN} -s data.train=empty"
    yield Case("rows: an empty folder", DATA, empty, "empty", lambda place: (place.root / "empty").mkdir())
    short = f"{TRAIN} -s data.max_length=4"
    yield Case("rows: none of which fits", DATA, short, "data.max_length", _nothing)


def adapters() -> Iterator[Case]:
    """Folders of adapters: files that are missing, cut, changed, or well listed and yet wrong; and runs."""
    folder = "my-run/adapter"
    for file in (ADAPTER, CONFIG, "recipe.yaml", "origin.json", "tokenizer.json"):
        path, damaged = f"{folder}/{file}", f"{folder} is damaged: {file}"
        gone = damaged if file != CONFIG else path  # which makes the folder an adapter
        yield Case(f"adapter: without {file}", MODEL, CHAT, gone, _without(path))
        yield Case(f"adapter: {file} cut off", MODEL, EVAL, damaged, _cut(path))
        yield Case(f"adapter: a bit of {file} flipped", MODEL, MERGE, damaged, _flip(path))
    for file in (CONFIG, "origin.json", "tokenizer.json", "tokenizer_config.json"):
        for content in ("[]", "{", "7", DEEP):
            yield Case(f"adapter: {file} that says {content[:2]}", MODEL, CHAT, folder, _listed(file, content))
    for content in ("{", DEEP):
        spoil = _written(f"{folder}/manifest.json", content)
        yield Case(
            f"adapter: manifest.json that says {content[:2]}", MODEL, CHAT, f"{folder} is damaged: manifest", spoil
        )
    yield Case(
        "adapter: a recipe of null", RECIPE_ERROR, CHAT, f"{folder}/recipe.yaml:1", _listed("recipe.yaml", "null")
    )
    yield Case("adapter: weights of zeros", MODEL, CHAT, folder, _listed(ADAPTER, "\0" * 64))
    yield Case("adapter: an empty folder", MODEL, CHAT, "my-run", _without(folder))
    yield Case("adapter: no such folder", MODEL, f"{EVAL} --adapter nowhere", "nowhere", _nothing)
    yield Case("adapter: a file", MODEL, f"{EVAL} --adapter rows.jsonl", "rows.jsonl", _nothing)
    other = "chat my-base --adapter my-run -p q"
    yield Case("adapter: on a base that changed", MODEL, other, "my-base", _configured(rope_theta=5.0))
    yield Case("run: that does not exist", MODEL, "show nowhere", "nowhere", _nothing)
    yield Case("run: that is none", MODEL, "show my-base", "my-base", _nothing)


# What config.json says, all of it.
CONFIGS = [None, "", "[]", "{", DEEP, *(f'{{"model_type": {name}}}' for name in ('"unheard-of"', '"t5"', "5"))]
# What is otherwise in it.
CHANGES: list[dict[str, Any]] = [
    {"hidden_size": "x"},
    {"hidden_size": -64},
    {"num_attention_heads": 0},
    {"vocab_size": 200},
    {"quantization_config": {"quant_method": "gptq"}},
    {"quantization_config": 3},
    {"dtype": "float7"},
    {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Model"}},
]
SHARDS: list[Any] = ["../evil.safetensors", "/evil.safetensors", "sub/evil.safetensors", "gone.safetensors", 5]


def models() -> Iterator[Case]:
    """Folders of models."""

    def model(name: str, spoil: Spoil, named: str = "my-base", command: str = TRAIN, begun: bool = False) -> Case:
        return Case(f"model: {name}", MODEL, command, named, spoil, begun)

    weights, index = f"my-base/{WEIGHTS}", f"my-base/{INDEX}"
    yield model("no such folder", _nothing, "./nowhere", f"{TRAIN} -s model.base=./nowhere")
    yield model("only pickles", lambda place: (place.base / WEIGHTS).rename(place.base / "pytorch_model.bin"))
    yield model("without weights", _without(weights))
    for content in CONFIGS:
        spoil = _without("my-base/config.json") if content is None else _written("my-base/config.json", content)
        yield model(f"config.json that says {str(content)[:24]}", spoil)
    for values in CHANGES:
        yield model(f"config.json with {values}", _configured(**values))
    for shard in SHARDS:
        yield model(f"an index that names {shard}", _written(index, json.dumps({"weight_map": {"a": shard}})))
    for content in ("[]", "{", '{"weight_map": []}', DEEP):
        yield model(f"an index that says {content[:20]}", _written(index, content))
    for content in ("", "[]", "{", DEEP):
        yield model(f"tokenizer.json that says {content[:2]}", _written("my-base/tokenizer.json", content))
    template = _written("my-base/chat_template.jinja", "{% if %}")
    yield Case("model: a template that is not Jinja", DATA, TRAIN, "or mend the template in the base's", template)
    for name, make in (("cut off", _cut), ("of zeros", _zeros), ("with a header of 2**60 bytes", _huge)):
        yield model(f"weights {name}", make(weights), WEIGHTS, begun=True)
    yield model("to be quantised, without weights", _without(weights), command=QUANTIZE)
    yield model("to be quantised, cut off", _cut(weights), WEIGHTS, QUANTIZE)
    yield Case("model: on the Hub, offline", MACHINE, f"{TRAIN} -s model.base=owner/model", "owner/model", _nothing)


def taken() -> Iterator[Case]:
    """Output folders that hold something."""
    held = {"train": TRAIN, "merge": MERGE, "quantize": QUANTIZE, "overwriting quantize": f"{QUANTIZE} --overwrite"}
    for name, command in held.items():
        for what, file in (("a folder that is not empty", "my-out/mine"), ("a file", "my-out")):
            yield Case(f"output: {name} into {what}", TAKEN, command, "my-out", _written(file, "mine"))
    yield Case("output: a finished run", TAKEN, "train mine.yaml -o my-run", "my-run", _nothing)


def _nothing(_: Place) -> None:
    """Only the command is wrong."""


def _once(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the recipe"
    return text.replace(old, new)


def _written(name: str, content: str) -> Spoil:
    def spoil(place: Place) -> None:
        (place.root / name).parent.mkdir(exist_ok=True)
        (place.root / name).write_text(content)

    return spoil


def _without(name: str) -> Spoil:
    def spoil(place: Place) -> None:
        path = place.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda place: (place.root / name).write_bytes(change((place.root / name).read_bytes()))


def _cut(name: str) -> Spoil:
    return _bytes(name, lambda content: content[: len(content) // 2])


def _zeros(name: str) -> Spoil:
    return _bytes(name, lambda content: bytes(len(content)))


def _huge(name: str) -> Spoil:
    return _bytes(name, lambda content: (1 << 60).to_bytes(8, "little") + content[8:])


def _flip(name: str) -> Spoil:
    return _bytes(name, lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


def _listed(file: str, content: str) -> Spoil:
    """Another content of a file of the adapter, which its manifest vouches for."""

    def spoil(place: Place) -> None:
        (place.adapter / file).write_text(content)
        write_manifest(place.adapter)

    return spoil


def _configured(**values: Any) -> Spoil:
    def spoil(place: Place) -> None:
        config = json.loads((place.base / "config.json").read_text())
        (place.base / "config.json").write_text(json.dumps(config | values))

    return spoil


def cases() -> list[Case]:
    """All of them."""
    return [*recipes(), *rows(), *adapters(), *models(), *taken()]


def make_world(folder: Path) -> Path:
    """What the cases spoil copies of: see `Place`. Its paths are relative to itself."""
    place = Place(folder)
    folder.mkdir(parents=True)
    save_base(place.base)
    write_jsonl(place.rows, chat_rows(24))
    place.recipe.write_text(RECIPE.format(base="my-base", data="rows.jsonl"), encoding="utf-8")
    with inside(folder):
        code, _, said = called(["train", "mine.yaml", "-o", "my-run", "-q"])
    if code:
        raise RuntimeError(f"the run to be spoilt ended with {code}: {said[-2000:]}")
    return folder


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With `folder` as the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def called(command: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    return code, out.getvalue(), err.getvalue()


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below with the hash of its content."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: sha256(path) if path.is_file() else "a folder" for name, path in files.items()}


def wrong(case: Case, world: Path, root: Path) -> Failures:
    """What a case did that it must not."""
    shutil.copytree(world, root)
    case.spoil(Place(root))
    before = snapshot(root)
    with inside(root):
        code, out, err = called(case.command.split(" "))
    found = told(case, code, out, err)
    found += left(case, before, snapshot(root))
    shutil.rmtree(root)
    return [f"{case.name}: {each}" for each in found]


def told(case: Case, code: int, out: str, err: str) -> Failures:
    """What is wrong with what it said."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    shown = err[-1500:]
    checks = {
        f"exit code {code} instead of {case.code}: {shown}": code == case.code,
        f"{len(errors)} errors: {shown}": len(errors) == 1,
        f"a traceback: {shown}": "Traceback" not in err,
        f"stdout: {out[:200]}": out == "",
        f"{case.named} is not named: {shown}": case.named in err[err.find("error: ") :],
    }
    return [text for text, holds in checks.items() if not holds]


RECORDS = {
    "recipe.yaml",
    "resolved.yaml",
    "lock.json",
    "data_receipt.json",
    "data_rows.jsonl",
    "plan.json",
    "status.json",
}
RECORDS |= {"train.log", "metrics.jsonl", ".lock"}


def left(case: Case, before: dict[str, str], after: dict[str, str]) -> Failures:
    """What was changed, removed or left behind."""
    allowed = {"my-out", *(f"my-out/{name}" for name in RECORDS)} if case.begun else set()
    changed = [name for name, content in before.items() if after.get(name) != content]
    new = sorted(set(after) - set(before) - allowed)
    return [f"{what}: {names[:5]}" for what, names in (("changed or removed", changed), ("left behind", new)) if names]


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """Every case, or some of every kind; see `scripts/reliability`."""
    chosen = cases() if full else sample(cases(), seed)
    world = make_world(work / "world")
    failures = [each for case in chosen for each in wrong(case, world, work / "case")]
    failed = len({text.split(": ", 2)[1] for text in failures})
    return result(len(chosen), f"{len(chosen) - failed} of {len(chosen)} refused as documented", failures)


def sample(every: list[Case], seed: int) -> list[Case]:
    """Some of every kind."""
    noise = draws(seed, "malformed")
    kinds = sorted({case.name.split(":")[0] for case in every})
    each = -(-SMALL // len(kinds))
    of_kind = [[case for case in every if case.name.split(":")[0] == kind] for kind in kinds]
    return [case for group in of_kind for case in noise.sample(group, min(each, len(group)))]
