"""Bases that are missing, withheld, incomplete or unsafe: one error, its exit code, and nothing written."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from qlora_cli.cli.app import main

from .conftest import Refuse, set_base

Change = Callable[[Path], Any]


def test_a_model_folder_that_does_not_exist_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    error = refuse(5, *set_base(tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere'}: no such folder" in error
    assert "Hub id" in error


def test_a_hub_model_without_a_network_names_the_login_and_the_folder_form(refuse: Refuse) -> None:
    error = refuse(6, *set_base("owner/model"))
    assert "owner/model: no such folder here, and the Hub cannot be reached" in error
    assert "hf auth login" in error
    assert "name its folder in model.base" in error


HUB_ERRORS: list[tuple[type[Exception], int, int, str]] = [
    (GatedRepoError, 403, 6, "owner/model is gated on the Hub"),
    (RepositoryNotFoundError, 404, 5, "owner/model: no such folder here, and no such repository or revision"),
]


def http_library() -> Any:
    """The HTTP client that this version of huggingface_hub uses."""
    error = next(parent for parent in GatedRepoError.__mro__ if parent.__name__ == "HTTPError")
    return importlib.import_module(error.__module__.split(".")[0])


@pytest.mark.parametrize(("kind", "status", "code", "what"), HUB_ERRORS)
def test_a_model_that_the_hub_withholds_names_the_login_and_the_folder_form(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, kind: Any, status: int, code: int, what: str
) -> None:
    http = http_library()
    answer = http.Response(status, request=http.Request("GET", "https://hub.test/owner/model"))

    def withhold(*_: object, **__: object) -> str:
        raise kind("withheld; token hf_secret", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", withhold)
    error = refuse(code, *set_base("owner/model"))
    assert error.startswith(f"error: {what}")
    assert "hf auth login" in error
    assert "name its folder in model.base" in error
    assert "hf_secret" not in error


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def index_naming(*shards: str) -> Change:
    def write(folder: Path) -> None:
        names = {f"layer.{i}": shard for i, shard in enumerate(shards)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return write


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def config_with(**values: Any) -> Change:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return write


def index_holding(weight_map: Any) -> Change:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


FOLDERS: list[tuple[Change, str, str]] = [
    (only_pickles, "has its weights as pickles only (pytorch_model.bin)", "save_pretrained"),
    (without_weights, "has no *.safetensors", "folder that holds the weights"),
    (without_config, "has no config.json", "folder that holds config.json"),
    (broken_config, "cannot be read as JSON", "again"),
    (unknown_architecture, "not one that the installed transformers knows", "code that comes with a model repository"),
    (without_tokenizer, "its tokenizer cannot be loaded", "tokenizer.json"),
    (index_naming("../evil.safetensors"), "names a file outside of its folder: ../evil.safetensors", "trust"),
    (index_naming("/evil.safetensors"), "names a file outside of its folder: /evil.safetensors", "trust"),
    (index_naming("sub/evil.safetensors"), "names a file outside of its folder: sub/evil.safetensors", "trust"),
    (index_naming("model-1.safetensors"), "1 weight files are missing: model-1.safetensors", "download it again"),
    (index_holding([]), "has no `weight_map` of file names", "download it again"),
    (index_holding({"a": 5}), "has no `weight_map` of file names", "download it again"),
    (config_with(hidden_size="x"), "not one that the installed transformers knows", "transformers"),
    (config_with(num_attention_heads=0), "not one that the installed transformers knows", "choose another base"),
    (config_with(vocab_size=200), "but the model has only 200 embeddings", "tokenizer's files"),
    (quantised, "is already quantised (gptq)", "original 16-bit model"),
]


@pytest.mark.parametrize(("change", "what", "help_text"), FOLDERS, ids=[what[:40] for _, what, _ in FOLDERS])
def test_a_model_folder_that_lacks_or_hides_something_is_refused(
    refuse: Refuse, broken: Path, change: Change, what: str, help_text: str
) -> None:
    change(broken)
    error = refuse(5, *set_base(broken))
    assert str(broken) in error
    assert what in error
    assert help_text in error


def test_weights_that_are_cut_off_are_refused_and_the_run_directory_stays_usable(
    broken: Path, recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    arguments = ["train", str(recipe_file()), "-o", str(tmp_path / "run"), "-q"]
    assert main([*arguments, *set_base(broken)]) == 5
    error = capsys.readouterr().err
    assert (error.count("error: "), "Traceback" in error) == (1, False)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert main(arguments) == 0


def test_a_model_that_does_not_generate_text_is_refused(refuse: Refuse, broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": "t5"}')
    assert "a model of type t5 cannot be built for text generation" in refuse(5, *set_base(broken))


def test_a_name_too_long_for_a_folder_is_no_bug(refuse: Refuse) -> None:
    assert "no such folder" in refuse(5, *set_base("x" * 300))


def test_weights_of_other_shapes_than_the_config_names_are_refused(
    broken: Path, recipe_file: Callable[..., Path]
) -> None:
    config_with(intermediate_size=64)(broken)
    run = broken.parent / "other-shapes"
    assert main(["train", str(recipe_file()), *set_base(broken), "-o", str(run)]) == 5
