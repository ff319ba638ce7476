"""What is written in C++ equals its slow twin, and a library that cannot be built or is damaged stops no run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_cli.model import attention_math
from qlora_cli.model.attention_math import Rule
from qlora_cli.model.fused import PLAIN, Products, project
from qlora_cli.model.lora import LoraLinear, frozen_weight
from qlora_cli.model.native import attention, build
from qlora_cli.model.native.attention import attend, why_no_attention
from qlora_cli.model.native.build import NotBuiltError, library, why_not
from qlora_cli.model.native.products import native_products
from qlora_cli.model.nf4 import Desk
from qlora_cli.model.packing import Packing, find_packing, packed_arguments, why_not_packed
from qlora_cli.model.segments import ATTENTION, COMPILED, using_attention
from tests.model.test_fused import base_of, factors, formula, lora_of, weighted
from tests.model.test_segments import CONFIGS, LENGTHS, decode, embeddings_of, weights_like
from tests.model.test_segments import build as build_model

CPU = torch.device("cpu")
WITHOUT = why_not()
NO_ATTENTION = why_no_attention(torch.bfloat16, CPU)
NOT_PACKED = {"gemma2": "soft-capping", "gpt-oss": "sinks"}
"""Models whose attention it does not know."""


def why_no_products() -> str:
    try:
        native_products()
    except NotBuiltError as error:
        return str(error)
    return ""


NO_PRODUCTS = why_no_products()
needs_products = pytest.mark.skipif(NO_PRODUCTS != "", reason=NO_PRODUCTS)
needs_compiler = pytest.mark.skipif(WITHOUT != "", reason=WITHOUT)
needs_attention = pytest.mark.skipif(NO_ATTENTION != "", reason=NO_ATTENTION)


def rebuilt(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> None:
    """From now on the library is built anew, and kept in `folder`."""
    library.cache_clear()
    monkeypatch.setenv("QLORA_CACHE", str(folder))
    for name, value in changes.items():
        monkeypatch.setattr(build, name, value)


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own."""
    rebuilt(monkeypatch, tmp_path / "cache")
    yield tmp_path / "cache"
    monkeypatch.undo()
    library.cache_clear()


