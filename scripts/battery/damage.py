"""Files of every kind that is read back lose their end, or have one bit flipped, and are read by the program itself.

Each case copies something good, damages one of its files, and calls the reader that commands call. It passes when that
names the damaged file in its error; for a cache, in its warning, and what was made again equals what was there before.
Files of which no hash is known are damaged only where that can show: a base's shards by being cut or in what their
headers say of tensors, its index in the names of tensors and shards. Invariant: a case depends on the seed and its
number alone.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import torch

from battery import common
from qlora_cli.cache.entries import Cache
from qlora_cli.data.dataset import Setting, load_data
from qlora_cli.data.sources import open_source
from qlora_cli.errors import Problem, QloraError
from qlora_cli.files import MANIFEST, sha256, write_json, write_manifest
from qlora_cli.model.adapter import read_adapter
from qlora_cli.model.base import load_base, load_config
from qlora_cli.model.folder import INDEX, find_base
from qlora_cli.model.trained import TrainedAdapter
from qlora_cli.recipe.data_schema import DataSection
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import LoraSection, ModelSection, QuantizationSection
from qlora_cli.recipe.snapshot import resolved_yaml
from qlora_cli.training.checkpoint import Checkpoints, State, checkpoints
from qlora_cli.training.state import optimizer_tensors, random_tensors
from qlora_cli.workflows.locate import adapter_folder, check_base
from qlora_cli.workflows.quiet import quiet_libraries
from tests.conftest import make_llama, make_tokenizer, save_base, write_jsonl

TITLE = "bit flips and truncations over all file kinds"
FULL, SMALL = 300, 33
METADATA = b'"__metadata__":{'
WEIGHTS, REVISION, STEP = "model.safetensors", "0" * 40, "step-000001"
PACKED = ("rows.jsonl.gz", "rows.jsonl.zst")


@dataclass(frozen=True)
class Kind:
    """Files of one kind in a good folder; what reads a copy of it, and returns what it said, empty for nothing; and
    what a message calls a file that has another name there."""

    name: str
    folder: Path
    files: Sequence[str]
    read: Callable[[Path], str]
    called: str = ""


@dataclass(frozen=True)
class Case:
    """A file of a kind, damaged in one way: cut to `length` bytes, or with a bit flipped (in which byte, which one)."""

    kind: Kind
    file: str
    length: int
    flipped: tuple[int, int] | None

    def __str__(self) -> str:
        how = f"cut to {self.length} bytes" if self.flipped is None else f"byte and bit {self.flipped} flipped"
        return f"{self.kind.name}: {self.file} {how}"

    def damage(self, path: Path) -> None:
        """Does it to a copy."""
        content = bytearray(path.read_bytes())
        if self.flipped is None:
            content = content[: self.length]
        else:
            content[self.flipped[0]] ^= 1 << self.flipped[1]
        path.write_bytes(content)


def run(full: bool, work: Path, seed: int) -> dict[str, Any]:
    """`FULL` cases, or `SMALL` ones, shared evenly between the kinds, and within each between its files."""
    quiet_libraries()
    every, rng, failures, tally = kinds(work), common.draws(seed, "damage"), list[str](), Counter[str]()
    for number in range(FULL if full else SMALL):
        kind, turn = every[number % len(every)], number // len(every)
        case = draw(kind, kind.files[turn % len(kind.files)], rng)
        outcome, said = judge(case, work / f"case-{number}")
        tally[outcome] += 1
        if outcome != "named":
            failures.append(f"{case}: {outcome}: {said[-600:]}")
    detected = tally["named"] + tally["not named"]
    figure = f"{tally.total()} damaged files of {len(every)} kinds: {detected} detected, {tally['named']} named"
    return common.result(tally.total(), figure, failures, detected=detected, named=tally["named"])


def draw(kind: Kind, file: str, rng: random.Random) -> Case:
    """A random way to damage a file."""
    spots, length = places(kind, file, (kind.folder / file).read_bytes())
    flips = bool(spots) and rng.random() < 0.5
    return Case(kind, file, rng.randrange(length), (rng.choice(spots), rng.randrange(8)) if flips else None)


def places(kind: Kind, file: str, content: bytes) -> tuple[Sequence[int], int]:
    """(bytes of which a flipped bit changes what is read, and shows; length from which on nothing is missing)."""
    if kind.name == "packed rows":  # gzip's header holds a time; zstd as pyarrow writes it has no checksum
        return (range(10, len(content)) if file.endswith(".gz") else ()), len(content)
    if kind.name not in {"base", "base in shards"}:
        return range(len(content)), len(content)
    if file == INDEX:
        return range(content.index(b'"weight_map"'), len(content)), len(content.rstrip())
    header, comment = 8 + int.from_bytes(content[:8], "little"), content.index(METADATA) + len(METADATA)
    return [*range(comment), *range(content.index(b"}", comment), header)], len(content)


def judge(case: Case, place: Path) -> tuple[str, str]:
    """(`named`, `not named`, `not detected` or `crashed`; what the reader said)."""
    shutil.copytree(case.kind.folder, place, symlinks=True)
    case.damage(place / case.file)
    names = called(case, place / case.file)
    try:
        said = case.kind.read(place)
    except QloraError as error:
        said = str(error)
    except Exception:  # the other cases are still to be tried
        return "crashed", traceback.format_exc()
    finally:
        shutil.rmtree(place)
    if not said:
        return "not detected", ""
    return ("named" if any(name in said for name in names) else "not named"), said


def called(case: Case, damaged: Path) -> set[str]:
    """How a message may call the file. A manifest that can still be read disagrees with one file, and nobody can tell
    which of the two it was: then that file's name counts too."""
    names = {case.kind.called or damaged.name}
    if damaged.name == MANIFEST:
        with suppress(ValueError):
            was, now = (json.loads(path.read_bytes()) for path in (case.kind.folder / case.file, damaged))
            names |= {name for name in was.keys() | now.keys() if was.get(name) != now.get(name)}
    return names


