"""The shell scripts parse, and the set-up knows when `.venv` is complete and current: real environments, no network."""

import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
SHELL = {"scripts/demo", "scripts/setup.sh", "scripts/test", ".ci/run"}


class Project:
    """A folder with the set-up and a `.venv` that is complete but for its packages and its stamp."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir(parents=True)
        for name in ("scripts/setup.sh", "scripts/constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, folder / name)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
        self.program(folder / ".venv" / "bin" / "qlora", "exit 0")
        self.gpu(answers=False)

    def program(self, path: Path, body: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        path.chmod(0o755)

    def gpu(self, answers: bool) -> None:
        """The driver's tool comes first on PATH, so that the tests say the same on a machine with a GPU."""
        self.program(self.folder / "bin" / "nvidia-smi", "exit 0" if answers else "exit 9")

    def start(self, command: str, **env: str) -> subprocess.Popen[str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        clean = {key: value for key, value in os.environ.items() if key != "PYTHON"}
        return subprocess.Popen(
            ["bash", "-c", f"source scripts/setup.sh; {command}"],
            cwd=self.folder,
            env={**clean, "PATH": path, **env},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, command: str, **env: str) -> tuple[int, str]:
        process = self.start(command, **env)
        _, stderr = process.communicate(timeout=120)
        return process.returncode, stderr

    def says(self, command: str, **env: str) -> bool:
        code, stderr = self.run(command, **env)
        assert code in (0, 1), stderr
        return code == 0


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path.resolve() / "a folder")


@pytest.mark.parametrize("name", sorted(SHELL))
def test_shell_script_parses(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_no_other_shell_script_exists() -> None:
    files = [path for folder in ("scripts", ".ci") for path in (ROOT / folder).iterdir() if path.is_file()]
    found = {str(path.relative_to(ROOT)) for path in files if path.read_bytes().startswith(b"#!/usr/bin/env bash")}
    assert found == SHELL


@pytest.mark.parametrize("name", ["scripts/demo", "scripts/test", ".ci/run"])
def test_command_is_executable(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)


def test_every_dependency_and_development_tool_has_a_tested_version() -> None:
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    pattern = r'[a-z0-9-]+==[0-9.]+(post[0-9]+)?(; python_version (<|>=) "3\.11")?'
    loose = [pin for pin in pins if not re.fullmatch(pattern, pin)]
    assert loose == []
    wanted = {canonicalize_name(Requirement(line).name) for line in importlib.metadata.requires("qlora-cli") or []}
    assert len(wanted) >= 15
    assert wanted - {pin.split("==")[0] for pin in pins} == set()


def test_the_oldest_versions_are_those_that_dependencies_allow() -> None:
    lines = (ROOT / "scripts" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = {pin.name: pin.specifier for pin in map(Requirement, filter(re.compile("[a-z]").match, lines))}
    needed = [Requirement(line) for line in importlib.metadata.requires("qlora-cli") or [] if "extra ==" not in line]
    assert oldest.keys() == {canonicalize_name(each.name) for each in needed}
    for each in needed:
        (least,), (pin,) = each.specifier, oldest[canonicalize_name(each.name)]
        assert (least.operator, pin.operator) == (">=", "==")
        assert Version(least.version) == Version(pin.version)


def test_set_up_for_the_demo_is_not_enough_for_the_tests(project: Project) -> None:
    project.run("write_stamp run default")
    assert project.says("is_current run")
    assert not project.says("is_current dev")
    assert project.says("is_whole")  # so the tests add to it


def test_set_up_for_the_tests_is_enough_for_the_demo(project: Project) -> None:
    project.run("write_stamp dev default")
    assert project.says("is_current dev")
    assert project.says("is_current run")


@pytest.mark.parametrize("name", ["scripts/constraints.txt", "pyproject.toml"])
def test_changed_requirements_are_installed_into_the_same_environment(project: Project, name: str) -> None:
    project.run("write_stamp dev default")
    with (project.folder / name).open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert not project.says("is_current run")
    assert project.says("is_whole")


@pytest.mark.parametrize("name", ["qlora-stamp", "bin/python", "bin/qlora"])
def test_half_made_environment_is_made_anew(project: Project, name: str) -> None:
    project.run("write_stamp dev default")
    assert project.says("is_whole")
    (project.folder / ".venv" / name).unlink()
    assert not project.says("is_whole")
    assert not project.says("is_current run")


def test_moved_environment_is_made_anew(project: Project) -> None:
    project.run("write_stamp dev default")
    project.folder = project.folder.rename(project.folder.with_name("moved"))
    assert not project.says("is_whole")


def test_environment_of_another_python_is_made_anew(project: Project) -> None:
    project.run("write_stamp dev default")
    stamp = project.folder / ".venv" / "qlora-stamp"
    version = f" {sys.version_info.major}.{sys.version_info.minor} "
    assert version in stamp.read_text(encoding="utf-8")
    stamp.write_text(stamp.read_text(encoding="utf-8").replace(version, " 3.9 "), encoding="utf-8")
    assert not project.says("is_whole")


def test_python_asked_for_by_name_must_be_the_one_of_the_environment(project: Project) -> None:
    project.run("write_stamp dev default")
    project.program(project.folder / "bin" / "python9", "echo 3.99 elsewhere")
    assert project.says("is_whole", PYTHON=sys.executable)
    assert not project.says("is_whole", PYTHON="python9")


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has a separate build for the CPU on Linux only")
def test_cpu_build_is_replaced_once_a_gpu_answers_and_a_default_build_is_kept(project: Project) -> None:
    project.run("write_stamp run cpu")
    assert project.says("is_whole")
    project.gpu(answers=True)
    assert not project.says("is_whole")
    project.run("write_stamp run default")
    project.gpu(answers=False)
    assert project.says("is_whole")


def test_unusable_python_is_one_error_that_names_what_was_tried(project: Project) -> None:
    project.program(project.folder / "bin" / "python9", "exit 127")
    code, stderr = project.run("qlora_setup run; echo reached >&2", PYTHON="python9")
    assert code == 1
    assert stderr.splitlines()[0] == "error: no Python from 3.10 to 3.14 found"
    assert "tried: python9" in stderr
    assert "fix: " in stderr
    assert "reached" not in stderr


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": os.devnull}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("offline")
def test_failed_installation_shows_the_end_of_pips_output_and_leaves_no_stamp(project: Project) -> None:
    code, stderr = project.run("qlora_setup run; echo reached >&2", PYTHON=sys.executable)
    assert code == 1
    assert "setup: .venv is incomplete or made for something else: making it anew" in stderr
    assert "pip: ERROR: No matching distribution found for torch==" in stderr
    assert "error: pip could not install PyTorch" in stderr
    assert "reached" not in stderr
    assert not (project.folder / ".venv" / "qlora-stamp").exists()
    assert not project.says("is_whole")


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock two set-ups are not kept apart")
def test_second_set_up_waits_for_the_first_and_installs_nothing(project: Project) -> None:
    with (project.folder / "scripts" / "constraints.txt").open(encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = project.start("qlora_setup run; echo reached >&2")
        assert second.stderr is not None
        first_line = second.stderr.readline()
        assert "another set-up is at work in this folder" in first_line
        project.run("write_stamp run default")
    _, rest = second.communicate(timeout=60)
    assert (second.returncode, rest) == (0, "reached\n")


def test_another_installations_packages_do_not_shadow_the_pinned_ones(project: Project) -> None:
    project.run("write_stamp run default")
    assert project.says('qlora_setup run; [ -z "${PYTHONPATH:-}" ]', PYTHONPATH="/elsewhere")
