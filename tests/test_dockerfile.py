"""The promises of the Dockerfile, read from its instructions: the image itself needs a GPU machine to be of use."""

import fnmatch
import json
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Instruction(NamedTuple):
    """One line of the Dockerfile, continuation lines joined: `COPY`, `README.md ./`."""

    name: str
    rest: str


def instructions() -> list[Instruction]:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    kept = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\s*\\\n\s*", " ", kept)
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def named(name: str) -> list[str]:
    found = [instruction.rest for instruction in instructions() if instruction.name == name]
    assert found, f"the Dockerfile has no {name}"
    return found


def copied() -> list[str]:
    return [source for rest in named("COPY") for source in rest.split()[:-1]]


def test_the_base_image_is_one_cuda_runtime_with_a_full_version_on_an_ubuntu_with_python_3_12() -> None:
    [base] = named("FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu24\.04", base)


def test_the_image_runs_qlora_as_a_numbered_user_who_is_not_root() -> None:
    names = [instruction.name for instruction in instructions()]
    assert named("USER") == ["10001"]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert "RUN" not in names[names.index("USER") :]
    assert [json.loads(rest) for rest in named("ENTRYPOINT")] == [["qlora"]]


def test_every_pip_install_is_held_to_the_tested_versions() -> None:
    installs = [rest for rest in named("RUN") if "pip install" in rest]
    assert len(installs) == 2
    assert "pip install --constraint scripts/constraints.txt --requirement requirements.txt" in installs[0]
    assert "PIP_CONSTRAINT=scripts/constraints.txt PIP_BUILD_CONSTRAINT=scripts/constraints.txt pip" in installs[1]
    assert "--no-deps ." in installs[1]


def test_editing_the_package_keeps_the_layer_with_the_dependencies() -> None:
    steps = [f"{name} {rest}" for name, rest in instructions()]
    install = next(index for index, step in enumerate(steps) if "--requirement" in step)
    before = [step for step in steps[:install] if step.startswith("COPY")]
    assert before == ["COPY pyproject.toml ./", "COPY scripts/constraints.txt scripts/"]


def test_models_and_runs_live_in_volumes() -> None:
    assert [json.loads(rest) for rest in named("VOLUME")] == [["/cache", "/runs"]]
    assert any("HF_HOME=/cache/huggingface" in rest for rest in named("ENV"))
    assert named("WORKDIR")[-1] == "/runs"


def test_nothing_is_fetched_outside_the_package_managers_and_no_secret_is_built_in() -> None:
    text = " ".join(f"{name} {rest}" for name, rest in instructions())
    assert not re.search(r"\bADD\b|\bcurl\b|\bwget\b|\bgit\b|https?://", text)
    assert not re.search(r"token|secret|password|api_?key", text, re.IGNORECASE)


def test_every_copied_path_is_in_the_repository_and_let_through_by_dockerignore() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_through = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore
    assert copied() == ["pyproject.toml", "scripts/constraints.txt", "README.md", "LICENSE", "recipes", "qlora_cli"]
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in let_through), source


def test_the_package_builds_from_what_is_copied() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'readme = "README.md"' in project
    assert 'packages = ["qlora_cli"]' in project
    assert 'recipes = "qlora_cli/recipes"' in project
