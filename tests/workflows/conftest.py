"""Refusals: a recipe that must not train, and a base to be broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.cli.app import main

Refuse = Callable[..., str]


@pytest.fixture
def refuse(recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """A function that trains on a recipe, asserts exit code, one error and no run directory, and returns the error."""

    def train(code: int, *options: str, recipe: Path | None = None) -> str:
        run = tmp_path / "run"
        status = main(["train", str(recipe or recipe_file()), "-o", str(run), *options])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert (status, len(errors), captured.out) == (code, 1, ""), captured.err
        assert not run.exists()
        assert not list(tmp_path.glob(".tmp-*"))
        return captured.err[captured.err.index("error: ") :]

    return train


@pytest.fixture
def broken(base: Path, tmp_path: Path) -> Path:
    """A copy of the base, to be broken."""
    return Path(shutil.copytree(base, tmp_path / "broken"))


def set_base(folder: Path | str) -> list[str]:
    return ["-s", f"model.base={folder}"]
