"""Damaged and hostile files: what is read back is verified, named where it differs, and leads nowhere else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import damage
from safetensors.torch import load_file, save_file

from qlora_cli.errors import ModelError
from qlora_cli.model.adapter import CONFIG, WEIGHTS, read_adapter
from qlora_cli.model.base import load_config, load_tokenizer
from qlora_cli.model.folder import INDEX, BaseFolder, find_base
from qlora_cli.workflows.locate import adapter_folder

Change = Callable[[Path], object]
SHARD = "model.safetensors"


@pytest.fixture
def own(base: Path, tmp_path: Path) -> Path:
    """A copy of the base, to be changed."""
    return Path(shutil.copytree(base, tmp_path / "own"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def refusal(read: Callable[[Path], object], folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read(folder)
    return str(caught.value)


def find(folder: Path) -> BaseFolder:
    return find_base(str(folder), None)


def test_damage_of_every_kind_of_file_is_detected_and_the_file_named(tmp_path: Path) -> None:
    found = damage.run(False, tmp_path, seed=3)
    assert found["failures"] == []
    assert found["count"] == found["detected"] == found["named"] == damage.SMALL
    assert found["passed"]


def test_a_reader_that_notices_nothing_fails_the_check(own: Path, tmp_path: Path) -> None:
    blind = damage.Kind("blind", own, [SHARD], lambda folder: "")
    vague = damage.Kind("vague", own, [SHARD], lambda folder: "something is wrong")
    broken = damage.Kind("broken", own, [SHARD], lambda folder: str(1 / 0))
    outcomes = [
        damage.judge(damage.Case(kind, SHARD, 9, None), tmp_path / "case")[0] for kind in (blind, vague, broken)
    ]
    assert outcomes == ["not detected", "not named", "crashed"]


def index_of(*names: object) -> Change:
    return lambda folder: (folder / INDEX).write_text(
        json.dumps({"weight_map": {f"t{i}": n for i, n in enumerate(names)}})
    )


def index_text(text: str) -> Change:
    return lambda folder: (folder / INDEX).write_text(text)


def link(name: str, target: str) -> Change:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def config(**values: Any) -> Change:
    return lambda folder: edit(folder / "config.json", **values)


HOSTILE: dict[str, tuple[Change, str]] = {
    "index names a pickle": (index_of("pytorch_model.bin"), "names a file that is no *.safetensors: pytorch_model.bin"),
    "index names the folder above": (index_of(".."), "no *.safetensors: .."),
    "index names nothing": (index_of(""), "no *.safetensors"),
    "index names a name too long": (index_of("x" * 300 + ".safetensors"), "1 weight files are missing: xxx"),
    "index names a NUL": (index_of("a\0.safetensors"), "1 weight files are missing"),
    "index says a tensor twice": (
        index_text('{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}'),
        f"{INDEX}: cannot be read as JSON: the key a comes twice",
    ),
    "shard is a link": (link(SHARD, "/nowhere/x"), f"{SHARD} is a link that leads out of its folder: /nowhere/x"),
    "shard is a relative link": (link("other.safetensors", "../rows.jsonl"), "other.safetensors is a link"),
    "text is a link": (link("notes.txt", "/nowhere/x"), "notes.txt is a link that leads out of its folder"),
    "link leads to nothing": (link("a.json", "../other/a.json"), "a.json is a link that leads out of its folder"),
    "config names weights elsewhere": (config(transformers_weights="../x.safetensors"), "transformers_weights"),
    "config names a pickle": (config(transformers_weights="adapter_model.bin"), "transformers_weights"),
    "config names no text": (config(transformers_weights=["x.safetensors"]), "transformers_weights"),
    "config asks for a kernel": (config(attn_implementation="kernels-community/x"), "the code of kernels-community/x"),
    "config hides a kernel": (config(_attn_implementation={"": "evil/x@main"}), "the code of evil/x@main"),
    "config hides a kernel deeper": (config(text_config={"experts_implementation": ["a/b"]}), "the code of a/b"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_base_that_leads_elsewhere_or_asks_for_code_is_refused(own: Path, name: str) -> None:
    change, said = HOSTILE[name]
    change(own)
    error = refusal(find, own)
    assert error.startswith(str(own))
    assert said in error


def test_links_within_the_folder_and_from_a_folder_that_is_a_link_are_followed(own: Path, tmp_path: Path) -> None:
    (own / SHARD).rename(own / "weights")
    (own / SHARD).symlink_to("weights")
    (tmp_path / "link").symlink_to(own)
    assert find(tmp_path / "link").weight_files() == [tmp_path / "link" / SHARD]


@pytest.mark.parametrize("shared", [False, True])
def test_the_hub_caches_own_links_are_followed_and_its_files_compared_with_their_names(
    base: Path, tmp_path: Path, shared: bool
) -> None:
    repository = tmp_path / "hub" / "models--owner--tiny"
    kind = damage.hub_copy(base, repository)
    blob, snapshot = repository / kind.files[0], repository / "snapshots" / damage.REVISION
    if shared:  # newer versions keep large files once for all repositories, and link to them
        store = tmp_path / "hub/blobs/ab" / ("ab" * 32)
        store.parent.mkdir(parents=True)
        blob.rename(store)
        blob.symlink_to(os.path.relpath(store, blob.parent))
    damage.load(snapshot)
    flip(blob, -5)
    error = refusal(damage.load, snapshot)
    assert f"{SHARD} is damaged: its SHA-256 is not the one that the Hub's cache names it by" in error
    assert f"remove {blob.resolve()}" in error


def test_a_snapshot_that_links_past_the_hubs_cache_is_refused(base: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--tiny"
    damage.hub_copy(base, repository)
    shutil.move(repository / "blobs", tmp_path / "secrets")
    (repository / "blobs").symlink_to(tmp_path / "secrets")
    assert "is a link that leads out of its folder" in refusal(find, repository / "snapshots" / damage.REVISION)


def test_a_shard_whose_tensor_has_another_name_is_named(own: Path) -> None:
    tensors = load_file(own / SHARD)
    tensors["model.morn.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, own / SHARD, metadata={"format": "pt"})
    error = refusal(damage.load, own)
    assert f"1 weights of its architecture are not in its files ({SHARD}), e.g. model.norm.weight" in error


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def facts(start: int, end: int, shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


SHARDS = {
    "points past its end": header(a=facts(0, 8), b=facts(8, 16)) + bytes(8),
    "has more than it says": header(a=facts(0, 8)) + bytes(16),
    "overlaps": header(a=facts(0, 8), b=facts(4, 12)) + bytes(12),
    "leaves a gap": header(a=facts(0, 8), b=facts(12, 20)) + bytes(20),
    "runs backwards": header(a=facts(8, 0)) + bytes(8),
    "has negative places": header(a=facts(-8, 0)) + bytes(8),
    "has a shape of another size": header(a=facts(0, 8, (3,))) + bytes(8),
    "has a shape that overflows": header(a=facts(0, 8, (2**62, 2**62))) + bytes(8),
    "promises terabytes": (2**40).to_bytes(8, "little") + b"{}",
    "is a pickle": b"\x80\x02csubprocess\ncall\n(X\x04\x00\x00\x00truetR.",
    "is empty": b"",
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_that_is_not_as_its_header_says_is_named_before_anything_is_loaded(own: Path, name: str) -> None:
    (own / SHARD).write_bytes(SHARDS[name])
    assert f"{own / SHARD} is damaged or half-written" in refusal(damage.load, own)


def test_code_that_comes_with_a_base_is_not_run_but_named(own: Path) -> None:
    (own / "evil.py").write_text(f"open({str(own / 'ran')!r}, 'w')\n")
    edit(own / "config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="evil")
    edit(own / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokens", None]}, tokenizer_class="EvilTokens")
    said = [refusal(lambda path: load_config(find(path)), own), refusal(lambda path: load_tokenizer(find(path)), own)]
    assert f"{own} needs code of its own: auto_map in its config.json names evil.Config" in said[0]
    assert f"{own} needs code of its own: auto_map in its tokenizer_config.json names" in said[1]
    assert all("is never run" in each and "trust_remote_code" not in each for each in said)
    assert not (own / "ran").exists()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder that only holds an adapter."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"x.lora_B.weight": torch.ones(2, 2)}, folder / WEIGHTS)
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    return folder


def test_an_adapter_that_is_a_pickle_is_refused_with_the_way_to_convert_it(adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    assert read_adapter(adapter)[1].keys() == {"x.lora_B.weight"}
    (adapter / WEIGHTS).unlink()
    error = refusal(read_adapter, adapter)
    assert f"{adapter} has its weights as a pickle only (adapter_model.bin)" in error
    assert "save_pretrained" in error


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_an_adapter_of_a_type_that_none_is_stored_in_is_refused(adapter: Path, dtype: torch.dtype) -> None:
    try:
        save_file({"x.lora_B.weight": torch.ones(2, 2).to(dtype)}, adapter / WEIGHTS)
    except KeyError:
        pytest.skip("this safetensors writes no such type")
    assert f"{adapter / WEIGHTS}: x.lora_B.weight is of type {dtype}" in refusal(read_adapter, adapter)


def test_an_adapter_that_links_to_another_place_is_refused(adapter: Path, tmp_path: Path) -> None:
    assert adapter_folder(adapter) == adapter
    shutil.move(adapter / WEIGHTS, tmp_path / "elsewhere")
    (adapter / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    assert f"{WEIGHTS} is a link that leads out of its folder" in refusal(adapter_folder, adapter)
