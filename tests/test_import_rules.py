"""Imports point left only: format -> reference -> ops -> backend -> plugin; only the vLLM glue imports vllm, and only
compat.py knows a version of it."""

from __future__ import annotations

import ast
import re
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
    {"compat", "transformers"},
    {"backend"},
    {"plugin"},
    {"evaluate"},
    {"plan"},
    {"cli"},
)
IMPORT_VLLM = {"backend", "plugin", "compat", "evaluate"}
LIGHT = {"vllm_kivi", "format", "options", "plugin", "plan", "cli"}

# Where versions are read, of vLLM or of any package, and how one is written.
VERSION = re.compile(r"(vllm\.(__version.*|version)|importlib\.metadata|packaging)\b")
VERSION_TEXT = re.compile(r"(?<![\d.])0\.[2-9]\d(?!\d)")


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


class CompatOnly(ast.NodeVisitor):
    """Finds in a file what compat.py alone may do: know a version of vLLM, ask what this one has, or change it.

    Names are followed through imports and plain assignments anywhere in the file. What arrives as an argument is not
    known to be vLLM's, so hasattr is not allowed at all beside an import of vLLM.
    """

    def __init__(self, source: str) -> None:
        self.found: list[str] = []
        self._tree = ast.parse(source)
        self._names: set[str] = set()
        nodes = list(ast.walk(self._tree))
        self._docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        self._printed = {id(value) for node in nodes if isinstance(node, ast.Dict) for value in node.values}
        for node in nodes:
            if isinstance(node, ast.Import):
                self._names |= {a.asname or "vllm" for a in node.names if a.name.split(".")[0] == "vllm"}
            if isinstance(node, ast.ImportFrom) and _imports_vllm(node):
                self._names |= {a.asname or a.name for a in node.names}
        before = -1
        while before < len(self._names):  # aliases of aliases
            before = len(self._names)
            for node in nodes:
                self._names |= set(self._aliases(node))

    def violations(self) -> list[str]:
        self.visit(self._tree)
        return self.found

    def _aliases(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and self._of_vllm(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        if (
            isinstance(node, ast.For)
            and isinstance(node.iter, ast.Tuple | ast.List)
            and isinstance(node.target, ast.Name)
        ):
            yield from (node.target.id for element in node.iter.elts if self._of_vllm(element))

    def _of_vllm(self, node: ast.AST) -> bool:
        """Whether it is a module, class or function of vLLM, or part of one. What a call returns is not."""
        if isinstance(node, ast.Name):
            return node.id in self._names
        if isinstance(node, ast.Attribute | ast.Subscript):
            return self._of_vllm(node.value)
        same = {"type", "vars", "getattr", "cast", "import_module"}
        return isinstance(node, ast.Call) and _called(node) in same and any(map(self._names_vllm, node.args))

    def _names_vllm(self, node: ast.AST) -> bool:
        """As above, or the name of one of its modules."""
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        return text.split(".")[0] == "vllm" or self._of_vllm(node)

    def _add(self, node: ast.AST, what: str) -> None:
        self.found.append(f"{what}, line {node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]

    def _check_names(self, node: ast.Import | ast.ImportFrom) -> None:
        module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        if any(VERSION.match(f"{module}{alias.name}") for alias in node.names):
            self._add(node, "reads a version")

    visit_Import = visit_ImportFrom = _check_names

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._of_vllm(node.value) and VERSION.match(f"vllm.{node.attr}"):
            self._add(node, "prints a version" if id(node) in self._printed else "reads a version")
        if ast.unparse(node) == "sys.modules":
            self._add(node, "looks for modules")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and id(node) not in self._docstrings and VERSION_TEXT.search(node.value):
            self._add(node, "holds a version")

    def visit_Tuple(self, node: ast.Tuple) -> None:
        numbers = [getattr(element, "value", None) for element in node.elts[:2]]
        if numbers[:1] == [0] and numbers[1:] in [[minor] for minor in range(20, 100)]:
            self._add(node, "holds a version")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name, first = _called(node), node.args[0] if node.args else node
        if name == "hasattr" and self._names:
            self._add(node, "asks what vLLM has")
        if name in {"getattr", "signature", "find_spec", "import_module"} and self._names_vllm(first):
            self._add(node, "asks what vLLM has")
        # vllm_config.update() and the like are calls of values, not of what was imported.
        if name in {"setattr", "delattr", "update", "setdefault", "append", "insert", "pop", "clear"}:
            changed = first if name in {"setattr", "delattr"} else getattr(node.func, "value", node)
            if self._of_vllm(changed):
                self._add(node, "changes vLLM")
        self.generic_visit(node)

    def _check_try(self, node: ast.Try | ast.With, caught: list[str]) -> None:
        inside = [child for statement in node.body for child in ast.walk(statement)]
        absent = {"ImportError", "ModuleNotFoundError", "AttributeError", "Exception", "BaseException", ""}
        if absent & set(caught) and any(map(_imports_vllm, inside)):
            self._add(node, "tries an import of vLLM")
        if "AttributeError" in caught and self._names:
            self._add(node, "asks what vLLM has")
        self.generic_visit(node)

    def visit_Try(self, node: ast.Try) -> None:
        handled = [handler.type for handler in node.handlers]
        self._check_try(node, [name for kind in handled for name in _exceptions(kind)])

    def visit_With(self, node: ast.With) -> None:
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        suppressed = [argument for call in calls if _called(call) == "suppress" for argument in call.args]
        self._check_try(node, [name for kind in suppressed for name in _exceptions(kind)])

    def _check_target(self, node: ast.Attribute | ast.Subscript | ast.AST) -> None:
        if isinstance(node, ast.Attribute | ast.Subscript) and self._of_vllm(node.value):
            self._add(node, "changes vLLM")

    def visit(self, node: ast.AST) -> None:
        if isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            self._check_target(node)
        super().visit(node)


def _imports_vllm(node: ast.AST) -> bool:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
    return any(name.split(".")[0] == "vllm" for name in names)


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).split(".")[-1]


def _exceptions(node: ast.AST | None) -> list[str]:
    """Names of what an except clause catches; '' for everything."""
    if node is None:
        return [""]
    return [ast.unparse(element) for element in (node.elts if isinstance(node, ast.Tuple) else [node])]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_compat_knows_a_version(path):
    found = CompatOnly(path.read_text()).violations()
    name = str(path.relative_to(PACKAGE))
    if name == "compat.py":
        kinds = {violation.split(",")[0] for violation in found}
        assert kinds == {
            "holds a version",
            "reads a version",
            "looks for modules",
            "asks what vLLM has",
            "changes vLLM",
        }
    else:
        reports = name == "evaluate/report.py"  # which say what they were made with
        assert [x for x in found if not (reports and x.startswith("prints"))] == [], "this belongs into compat.py"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("from vllm.version import __version__", "reads a version"),
        ("from vllm import __version_tuple__", "reads a version"),
        ("import vllm\nif vllm.__version__ >= other: pass", "reads a version"),
        ("import vllm.version as v\nv.__version_tuple__", "reads a version"),
        ("import vllm\nx = {'vllm': vllm.__version__}", "prints a version"),
        ("import vllm\nx = {'new': vllm.__version__ > '1'}", "reads a version"),
        ("from importlib.metadata import version", "reads a version"),
        ("from packaging.version import Version", "reads a version"),
        ("print('vLLM 0.32 has none')", "holds a version"),
        ("print(f'needs {a} 0.33.1')", "holds a version"),
        ("newer = found >= (0, 33)", "holds a version"),
        ("import sys\nsys.modules.get('vllm.v1')", "looks for modules"),
        ("from vllm import config\nhasattr(config, 'x')", "asks what vLLM has"),
        ("from vllm import config\ngetattr(config, 'x', None)", "asks what vLLM has"),
        ("from vllm import config\ninspect.signature(config.make)", "asks what vLLM has"),
        ("importlib.util.find_spec('vllm.v1')", "asks what vLLM has"),
        ("from vllm import config\ntry: config.x\nexcept AttributeError: pass", "asks what vLLM has"),
        ("try:\n  from vllm import x\nexcept ImportError: pass", "tries an import of vLLM"),
        ("try:\n  import vllm.x\nexcept (OSError, ModuleNotFoundError): pass", "tries an import of vLLM"),
        ("try:\n  import vllm.x\nexcept: pass", "tries an import of vLLM"),
        ("with suppress(ImportError):\n  import vllm.x", "tries an import of vLLM"),
        ("from vllm.a import B\nB.method = mine", "changes vLLM"),
        ("import vllm.a as a\nfor x in (a, 1): x.y = 1", "changes vLLM"),
        ("from vllm import platform\np: Any = type(platform)\nq = p\nq.method = mine", "changes vLLM"),
        ("from vllm.a import TABLE\nTABLE['x'] = 1", "changes vLLM"),
        ("from vllm.a import TABLE\nTABLE.update(x=1)", "changes vLLM"),
        ("from vllm.a import B\nsetattr(B, 'x', 1)", "changes vLLM"),
        ("from vllm.a import B\ndel B.x", "changes vLLM"),
        ("from vllm.a import B\nB.a, c = 1, 2", "changes vLLM"),
    ],
)
def test_what_only_compat_may_do_is_seen(source, what):
    assert what in {violation.split(",")[0] for violation in CompatOnly(source).violations()}


@pytest.mark.parametrize(
    "source",
    [
        '"""vLLM 0.32 and 0.33."""',
        "from vllm.config import VllmConfig\nconfig = VllmConfig()\nconfig.x = 1",
        "def f(vllm_config): vllm_config.cache_config.block_size = 32",
        "from vllm import LLM\ntry: LLM()\nexcept ValueError: pass",
        "try: import matplotlib\nexcept ImportError: pass",
        "width = 0.35 * 0.25, (0.5, 32), (8, 0)",
        "hasattr(config, 'x')",
    ],
)
def test_what_anyone_may_do_is_not(source):
    assert not CompatOnly(source).violations()
