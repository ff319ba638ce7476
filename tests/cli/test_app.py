"""The command line: fast where nothing heavy is needed, and honest exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli import __version__
from qlora_cli.cli.app import main

HEAVY = ("torch", "transformers", "bitsandbytes", "datasets", "accelerate", "numpy")
REPORT = """
import resource, sys
from qlora_cli.cli.app import main
code = main({arguments!r})
usage = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in {heavy!r} if name in sys.modules]
print("REPORT", code, heavy, usage.ru_utime + usage.ru_stime, file=sys.stderr)
"""


def child(*arguments: str) -> tuple[int, str, float, str]:
    """(exit code, heavy modules loaded, CPU seconds, stderr) of `main(arguments)` in a fresh interpreter."""
    script = REPORT.format(arguments=list(arguments), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    errors, _, report = done.stderr.rpartition("REPORT ")
    code, rest = report.split(" ", 1)
    modules, seconds = rest.rsplit(" ", 1)
    return int(code), modules, float(seconds), errors


def test_help_loads_nothing_heavy_and_takes_little_cpu_time() -> None:
    runs = [child("--help") for _ in range(3)]
    assert all((code, modules) == (0, "[]") for code, modules, _, _ in runs)
    assert min(seconds for _, _, seconds, _ in runs) <= 0.15


def test_a_refused_recipe_loads_nothing_heavy_and_takes_little_cpu_time(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("model: {base: x}\ndata: {train: y.jsonl}\ntrain: {stepz: 3}\n")
    runs = [child("train", str(recipe)) for _ in range(3)]
    assert all((code, modules) == (3, "[]") for code, modules, _, _ in runs)
    assert f"error: {recipe}:3:9: train.stepz" in runs[0][3]
    assert min(seconds for _, _, seconds, _ in runs) <= 0.35


@pytest.mark.parametrize("arguments", [["train"], ["nonsense"], ["train", "x", "--nonsense"], ["eval"]])
def test_wrong_usage_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_names_what_exists_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:")[2].split("\n")
    assert [line.split()[0] for line in listed if line.strip()] == [
        "data",
        "train",
        "eval",
        "merge",
        "quantize",
        "show",
        "report",
        "judge",
        "elo",
        "chat",
    ]


def test_a_reader_that_goes_away_is_no_bug(tmp_path: Path) -> None:
    command = f"{sys.executable} -m qlora_cli --help | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr
