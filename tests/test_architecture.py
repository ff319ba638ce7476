"""The layer table, held against every import of the package, lazy ones included; and the rules of style that a machine
can check."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import qlora_cli

PACKAGE = Path(qlora_cli.__file__).parent
LAYERS: dict[str, set[str]] = {
    "__main__": {"cli", "process"},
    "cli": {"workflows", "recipe", "errors", "secrets", "__init__"},
    "workflows": {"training", "evaluation", "generation", "export", "data", "model", "cache", "recipe", "files"}
    | {"errors", "process", "secrets", "__init__"},
    "training": {"data", "model", "recipe", "files", "errors"},
    "evaluation": {"data", "model", "recipe", "files", "errors"},
    "generation": {"model", "recipe", "files", "errors"},
    "export": {"model", "recipe", "files", "hub", "errors", "__init__"},
    "data": {"cache", "recipe", "files", "hub", "errors"},
    "model": {"cache", "recipe", "files", "hub", "errors"},
    "recipe": {"errors", "secrets"},
    "cache": {"files", "errors"},
    "files": {"errors"},
    "hub": {"errors"},
    "errors": {"secrets"},
    "secrets": set(),
    "process": set(),
    "__init__": set(),
}
BITSANDBYTES = {
    "model/nf4.py": {"bitsandbytes", "bitsandbytes.nn", "bitsandbytes.functional"},
    "training/optim.py": {"bitsandbytes.optim"},
}
LONGEST_FILE, LONGEST_FUNCTION = 300, 45


@dataclass(frozen=True)
class Import:
    """An import statement: the module that holds it, the module it names, and the names taken from that."""

    file: str
    line: int
    module: str
    names: tuple[str, ...]

    @property
    def layer(self) -> str:
        """The layer of the importing file."""
        return self.file.split("/")[0].removesuffix(".py")

    @property
    def targets(self) -> list[str]:
        """Layers of ours that it reaches: `from qlora_cli import x` reaches x, or the package itself for a name."""
        if self.module == "qlora_cli":
            return [name if name in LAYERS else "__init__" for name in self.names] or ["__init__"]
        return [self.module.split(".")[1]] if self.module.startswith("qlora_cli.") else []

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module} ({', '.join(self.names)})"


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the package, by its path in it."""
    files = sorted(PACKAGE.rglob("*.py"))
    found = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    assert len(found) > 30
    return found


@cache
def imports() -> list[Import]:
    """Every import statement, those inside functions included."""
    found = [each for file, tree in trees().items() for node in ast.walk(tree) for each in _imports(file, node)]
    assert len(found) > 200
    return found


