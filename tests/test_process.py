"""What a training run's process is given before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli.process import CACHES, GPUS, HEAP, KERNELS, TUNABLES, has_glibc, tunables

OURS = ":".join(HEAP)
SCRIPT = """
import os, sys
from pathlib import Path
from qlora_cli.process import CACHES, settle
began_with = Path("/proc/self/environ").read_bytes().decode()
settle(sys.argv[1:])
print(os.getpid(), "tcache_count=0" in began_with, *(os.environ.get(name) for name in CACHES), sys.argv[1:])
"""
replaces = pytest.mark.skipif(not has_glibc() or any(map(os.path.exists, GPUS)), reason="glibc, and no GPU")


def start(tmp_path: Path, *words: str, **environment: str) -> tuple[list[str], int]:
    """(what the script printed, its process)."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if name not in (*CACHES, TUNABLES)}
    process = subprocess.Popen(
        [sys.executable, script, *words], env=clean | environment, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output.split(maxsplit=4), process.pid


@replaces
def test_a_training_run_begins_with_our_settings_in_the_same_process(tmp_path: Path) -> None:
    (pid, began_with, *caches, words), started = start(tmp_path, "train", "a recipe.yaml", "--quiet")
    assert int(pid) == started
    assert began_with == "True"
    assert caches == [str(KERNELS)] * 2
    assert words.strip() == str(["train", "a recipe.yaml", "--quiet"])


@replaces
def test_other_commands_are_left_alone(tmp_path: Path) -> None:
    (_, began_with, *caches, _), _ = start(tmp_path, "show", "train")
    assert (began_with, caches) == ("False", ["None", "None"])


@replaces
def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    own = {TUNABLES: "glibc.malloc.tcache_count=5", CACHES[0]: "7"}
    (_, began_with, *caches, _), _ = start(tmp_path, "train", **own)
    assert (began_with, caches) == ("False", ["7", str(KERNELS)])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, OURS),
        ({TUNABLES: ""}, OURS),
        ({TUNABLES: "glibc.malloc.perturb=1"}, f"glibc.malloc.perturb=1:{OURS}"),
        ({TUNABLES: "glibc.malloc.mxfast=64"}, None),
        ({TUNABLES: "glibc.malloc.hugetlb=0"}, None),
        ({TUNABLES: OURS}, None),
    ],
)
def test_tunables_are_added_once(given: dict[str, str], wanted: str | None) -> None:
    assert tunables(given) == wanted


def test_the_new_process_runs_the_whole_command_line(tmp_path: Path) -> None:
    """Its message and its exit code are the command's."""
    done = subprocess.run(
        [sys.executable, "-m", "qlora_cli", "train", tmp_path / "none.yaml", "-s", "train.steps=1"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3
    assert "none.yaml" in done.stderr
