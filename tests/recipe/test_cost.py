"""Validating a recipe is cheap: it imports nothing heavy and takes a fraction of a second."""

from __future__ import annotations

import resource
import subprocess
import sys


def _child(code: str) -> tuple[str, float]:
    """What a fresh interpreter prints, and the CPU seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_validating_imports_no_heavy_package() -> None:
    code = (
        "import sys\nfrom qlora_cli.recipe.load import load_recipe\nload_recipe('tiny-demo')\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'typer', 'jinja2', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)), 'yaml' in sys.modules)"
    )
    assert _child(code)[0] == "[] True\n"


def test_a_refused_recipe_takes_a_fraction_of_a_second_of_cpu() -> None:
    code = (
        "from qlora_cli.errors import RecipeError\nfrom qlora_cli.recipe.load import load_recipe\n"
        "try:\n    load_recipe('tiny-demo', ['train.lrr=1', 'lora.r=x'])\nexcept RecipeError as error:\n"
        "    print(len(error.problems))"
    )
    runs = [_child(code) for _ in range(3)]
    assert {text for text, _ in runs} == {"2\n"}
    assert min(seconds for _, seconds in runs) < 1.0  # about 0.2 on an idle core
