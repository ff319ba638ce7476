"""Tensors read one at a time are those of the files, and damage is one error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files import write_manifest
from qlora_cli.model.folder import INDEX, BaseFolder, find_base
from qlora_cli.model.source import DTYPES, Source

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(10, dtype=torch.bfloat16).view(5, 2),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
}


def folder(path: Path) -> BaseFolder:
    return BaseFolder("base", path, None)


def shards(path: Path) -> None:
    """TENSORS in two files with an index."""
    names = {"a": "one.safetensors", "b": "two.safetensors", "scalar": "one.safetensors", "empty": "two.safetensors"}
    for file in set(names.values()):
        save_file({name: TENSORS[name] for name, there in names.items() if there == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": names}), encoding="utf-8")


def test_every_tensor_reads_back_with_its_place_type_and_shape(tmp_path: Path) -> None:
    shards(tmp_path)
    source = Source(folder(tmp_path))
    assert source.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        entry = source.entries[name]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert (entry.elements, entry.bytes) == (tensor.numel(), tensor.numel() * tensor.element_size())
        assert torch.equal(source.read(name), tensor)
    assert source.entries["b"].file.name == "two.safetensors"


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert "other" not in Source(folder(tmp_path)).entries


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.integers(0, 9), columns=st.integers(0, 5), most=st.integers(1, 200), flat=st.booleans())
def test_pieces_are_the_tensor_in_order_and_none_is_large(
    tmp_path: Path, rows: int, columns: int, most: int, flat: bool
) -> None:
    shape = (rows,) if flat else (rows, columns)
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    pieces = list(Source(folder(tmp_path)).pieces("x", most))
    assert torch.equal(torch.cat(pieces), tensor)
    row_bytes = 4 if flat else 4 * columns
    assert all(piece.numel() * 4 <= max(most, row_bytes) for piece in pieces)


def test_a_scalar_is_one_piece(tmp_path: Path) -> None:
    shards(tmp_path)
    pieces = list(Source(folder(tmp_path)).pieces("scalar", 1))
    assert [int(piece) for piece in pieces] == [7]


def test_a_tensor_outlives_its_file(tmp_path: Path) -> None:
    save_file({"x": torch.full((1000,), 3.0)}, tmp_path / "model.safetensors")
    tensor = Source(folder(tmp_path)).read("x")
    (tmp_path / "model.safetensors").write_bytes(b"gone")
    assert tensor.tolist() == [3.0] * 1000


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_one_error_that_names_it(tmp_path: Path, keep: int) -> None:
    shards(tmp_path)
    file = tmp_path / "two.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"two\.safetensors is damaged or half-written"):
        Source(folder(tmp_path))


def test_a_header_that_promises_terabytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((10**12).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="damaged or half-written"):
        Source(folder(tmp_path))


def test_a_tensor_that_the_index_names_and_no_file_has_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] |= {"c": "one.safetensors", "a": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=r"2 tensors that model\.safetensors\.index\.json names are not .* e\.g\. a"):
        Source(folder(tmp_path))


def test_a_type_that_no_weight_has_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="holds tensors of type F8_E4M3"):
        Source(folder(tmp_path))


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_type_of_the_table_reads_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor: Tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    source = Source(folder(tmp_path))
    assert source.entries["x"].dtype == dtype
    assert torch.equal(source.read("x"), tensor)


def test_a_bit_that_flipped_is_found_where_there_is_a_manifest(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    find_base(str(tmp_path), None)
    file = tmp_path / "one.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"is damaged: one\.safetensors is not as it was written"):
        find_base(str(tmp_path), None)
