"""The plan of memory counts what a run really holds, and a run that cannot fit is refused with values that do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.cli.app import main
from qlora_cli.errors import DeviceMemoryError
from qlora_cli.model.base import load_base, report
from qlora_cli.model.device import CLEAR_REFS, free_memory
from qlora_cli.model.engine import build_engine
from qlora_cli.model.lora import attach
from qlora_cli.recipe.load import load_recipe
from qlora_cli.workflows.events import Event, Notice, size
from qlora_cli.workflows.fits import Needs, Watch, score, settled
from qlora_cli.workflows.memory import TURNS, total
from qlora_cli.workflows.plan import shape_of
from qlora_cli.workflows.prepare import check_memory, prepare
from tests.conftest import save_base

CPU = torch.device("cpu")
Ready = Callable[..., Any]


@pytest.fixture
def ready(recipe_file: Callable[..., Path]) -> Ready:
    """A function that prepares the small recipe with some values changed."""

    def start(*overrides: str) -> Any:
        return prepare(load_recipe(str(recipe_file()), list(overrides)), weights=False, emit=lambda event: None)

    return start


def test_weights_and_constants_are_planned_to_the_byte(ready: Ready) -> None:
    plan = ready().plan
    loaded = ready()
    model = load_base(loaded.folder, loaded.recipe.model, loaded.recipe.quantization, torch.float32, CPU)
    held = report(model)
    assert plan.memory["4-bit weights"] > plan.memory["quantization constants"] > 0
    planned = plan.memory["4-bit weights"] + plan.memory["quantization constants"]
    assert abs(planned - held.four_bit_bytes) < 64 * 14  # constants of constants are whole numbers, layer by layer
    assert plan.memory["other weights"] == held.other_bytes
    assert held.bits_per_parameter == pytest.approx(4.127, abs=0.01)


def test_the_adapter_has_gradients_of_its_size_and_two_moments(ready: Ready) -> None:
    memory, trainable = ready().plan.memory, ready().plan.shape.trainable
    assert memory["trained weights"] == memory["gradients"] == 4 * trainable > 0
    assert memory["optimizer"] == 8 * trainable
    assert ready("train.optimizer=adamw_8bit").plan.memory["optimizer"] == round(2 * (1 + 4 / 256) * trainable)
    assert ready("lora.r=8").plan.shape.trainable == 2 * trainable


def needs_of(ready: Any) -> Needs:
    """The plan of a prepared run; what is free is not known."""
    return Needs(ready.recipe, ready.plan.shape, ready.plan.load, ready.dtype, "cpu", None)


@contextmanager
def kept_bytes(model: Any) -> Iterator[list[int]]:
    """The bytes that autograd keeps within, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen, found = dict[int, Tensor](), [0]

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own and place not in seen:
            seen[place] = tensor
            found[0] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "intermediate_size": 320}])
def test_activations_planned_are_those_that_autograd_keeps(
    changes: dict[str, Any], tmp_path: Path, ready: Ready
) -> None:
    base = save_base(tmp_path / "wide", **changes)
    start = ready(f"model.base={base}", "train.gradient_checkpointing=off")
    model = load_base(start.folder, start.recipe.model, start.recipe.quantization, torch.float32, CPU)
    layers = attach(model, start.recipe.lora, torch.float32, 0)
    engine = build_engine(model.train(), list(layers.values()), compiled=False)
    ids = torch.randint(0, 261, (2, 64), generator=torch.Generator().manual_seed(0))
    targets = torch.ones_like(ids, dtype=torch.bool)
    with kept_bytes(model) as found:
        loss = engine.loss({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets, ids.flatten())
    load = replace(start.plan.load, tokens=128, longest=64)
    planned = Needs(start.recipe, start.plan.shape, load, torch.float32, "cpu", None).parts["layer inputs"]
    assert loss.requires_grad
    assert planned == pytest.approx(found[0], rel=0.25)


def test_recomputed_layers_keep_their_inputs_alone(ready: Ready) -> None:
    on, off = (ready(f"train.gradient_checkpointing={mode}").plan for mode in ("on", "off"))
    assert on.memory["layer inputs"] == on.load.tokens * 64 * 4 * 3  # hidden 64, float32, 2 layers and the last output
    assert on.memory["layer inputs"] < off.memory["layer inputs"]


OTHERS = {  # family: (what else it takes, what a layer keeps: its layers' outputs + their distinct inputs)
    "gpt2": ({}, (192 + 64 + 256 + 64) + (64 + 64 + 64 + 256)),
    "phi3": (
        {"intermediate_size": 128, "pad_token_id": 0, "num_key_value_heads": 2},
        (128 + 64 + 256 + 64) + (64 + 64 + 64 + 128),
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_layers_of_other_families_are_counted(family: str, ready: Ready) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    extra, expected = OTHERS[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **extra))
    assert shape_of(model, ready().recipe).block.saved == expected


def test_of_parts_that_take_turns_only_the_largest_counts() -> None:
    assert total({"weights": 100, TURNS[0]: 7, TURNS[1]: 30, TURNS[2]: 0}) == 130


def test_a_run_that_lacks_memory_is_refused_with_values_that_fit(ready: Ready) -> None:
    needs = replace(needs_of(ready("train.micro_batch_size=4", "data.max_length=128")), free=None)
    needed = total(needs.parts)
    assert not needs.lacking
    assert not replace(needs, free=needed).lacking
    assert not replace(needs, free=round(needed / 1.14)).lacking  # within the plan's error
    short = replace(needs, free=round(needed / 1.16))
    assert short.lacking
    with pytest.raises(DeviceMemoryError) as caught:
        check_memory(short, True, lambda event: None)
    assert caught.value.exit_code == 7
    largest = max(needs.parts.values())
    assert size(largest) in str(caught.value)


def test_values_that_are_proposed_fit(ready: Ready) -> None:
    needs = needs_of(ready("train.micro_batch_size=4", "data.max_length=64"))
    large = replace(needs, load=replace(needs.load, tokens=4 * 2**14, longest=2**14), recipe=_long(needs.recipe))
    half = replace(large, free=total(large.parts) // 3)
    fix = half.remedy()
    assert fix.startswith("set -s train.gradient_checkpointing=on -s train.micro_batch_size=")
    one = replace(large, free=total(large.parts) // 100)
    assert "free memory" in one.remedy()  # constants alone are more


def _long(recipe: Any) -> Any:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 2**14})})


