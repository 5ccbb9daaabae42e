"""The floors of the house, what may be imported where, and the sizes and signatures we keep to."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["infra", "preprocessing", "training", "evaluation", "pipelines"]
FILES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
METHODS = sorted(path for path in (ROOT / "training" / "methods").iterdir() if any(path.glob("*.py")))
Function = ast.FunctionDef | ast.AsyncFunctionDef
every_file = pytest.mark.parametrize("path", FILES, ids=str)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def last_name(node: ast.expr) -> str:
    """`a.b.C[int]` -> C."""
    node = node.value if isinstance(node, ast.Subscript) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def imported(path: Path) -> set[str]:
    """Packages, also those named by relative imports and by importlib."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(path.parts[0] if node.level else (node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and last_name(node.func) in ("import_module", "__import__"):
            found |= {str(a.value).partition(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


@every_file
def test_nothing_imports_tests_or_a_floor_above(path: Path):
    assert not imported(path) & {*FLOORS[FLOORS.index(path.parts[0]) + 1 :], "tests", "benchmarks"}


@every_file
def test_ray_and_prefect_stay_where_they_belong(path: Path):
    assert "ray" not in imported(path) or path.name.startswith("ray_")
    assert "prefect" not in imported(path) or path.parts[0] == "pipelines"


PLAIN = [
    "training.methods",
    "training.backbones",
    "training.loop",
    "training.run",
    "training.recipes",
    *(f"training.methods.{folder.name}.{file.stem}" for folder in METHODS for file in sorted(folder.glob("[a-z]*.py"))),
    "preprocessing.shards",
    "training.export",
    "evaluation.pq",
    "evaluation.predict",
]
LOADER = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name, *sorted({"ray", "prefect"} & sys.modules.keys()))
"""


def test_methods_loop_and_pq_load_neither_ray_nor_prefect():
    told = subprocess.run([sys.executable, "-c", LOADER, *PLAIN], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == PLAIN


@pytest.mark.parametrize("folder", METHODS, ids=lambda folder: folder.name)
def test_a_method_has_its_things_where_the_others_have_theirs(folder: Path):
    files = {"__init__.py", "config.py", "targets.py", "model.py", "loss.py", "decode.py"}
    assert files == {path.name for path in folder.glob("*.py")}


@every_file
def test_files_have_400_lines_and_functions_80_at_most(path: Path):
    assert len((ROOT / path).read_text().splitlines()) <= 400
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree(path)) if isinstance(n, Function)}
    assert not {name: lines for name, lines in lengths.items() if lines > 80}


@dataclass(frozen=True)
class Class:
    """A class as its source has it."""

    bases: tuple[str, ...]
    documented: frozenset[str]


@cache
def classes() -> dict[str, Class]:
    found = {}
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                told = frozenset(m.name for m in node.body if isinstance(m, Function) and ast.get_docstring(m))
                found[node.name] = Class(tuple(map(last_name, node.bases)), told)
    return found


def documented_above(name: str, bases: tuple[str, ...]) -> bool:
    """Whether a base of ours documents this method."""
    known = [classes()[base] for base in bases if base in classes()]
    return any(name in base.documented or documented_above(name, base.bases) for base in known)


def public(node: ast.AST) -> bool:
    if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
        return False
    return not any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


def undocumented(path: Path) -> list[str]:
    missing = [] if not tree(path).body or ast.get_docstring(tree(path)) else [str(path)]
    for node in filter(public, tree(path).body):
        if not ast.get_docstring(node):
            missing.append(node.name)
        if isinstance(node, ast.ClassDef):
            bases = tuple(map(last_name, node.bases))
            methods = [m for m in node.body if public(m) and not ast.get_docstring(m)]
            missing += [f"{node.name}.{m.name}" for m in methods if not documented_above(m.name, bases)]
    return missing


@every_file
def test_everything_public_has_a_docstring(path: Path):
    """A method has its own, or one of ours that it overrides."""
    assert undocumented(path) == []


def unannotated(function: Function, is_method: bool) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args]
    static = any(last_name(d) == "staticmethod" for d in function.decorator_list)
    named = named[1:] if is_method and not static else named
    named += [*arguments.kwonlyargs, *(a for a in (arguments.vararg, arguments.kwarg) if a)]
    missing = [f"{function.name}({a.arg})" for a in named if a.annotation is None]
    return missing if function.returns is not None else [*missing, f"{function.name} ->"]


@every_file
def test_every_function_is_fully_annotated(path: Path):
    methods = {m for c in ast.walk(tree(path)) if isinstance(c, ast.ClassDef) for m in c.body}
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, Function)]
    assert [name for f in functions for name in unannotated(f, f in methods)] == []