def load(folder: Path, cache: Cache | None = None) -> Any:
    """A base, as every command loads it."""
    section, device = QuantizationSection(compute_dtype="float32"), torch.device("cpu")
    return load_base(
        find_base(str(folder), None), ModelSection(base=str(folder)), section, torch.float32, device, cache
    )


def silent(read: Callable[[Path], object], folder: Path) -> str:
    """For readers that raise."""
    read(folder)
    return ""


def check_for(adapter: Path, folder: Path) -> None:
    """A base that is to carry an adapter which was trained on it."""
    base = find_base(str(folder), None)
    load_config(base)
    check_base(base, adapter, lambda event: None, allow_changed=False)


def problem_of(folder: Path) -> str:
    """Of the checkpoint there."""
    (found,) = checkpoints(folder)
    return found.problem


def problems_of_rows(folder: Path) -> str:
    """What is wrong with rows that are packed in one way or the other."""
    read = (row for name in PACKED for row in open_source(str(folder / name)).rows())
    return "\n".join(str(row) for row in read if isinstance(row, Problem))


def warnings_of(kind: str, use: Callable[[Cache], object], sealed: str, folder: Path) -> str:
    """What a cache warns of; `AssertionError` unless it ends with what it held, by the hash of its manifest."""
    warned: list[str] = []
    cache = Cache(folder, 10**9, lambda text: None, warned.append, kind=kind)
    use(cache)
    (entry,) = cache.entries()
    assert sha256(entry / MANIFEST) == sealed, "what was made again differs"
    return "\n".join(warned)