@pytest.fixture(params=["amx", "avx512"])
def units(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The units of the processor that do the products: the best it has, and those that more processors have."""
    flags = (*build.FLAGS, "-mno-amx-bf16") if request.param == "avx512" else build.FLAGS
    rebuilt(monkeypatch, tmp_path_factory.getbasetemp() / "units", FLAGS=flags)
    try:
        if library().attention_ready() != {"amx": 2, "avx512": 1}[request.param]:
            pytest.skip(f"the processor has no {request.param}")
        yield
    finally:
        library.cache_clear()


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative to a typical size: gradients may be zero but for rounding."""
    return float((found.double() - wanted.double()).norm() / (wanted.double().norm() + 0.1 * wanted.numel() ** 0.5))


def random_rows(lengths: tuple[int, ...], heads: tuple[int, int], width: int, seed: int = 0) -> list[Tensor]:
    """q, k, v and a gradient of the result, as models hand them over: heads first."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(count, sum(lengths), width, generator=generator).bfloat16().transpose(0, 1) for count in counts]


def measured(kernel: Any, tensors: list[Tensor], lengths: tuple[int, ...], rule: Rule) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = kernel(*leaves, lengths, rule)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(out.dtype))]


@needs_attention
@pytest.mark.parametrize("window", [None, 1, 33, 64, 500])
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 64), ((2, 2), 16), ((6, 2), 80), ((3, 1), 128), ((1, 1), 8)])
def test_attention_and_its_gradients_are_those_of_the_formula_in_float32(
    heads: tuple[int, int], width: int, window: int | None, units: None
) -> None:
    lengths, rule = (1, 33, 64, 100, 31), Rule(width**-0.5, window)
    tensors = random_rows(lengths, heads, width)
    wanted = measured(attention_math.attend, [x.float() for x in tensors], lengths, rule)
    found = measured(attend, tensors, lengths, rule)
    assert [x.dtype for x in found] == [torch.bfloat16] * 4
    assert max(gap(a, b) for a, b in zip(found, wanted, strict=True)) < 5e-3


@needs_attention
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4).map(tuple),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(8, 70),
    window=st.none() | st.integers(1, 100),
    scaling=st.floats(0.01, 1),
)
def test_any_rows_heads_widths_and_windows_are_computed(
    lengths: tuple[int, ...], key_heads: int, groups: int, width: int, window: int | None, scaling: float
) -> None:
    tensors, rule = random_rows(lengths, (key_heads * groups, key_heads), width), Rule(scaling, window)
    wanted = measured(attention_math.attend, [x.float() for x in tensors], lengths, rule)
    found = measured(attend, tensors, lengths, rule)
    assert max(gap(a, b) for a, b in zip(found, wanted, strict=True)) < 2e-2


@needs_attention
def test_the_bits_do_not_depend_on_threads_on_layout_or_on_other_rows() -> None:
    lengths, rule = (70, 200, 5), Rule(0.125)
    tensors = random_rows(lengths, (4, 2), 64)
    wanted = measured(attend, tensors, lengths, rule)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = measured(attend, tensors, lengths, rule)
    finally:
        torch.set_num_threads(threads)
    spread = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in tensors]
    assert spread[0].stride(2) == 2
    for found in (alone, measured(attend, spread, lengths, rule)):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    first = measured(attend, [x[:70] for x in tensors], (70,), rule)
    assert all(torch.equal(a, b[:70]) for a, b in zip(first, wanted, strict=True))


@needs_attention
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_a_number_stays_so_and_in_its_row(which: int, units: None) -> None:
    tensors = random_rows((40, 40), (2, 1), 32)
    tensors[which][10, 0, 3] = float("nan")
    found = measured(attend, tensors, (40, 40), Rule(0.2))
    assert which == 3 or not found[0][:40].isfinite().all()
    assert not all(gradient[:40].isfinite().all() for gradient in found[1:])
    assert all(each[40:].isfinite().all() for each in found)


@needs_attention
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NOT_PACKED])
def test_models_compute_packed_rows_as_apart(name: str) -> None:
    assert find_packing(build_model(name, torch.bfloat16), 128, compiled=True) == Packing(COMPILED)


@needs_attention
@pytest.mark.parametrize("name", NOT_PACKED)
def test_models_of_which_it_does_not_know_the_attention_keep_the_slow_twin(name: str) -> None:
    found = find_packing(build_model(name, torch.bfloat16), 128, compiled=True)
    assert found.attention == ATTENTION
    assert "compiled attention knows no soft-capping, sinks" in found.reason


@needs_attention
def test_other_types_keep_the_slow_twin() -> None:
    model = build_model("llama", torch.float32)
    assert find_packing(model, 128, compiled=True) == Packing(ATTENTION, "for bfloat16 on CPUs only")
    assert "knows bfloat16 only" in why_not_packed(model, COMPILED, 128)


@needs_attention
def test_gradients_are_the_same_under_gradient_checkpointing() -> None:
    model = build_model("llama", torch.bfloat16).train()
    embeddings, grads = embeddings_of(model), list[tuple[Tensor, ...]]()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with using_attention(model, COMPILED):
            hidden = decode(model, embeddings, **packed_arguments(LENGTHS, CPU))
            loss = (hidden * weights_like(hidden)).sum()
            grads.append(torch.autograd.grad(loss, [embeddings, *model.get_decoder().layers.parameters()]))
    assert len(grads[0]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@needs_attention
def test_it_refuses_what_it_does_not_know() -> None:
    q, k, v, _ = random_rows((8,), (2, 1), 32)
    for rule, sinks, values in [
        (Rule(0.2, softcap=30.0), None, v),
        (Rule(0.2), torch.zeros(2), v),
        (Rule(0.2), None, v[..., :16]),
        (Rule(-0.2), None, v),
        (Rule(0.2), None, v.float()),
    ]:
        with pytest.raises(ValueError, match="compiled attention knows"):
            attend(q, k, values, (8,), rule, sinks)


def of_products(products: Products, layers: list[LoraLinear], x: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of the input and all factors; dropout draws the same each time."""
    torch.manual_seed(4)
    leaf = x.detach().requires_grad_()
    outputs = project(layers, leaf, products)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(weighted(outputs), [leaf, *factors(layers)])]