def _imports(file: str, node: ast.AST) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(file, node.lineno, alias.name, ())
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{file}:{node.lineno}: imports are absolute, so that a layer is readable in each"
        yield Import(file, node.lineno, node.module or "", tuple(alias.name for alias in node.names))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method, with its file."""
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file, node


def test_the_table_names_every_layer_that_exists() -> None:
    existing = {file.split("/")[0].removesuffix(".py") for file in trees()}
    assert existing <= set(LAYERS)
    assert existing >= {"cli", "workflows", "training", "evaluation", "generation", "data", "model", "recipe", "files"}


def test_imports_point_down_only() -> None:
    up = [str(i) for i in imports() for target in i.targets if target not in LAYERS[i.layer] | {i.layer}]
    assert up == []


def test_data_and_model_never_import_each_other() -> None:
    crossing = [str(i) for i in imports() if {i.layer, *i.targets} >= {"data", "model"}]
    assert crossing == []


def test_only_workflows_see_the_whole_recipe() -> None:
    allowed = {"recipe", "workflows"}
    sees = [i for i in imports() if "Recipe" in i.names or "LoadedRecipe" in i.names]
    assert [str(i) for i in sees if i.layer not in allowed] == []
    assert {i.layer for i in sees} == allowed


def test_the_other_layers_take_nothing_of_the_recipe_but_its_sections() -> None:
    parts = {"training", "evaluation", "generation", "export", "data", "model"}
    taken = [i for i in imports() if i.layer in parts and "recipe" in i.targets]
    assert taken
    assert {i.module for i in taken} == {"qlora_cli.recipe.schema", "qlora_cli.recipe.data_schema"}
    assert [str(i) for i in taken for name in i.names if not name.endswith("Section")] == []


def test_bitsandbytes_is_imported_in_its_two_files_only() -> None:
    found: dict[str, set[str]] = {}
    for each in imports():
        if each.module.split(".")[0] == "bitsandbytes":
            names = {f"bitsandbytes.{name}" for name in each.names} if each.module == "bitsandbytes" else set()
            found.setdefault(each.file, set()).update(names or {each.module})
    assert set(found) == set(BITSANDBYTES)
    assert [f"{file}: {sorted(extra)}" for file, names in found.items() if (extra := names - BITSANDBYTES[file])] == []


def test_a_recipe_needs_pydantic_yaml_and_the_standard_library_only() -> None:
    outside = {i.module.split(".")[0] for i in imports() if i.layer == "recipe"} - sys.stdlib_module_names
    assert outside == {"pydantic", "pydantic_core", "yaml", "qlora_cli"} & outside
    assert {"pydantic", "yaml"} <= outside


def test_the_command_line_imports_heavy_libraries_inside_of_commands_only() -> None:
    heavy = {"torch", "transformers", "datasets", "accelerate", "bitsandbytes", "numpy", "rich"}
    top = [
        each
        for file, tree in trees().items()
        if file.startswith("cli/") or file in {"errors.py", "files.py", "__init__.py", "__main__.py"}
        for node in tree.body
        for each in _imports(file, node)
    ]
    assert top
    late = {"workflows"}
    assert [str(i) for i in top if i.module.split(".")[0] in heavy or late & set(i.targets)] == []


def test_only_the_console_prints() -> None:
    printing = {file for file, node in _calls() if isinstance(node.func, ast.Name) and node.func.id == "print"}
    assert printing == {"cli/console.py"}


def test_no_other_file_touches_the_standard_streams() -> None:
    touching = {
        file
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in {"stdout", "stderr", "stdin"}
    }
    assert touching == {"cli/console.py", "cli/clean.py"}  # the latter stands between stderr and what libraries say


def _calls() -> Iterator[tuple[str, ast.Call]]:
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield file, node


def test_no_handler_swallows_every_error() -> None:
    handlers = [(f, n) for f, tree in trees().items() for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)]
    assert len(handlers) > 10
    assert [f"{f}:{n.lineno}" for f, n in handlers if n.type is None] == []
    broad = [
        (f, n) for f, n in handlers if isinstance(n.type, ast.Name) and n.type.id in {"Exception", "BaseException"}
    ]
    assert broad
    # `main` turns a bug into a traceback and exit code 1; a session goes on; a tracker that fails is told and left out
    shows = {"cli/app.py", "cli/repl.py", "training/trackers.py"}
    assert [f"{f}:{n.lineno}" for f, n in broad if f not in shows and not _raises(n)] == []


def _raises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def test_every_module_says_what_it_knows() -> None:
    silent = [file for file, tree in trees().items() if tree.body and not ast.get_docstring(tree)]
    assert silent == []


def test_public_functions_and_classes_have_a_docstring() -> None:
    public = [
        (file, node)
        for file, tree in trees().items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert len(public) > 100
    assert [f"{file}:{node.lineno} {node.name}" for file, node in public if not ast.get_docstring(node)] == []


def test_files_are_short() -> None:
    lengths = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in trees()}
    assert {file: count for file, count in lengths.items() if count > LONGEST_FILE} == {}


def test_functions_are_short() -> None:
    lengths = {f"{file}:{node.name}": (node.end_lineno or 0) - node.lineno + 1 for file, node in functions()}
    assert len(lengths) > 200
    assert {name: count for name, count in lengths.items() if count > LONGEST_FUNCTION} == {}


def test_no_section_of_a_recipe_is_read_by_name_with_a_default() -> None:
    sections = {"recipe", "lora", "data", "train", "quantization", "section"}
    reads = [(f, n) for f, n in _calls() if isinstance(n.func, ast.Name) and n.func.id == "getattr"]
    assert reads
    subjects = [(f, n.lineno, ast.unparse(n.args[0]).split(".")[-1]) for f, n in reads if not f.startswith("recipe/")]
    assert [read for read in subjects if read[2] in sections] == []