def kinds(work: Path) -> list[Kind]:
    """Something good of every kind, made in `work`."""
    base, tokenizer = save_base(work / "base"), make_tokenizer()
    rows = write_jsonl(work / "rows.jsonl", common.rows(20))
    adapter, step = trained(work, base, rows)
    section = DataSection(train=str(rows), template="tokenizer")
    read_trained = partial(silent, lambda folder: read_adapter(adapter_folder(folder)))
    return [
        Kind("adapter", adapter, ["adapter_model.safetensors", "adapter_config.json"], read_trained),
        Kind("beside an adapter", adapter, ["recipe.yaml", "origin.json", "tokenizer.json"], read_trained),
        Kind("checkpoint", step.parent, names_in(step), problem_of),
        cached("bases", work, lambda cache: load(base, cache)),
        cached("rows", work, lambda cache: load_data(section, Setting(tokenizer, cache=cache))),
        Kind("base", base, [WEIGHTS], partial(silent, load)),
        in_shards(work / "shards"),
        hub_copy(base, work / "models--owner--tiny"),
        Kind("base of an adapter", base, [WEIGHTS, "config.json"], partial(silent, partial(check_for, adapter))),
        written_by_us(base, work / "written"),
        packed(rows, work / "packed"),
    ]


def names_in(folder: Path) -> list[str]:
    """Files that are not empty, by their names from the folder above."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    return [file.relative_to(folder.parent).as_posix() for file in files]


def trained(work: Path, base: Path, rows: Path) -> tuple[Path, Path]:
    """An adapter and a checkpoint of it, after one step of an optimizer on made-up gradients."""
    tiny, lora = common.Tiny(base, rows), LoraSection(r=4, alpha=8)
    values = TrainedAdapter(load(base), lora, str(base), torch.float32, seed=0)
    optimizer = torch.optim.AdamW(values.named().values(), lr=0.1)
    for parameter in values.named().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    recipe = resolved_yaml(load_recipe(tiny.recipe(work / "recipe.yaml")))

    def beside(folder: Path) -> None:
        make_tokenizer().save_pretrained(folder)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        write_json(folder / "origin.json", {"base": find_base(str(base), None).fingerprint})

    values.save(work / "adapter", beside)
    state = State({"tokens": 7}, optimizer_tensors(optimizer, values.named()), random_tensors())
    return work / "adapter", Checkpoints(work / "checkpoints", 2).save(1, values, beside, state)


def cached(kind: str, work: Path, use: Callable[[Cache], object]) -> Kind:
    """The only entry of a cache."""
    cache = Cache(work / f"cache-{kind}", 10**9, lambda text: None, lambda text: None, kind=kind)
    use(cache)
    (entry,) = cache.entries()
    files = [f"{kind}/{name}" for name in names_in(entry)]
    return Kind(f"cache of {kind}", cache.folder, files, partial(warnings_of, kind, use, sha256(entry / MANIFEST)))


def in_shards(folder: Path) -> Kind:
    """A base in several files, with an index."""
    save_base(folder)
    (folder / WEIGHTS).unlink()
    make_llama().save_pretrained(folder, max_shard_size="100KB")
    files = [INDEX, *sorted(file.name for file in folder.glob("*.safetensors"))]
    assert len(files) > 2, files
    return Kind("base in shards", folder, files, partial(silent, load))


def hub_copy(base: Path, repository: Path) -> Kind:
    """A base as the Hub's cache keeps it: links to files that are called by their hashes."""
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in base.iterdir():
        digest = sha256(file) if file.name == WEIGHTS else sha256(file)[:40]  # small files have git's hashes there
        shutil.copyfile(file, blobs / digest)
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / digest, snapshot))
    read = partial(silent, lambda place: load(place / "snapshots" / REVISION))
    return Kind("base in the Hub's cache", repository, [f"blobs/{sha256(base / WEIGHTS)}"], read, WEIGHTS)


def written_by_us(base: Path, folder: Path) -> Kind:
    """A model with a manifest, as `merge` and `quantize` write it."""
    shutil.copytree(base, folder)
    write_manifest(folder)
    read = partial(silent, lambda place: find_base(str(place), None))
    return Kind("model with a manifest", folder, [WEIGHTS, "config.json", "tokenizer.json"], read)


def packed(rows: Path, folder: Path) -> Kind:
    """Rows in both ways of packing."""
    folder.mkdir()
    (folder / PACKED[0]).write_bytes(gzip.compress(rows.read_bytes(), mtime=0))
    with pyarrow.CompressedOutputStream(str(folder / PACKED[1]), "zstd") as file:
        file.write(rows.read_bytes())
    return Kind("packed rows", folder, PACKED, problems_of_rows)