def apart(found: Tensor, wanted: Tensor) -> float:
    """Relative."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@needs_products
@pytest.mark.parametrize("tokens", [1, 31, 64, 500])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, (96, 32, 32)), (192, (64,)), (2816, (96, 32))])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
def test_products_of_4_bit_layers_are_those_of_their_dequantised_weights(
    kind: str, inputs: int, outputs: tuple[int, ...], tokens: int
) -> None:
    torch.manual_seed(0)
    layers = [
        lora_of(base_of(kind, out, index == 1, torch.bfloat16, inputs), 3 + 17 * index, scaling=0.7)
        for index, out in enumerate(outputs)
    ]
    x = torch.randn(tokens, inputs).bfloat16()
    found, plain = of_products(native_products(), layers, x), of_products(PLAIN, layers, x)
    leaves = [x.double().requires_grad_(), *(each.detach().double().requires_grad_() for each in factors(layers))]
    wanted = formula(layers, leaves[0], leaves[1:])
    exact = [*(y.detach() for y in wanted), *torch.autograd.grad(weighted(wanted), leaves)]
    assert [each.dtype for each in found] == [each.dtype for each in plain]
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        assert apart(ours, true) < 1e-2
        assert apart(ours, true) < 1.2 * apart(theirs, true) + 1e-3


@needs_products
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
def test_weights_are_unpacked_to_the_bits_of_bitsandbytes(kind: str) -> None:
    torch.manual_seed(0)
    layer, products = lora_of(base_of(kind, 320, False, torch.bfloat16, 576)), native_products()
    weight = frozen_weight(layer.base, torch.bfloat16, Desk())
    nothing = torch.zeros(576, 4, dtype=torch.bfloat16)
    assert torch.equal(products.forward(layer, torch.eye(576).bfloat16(), nothing).t(), weight)
    assert torch.equal(products.backward([(layer, torch.eye(320).bfloat16())], None, None), weight)


@needs_products
@pytest.mark.parametrize("kind", ["nf4-double", "linear", "conv1d"])
def test_with_dropout_other_layouts_and_other_layers_products_are_those_of_the_twin(kind: str) -> None:
    torch.manual_seed(0)
    layers = [lora_of(base_of(kind, out, False, torch.bfloat16), dropout=0.3) for out in (64, 40)]
    x = torch.randn(2, 9, 128).bfloat16()[..., ::2]
    for ours, theirs in zip(*(of_products(each, layers, x) for each in (native_products(), PLAIN)), strict=True):
        assert apart(ours, theirs) < 1e-2
    single = [lora_of(base_of(kind, 64, False, torch.float32))]
    pairs = zip(*(of_products(each, single, x.float()) for each in (native_products(), PLAIN)), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@needs_products
def test_the_bits_of_products_do_not_depend_on_threads_or_on_other_tokens() -> None:
    torch.manual_seed(0)
    layers = [lora_of(base_of("nf4-double", out, True, torch.bfloat16, 1024)) for out in (96, 64)]
    x, threads = torch.randn(777, 1024).bfloat16(), torch.get_num_threads()
    x[5, 7] = float("nan")
    wanted = of_products(native_products(), layers, x)
    torch.set_num_threads(1)
    try:
        alone = native_products().forward(layers[0], x, torch.zeros(777, 4).bfloat16())
    finally:
        torch.set_num_threads(threads)
    found = native_products().forward(layers[0], x, torch.zeros(777, 4).bfloat16())
    assert torch.equal(alone.nan_to_num(9), found.nan_to_num(9))
    few = native_products().forward(layers[0], x[100:103], torch.zeros(3, 4).bfloat16())
    assert torch.equal(few, found[100:103])
    for each in wanted[:2]:
        assert each[5].isnan().any()
        assert each[:5].isfinite().all() and each[6:].isfinite().all()


@needs_attention
@pytest.mark.parametrize("what", ["attention forward", "attention backward", "few", "many"])
def test_memory_that_is_not_there_is_an_error_and_not_the_end(what: str) -> None:
    if what in {"few", "many"} and NO_PRODUCTS:
        pytest.skip(NO_PRODUCTS)
    # in a process of its own, which may take no more than it has
    code = f"""
import resource, torch
from qlora_cli.model.attention_math import Rule
from qlora_cli.model.native.attention import attend
from qlora_cli.model.native.products import native_products
from tests.model.test_fused import base_of, lora_of

