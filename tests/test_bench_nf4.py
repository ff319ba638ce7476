"""The benchmark of the quantiser alone."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_cli.model.nf4 import quantize
from qlora_cli.recipe.schema import QuantizationSection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))  # they find each other there

import nf4


def test_both_sides_are_timed_on_every_weight(capsys: pytest.CaptureFixture[str]) -> None:
    assert nf4.main(["--shape", "64x128", "--shape", "128x64", "--rounds", "2", "--json"]) == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert [each["shape"] for each in weights] == [[64, 128], [128, 64]]
    for each in weights:
        rates = each["parameters_per_second"]
        assert each["ratio"] == pytest.approx(rates["ours"] / rates["peer"])
        assert min(rates.values()) > 0


def test_a_quantiser_that_differs_in_one_code_is_seen() -> None:
    made = quantize(torch.randn(64, 128).bfloat16(), QuantizationSection())
    other = made.codes.clone()
    other[3] ^= 1
    assert nf4.same(made, made)
    assert not nf4.same(made, replace(made, codes=other))


def test_a_shape_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        nf4.main(["--shape", "64by128"])
    assert ended.value.code == 2
    assert "'64by128' is not OUTxIN" in capsys.readouterr().err
