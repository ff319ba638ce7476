"""What the writer writes is what safetensors, and this package's reader, read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qlora_cli.model.folder import INDEX, BaseFolder
from qlora_cli.model.source import DTYPES, Source
from qlora_cli.model.writer import Writer

SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)
TYPES = st.sampled_from(sorted(DTYPES.values(), key=str))


def make(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bytes that are numbers of that type."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def write(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = 10**9) -> int:
    with Writer(folder, tensors, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.finish()


def loaded(folder: Path) -> dict[str, Tensor]:
    """Through safetensors itself."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def offsets(file: Path) -> dict[str, tuple[int, int, int]]:
    """(place in the file, bytes, bytes of an element) of every tensor."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__")
    return {
        name: (
            8 + size + e["data_offsets"][0],
            e["data_offsets"][1] - e["data_offsets"][0],
            DTYPES[e["dtype"]].itemsize,
        )
        for name, e in header.items()
    }


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    kinds=st.lists(st.tuples(TYPES, SHAPES), min_size=1, max_size=8),
    shard_bytes=st.sampled_from([1, 64, 300, 10**9]),
    seed=st.integers(0, 99),
)
def test_any_tensors_read_back_equal_and_aligned(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[tuple[torch.dtype, tuple[int, ...]]],
    shard_bytes: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("written")
    tensors = {f"t{i}": make(dtype, shape, seed + i) for i, (dtype, shape) in enumerate(kinds)}
    total = write(folder, tensors, shard_bytes)
    found, source = loaded(folder), Source(BaseFolder("-", folder, None))
    assert found.keys() == source.entries.keys() == tensors.keys()
    assert total == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert torch.equal(source.read(name), tensor)
    places = [place for file in folder.glob("*.safetensors") for place in offsets(file).values()]
    assert [start % size for start, _, size in places] == [0] * len(tensors)


def test_one_file_has_no_index_and_several_have(tmp_path: Path) -> None:
    tensors = {name: torch.full((10, 10), float(i)) for i, name in enumerate("abc")}
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    write(tmp_path / "one", tensors)
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    write(tmp_path / "many", tensors, shard_bytes=800)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(file.name for file in (tmp_path / "many").iterdir()) == sorted([*names, INDEX])
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 1200},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1]},
    }


def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(2), "b": torch.ones(100), "c": torch.ones(2)}, shard_bytes=16)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_pieces_are_written_as_they_come(tmp_path: Path) -> None:
    tensor, alive = torch.arange(1000, dtype=torch.float32).view(100, 10), list[int]()

    def pieces() -> Iterator[Tensor]:
        for part in tensor.split(7):
            alive.append(len(part))
            yield part

    with Writer(tmp_path, ["x", "odd"]) as writer:
        writer.add_pieces("x", torch.float32, (100, 10), pieces())
        writer.add_pieces("odd", torch.bfloat16, (3,), (t for t in torch.ones(3, dtype=torch.bfloat16).split(1)))
        writer.finish()
    assert len(alive) == 15
    assert torch.equal(loaded(tmp_path)["x"], tensor)
    assert loaded(tmp_path)["odd"].tolist() == [1.0, 1.0, 1.0]


def test_transposed_and_strided_tensors_are_written_by_their_values(tmp_path: Path) -> None:
    tensor = torch.arange(24).view(4, 6)
    write(tmp_path, {"t": tensor.T, "s": tensor[:, ::2]})
    assert torch.equal(loaded(tmp_path)["t"], tensor.T)
    assert torch.equal(loaded(tmp_path)["s"], tensor[:, ::2])


def test_a_header_of_many_long_names_fits(tmp_path: Path) -> None:
    names = [f'model.layers.{i}.{"very." * 40}"odd"\u00e9\\{i}' for i in range(3000)]
    write(tmp_path, {name: torch.full((2,), float(i)) for i, name in enumerate(names)})
    found = loaded(tmp_path)
    assert len(found) == 3000
    assert found[names[-1]].tolist() == [2999.0, 2999.0]


def test_offsets_past_four_gigabytes_fit_in_the_header(tmp_path: Path) -> None:
    with Writer(tmp_path, ["x"]) as writer:
        writer._open_shard()
        writer._shards[-1]["x"] = {"dtype": "BF16", "shape": [10**6] * 4, "data_offsets": [10**15, 10**16]}
        writer._close_shard()


def test_an_error_in_the_midst_closes_the_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="enough"), Writer(tmp_path, ["x"]) as writer:
        writer.add("x", torch.ones(4))
        raise RuntimeError("enough")
    assert writer._file is not None
    assert writer._file.closed