what, rows = {what!r}, {{"few": 1, "many": 160}}.get({what!r}, 0)
q, k, v = (torch.ones(400_000, 1, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
out = attend(q, k, v, (400_000,), Rule(0.3, 1)) if what == "attention backward" else None
if rows:
    size = (64, 400_000) if what == "few" else (65_536, 1024)
    layer, products = lora_of(base_of("nf4", size[0], False, torch.bfloat16, size[1])), native_products()
    x, h = torch.ones(rows, size[1]).bfloat16(), torch.ones(rows, 4).bfloat16()
torch.randn(64, 64) @ torch.randn(64, 64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))
try:
    if rows:
        products.forward(layer, x, h)
    elif out is None:
        attend(q, k, v, (400_000,), Rule(0.3, 1))
    else:
        out.sum().backward()
except MemoryError as error:
    print("MemoryError", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"MemoryError {'multiply' if what in {'few', 'many'} else what.replace(' ', '_')}\n"


@needs_compiler
def test_it_is_compiled_once_and_what_is_damaged_is_compiled_again(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    (kept,) = (anew / "compiled").iterdir()
    content, written = kept.read_bytes(), kept.stat().st_mtime_ns
    rebuilt(monkeypatch, anew)
    library()
    assert kept.stat().st_mtime_ns == written
    kept.unlink()  # the library in use stays as it is
    kept.write_bytes(content[:-100])
    rebuilt(monkeypatch, anew)
    library()
    (again,) = (anew / "compiled").iterdir()
    assert again.stem.split("-")[1] == build.sha256(again)[:16]
    assert again.stat().st_size == len(content)


@needs_compiler
def test_without_a_place_to_keep_it_it_is_compiled_all_the_same(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anew.write_text("in the way")
    assert library()
    monkeypatch.setattr(build, "cache_place", lambda: None)
    library.cache_clear()
    assert library()


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


@needs_compiler
def test_a_compiler_that_fails_is_quoted(anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = script(
        tmp_path / "c++-broken", '[ "$1" = --version ] && exit 0', "echo 'x.cpp:1: error: no luck' >&2; exit 1"
    )
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NotBuiltError, match=r"^c\+\+-broken: x.cpp:1: error: no luck$"):
        library()
    assert why_no_attention(torch.bfloat16, CPU) == "c++-broken: x.cpp:1: error: no luck"
    script(broken, "exit 3")
    with pytest.raises(NotBuiltError, match=r"^c\+\+-broken: exit code 3$"):
        library()


@needs_compiler
def test_a_compiler_that_brings_another_openmp_is_refused(
    anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = build.compiler()
    assert found
    (tmp_path / "empty.cpp").touch()
    other = tmp_path / "libiomp5.so"
    subprocess.run([found, "-shared", "-o", other, tmp_path / "empty.cpp"], check=True)
    options = f"-Wl,--no-as-needed -L{tmp_path} -l:libiomp5.so -Wl,-rpath,{tmp_path}"
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", f'exec {found} "$@" {options}')))
    # in a process of its own: what is loaded stays
    code = (
        "import torch\nfrom qlora_cli.model.native.build import *\n"
        "try: library()\nexcept NotBuiltError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "its OpenMP is not torch's\n"


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not() in {"there is no C++ compiler", "not on this system"}
    assert why_no_attention(torch.bfloat16, CPU) == why_not()
    with pytest.raises(NotBuiltError):
        library()
    monkeypatch.setenv("CXX", str(script(tmp_path / "special", "exit 0")))
    assert why_not() in {"", "not on this system"}
    monkeypatch.setattr(build.sys, "platform", "darwin")
    assert why_not() == "not on this system"


def test_the_fields_of_a_call_are_those_of_the_source() -> None:
    source = (Path(attention.__file__).parent / "attention.cpp").read_text()
    assert f"Place {', '.join(attention._Call.PLACES)};" in source
    assert f"int64_t {', '.join(attention._Call.SIZES)};" in source


def test_the_sources_are_part_of_what_is_installed() -> None:
    assert {path.name for path in build.SOURCES} == {"attention.cpp", "blocks.h", "pointwise.cpp", "products.cpp"}
    assert shutil.which("g++") is None or WITHOUT == ""
