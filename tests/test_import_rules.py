"""Imports point left only: format -> reference -> ops -> backend -> plugin; only the vLLM glue imports vllm."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vllm_kivi"

# Every module of the package, from left to right; a new one must be given its place here. Modules of one rank do not
# import each other.
RANKS = (
    {"vllm_kivi"},
    {"format"},
    {"options", "reference", "triton_ops"},
    {"ops"},
    {"compat"},
    {"backend"},
    {"plugin"},
    {"evaluate"},
    {"plan"},
    {"cli"},
)
IMPORT_VLLM = {"backend", "plugin", "compat", "evaluate"}
LIGHT = {"vllm_kivi", "format", "options", "plugin", "plan", "cli"}


def module_of(path: Path) -> str:
    """The unit of the rules: a file, or a folder with all that is in it."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "vllm_kivi" if parts == ("__init__",) else parts[0]


def imports_of(path: Path, nested: bool = True) -> Iterator[str]:
    """Full names of what a file imports; without `nested` only what happens when it is imported itself."""
    tree = ast.parse(path.read_text())
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]]

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not nested:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(tree)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_ranks_list_the_modules_that_exist():
    assert set().union(*RANKS) == {module_of(path) for path in sources()}


def rank_of(module: str) -> int:
    ranks = [rank for rank, modules in enumerate(RANKS) if module in modules]
    assert len(ranks) == 1, f"vllm_kivi/{module} has no place in RANKS"
    return ranks[0]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path):
    module = module_of(path)
    rank = rank_of(module)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "vllm_kivi" or len(parts) == 1:
            continue
        # `from vllm_kivi import __version__` yields a name that is no module: it belongs to the package itself.
        known = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
        target = parts[1] if known else "vllm_kivi"
        assert target == module or rank_of(target) < rank, f"{module} must not import {name}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_glue_imports_vllm(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert "vllm" not in roots or module_of(path) in IMPORT_VLLM


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_light_modules_load_nothing_heavy(path):
    roots = {name.split(".")[0] for name in imports_of(path, nested=False)}
    assert module_of(path) not in LIGHT or not roots & {"torch", "transformers", "vllm"}


def test_format_imports_neither_torch_nor_vllm():
    roots = {name.split(".")[0] for name in imports_of(PACKAGE / "format.py")}
    assert roots <= sys.stdlib_module_names


def test_reference_needs_torch_and_the_format_alone():
    names = {name for name in imports_of(PACKAGE / "reference.py") if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name.split(".")[0] for name in names} == {"torch", "vllm_kivi"}
    assert all(name.startswith("vllm_kivi.format") for name in names if name.startswith("vllm_kivi"))


@pytest.mark.parametrize("module", ("vllm_kivi", "vllm_kivi.format", "vllm_kivi.options"))
def test_importing_it_loads_neither_torch_nor_vllm(module):
    """In a fresh process: plugins load in every one of them."""
    program = f"import sys, {module}; print(sorted({{'torch', 'vllm', 'numpy'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
