"""Compiled kernels equal those that are not, and a compiler that is missing or broken stops no run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.model.compiler import keep_compiled, why_no_compiler
from qlora_cli.model.engine import build_engine, plain_engine
from qlora_cli.model.native.build import library
from tests.conftest import save_base
from tests.model.test_engine import PACK, PADDED, by_name, gap, measured, trained

CPU = torch.device("cpu")
WITHOUT = why_no_compiler(CPU)


def tiny(folder: Path) -> tuple[Any, Any]:
    """A model of one layer."""
    return trained(save_base(folder, num_hidden_layers=1))


@pytest.mark.skipif(WITHOUT != "", reason=WITHOUT)
def test_compiled_parts_have_the_gradients_of_the_model_itself(tmp_path: Path) -> None:
    model, layers = tiny(tmp_path / "base")
    wanted = measured(plain_engine(model), layers, PADDED)
    engine = build_engine(model, layers, compiled=True)
    assert by_name(engine)["fused norms and gates"] == (
        True,
        "3 norms, 1 rotary embeddings and 1 gated activations compiled",
    )
    assert engine.compile_seconds > 0
    for batch in (PADDED, PACK):
        loss, gradient = measured(engine, layers, batch)
        assert gap(loss, wanted[0]) < 1e-5
        assert gap(gradient, wanted[1]) < 1e-4


@pytest.mark.skipif(WITHOUT != "", reason=WITHOUT)
def test_a_compiler_that_fails_costs_compiling_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++-broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    model, layers = tiny(tmp_path / "base")
    wanted = measured(plain_engine(model), layers, PADDED)
    library.cache_clear()
    engine = build_engine(model, layers, compiled=True)
    detail = "3 norms and 1 gated activations fused (c++-broken: exit code 1)"
    assert by_name(engine)["fused norms and gates"] == (True, detail)
    assert engine.compile_seconds == 0
    assert gap(measured(engine, layers, PACK)[1], wanted[1]) < 1e-4


def test_without_a_compiler_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    model, layers = tiny(tmp_path / "base")
    engine = build_engine(model, layers, compiled=True)
    detail = f"3 norms and 1 gated activations fused ({why_no_compiler(CPU)})"
    assert by_name(engine)["fused norms and gates"] == (True, detail)
    assert why_no_compiler(CPU) in {"there is no C++ compiler", "not on this system"}
    assert engine.compile_seconds == 0


def test_what_is_compiled_is_kept_where_bases_are_unless_the_environment_names_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setenv(name, "theirs")
    keep_compiled()
    assert os.environ[name] == "theirs"
    monkeypatch.delenv(name)
    keep_compiled()
    assert Path(os.environ[name]).parent == tmp_path