def test_auto_checkpoints_only_where_less_than_half_of_the_free_memory_would_be_left(ready: Ready) -> None:
    needs = needs_of(ready("train.gradient_checkpointing=off"))
    needed = total(needs.parts)
    train = needs.recipe.train.model_copy(update={"gradient_checkpointing": "auto"})
    auto = replace(needs, recipe=needs.recipe.model_copy(update={"train": train}))
    modes = {
        free: settled(replace(auto, free=free)).recipe.train.gradient_checkpointing
        for free in (None, 2 * needed, 2 * needed - 2)
    }
    assert modes == {None: "off", 2 * needed: "off", 2 * needed - 2: "on"}
    assert ready("train.gradient_checkpointing=auto").recipe.train.gradient_checkpointing in {"on", "off"}


def test_a_dry_run_only_says_what_it_lacks(ready: Ready) -> None:
    events: list[Event] = []
    needs = replace(needs_of(ready()), free=1000)
    check_memory(needs, False, events.append)
    assert len(events) == 1
    assert isinstance(events[0], Notice)
    assert "would be refused" in events[0].text


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}


def test_free_memory_is_the_least_of_the_machine_and_its_control_groups(tmp_path: Path) -> None:
    assert free_memory(CPU, tmp_path / "nothing") is None
    assert free_memory(CPU, write(tmp_path / "plain", MEMINFO)) == 8000 * 1024
    group = {"memory.max": "5000\n", "memory.current": "3000\n", "memory.stat": "anon 5\ninactive_file 400\n"}
    second = {f"sys/fs/cgroup/a/{name}": text for name, text in group.items()} | {"proc/self/cgroup": "0::/a/b\n"}
    second |= {"sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "1\n"}
    assert free_memory(CPU, write(tmp_path / "v2", MEMINFO | second)) == 5000 - 3000 + 400
    first = {"memory.limit_in_bytes": "7000\n", "memory.usage_in_bytes": "6500\n"}
    first = {f"sys/fs/cgroup/memory/{name}": text for name, text in first.items()}
    first |= {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/x\n"}
    assert free_memory(CPU, write(tmp_path / "v1", MEMINFO | first)) == 500


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux forgets a peak")
def test_growth_counts_from_the_start_of_the_watch() -> None:
    torch.ones(100_000_000, dtype=torch.uint8)  # gone again
    watch = Watch(CPU)
    assert watch.growth() < 30_000_000
    torch.ones(60_000_000, dtype=torch.uint8)
    assert 50_000_000 < watch.growth() < 90_000_000


def test_a_run_stores_and_tells_what_was_planned_and_measured(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", str(recipe_file()), "-o", str(run), "-q"]) == 0
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert plan["measured_memory_bytes"] > 0
    assert plan["memory_bytes"] == total(plan["memory"])
    log = (run / "train.log").read_text(encoding="utf-8")
    assert score(plan["memory_bytes"], plan["measured_memory_bytes"]) in log
    assert "bits per parameter" in log
