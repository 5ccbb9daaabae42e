"""The floors of the house, and the sizes we keep to."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["infra", "preprocessing", "training", "evaluation", "pipelines"]
FILES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def tree(path):
    return ast.parse((ROOT / path).read_text())


def imported(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def functions(path):
    return [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path):
    floor = FLOORS.index(path.parts[0])
    assert [name for name in imported(path) if name in FLOORS and FLOORS.index(name) > floor] == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_ray_and_prefect_stay_where_they_belong(path):
    names = set(imported(path))
    assert "ray" not in names or path.name.startswith("ray_")
    assert "prefect" not in names or path.parts[0] == "pipelines"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_fit(path):
    assert len((ROOT / path).read_text().splitlines()) <= 400
    assert [f.name for f in functions(path) if f.end_lineno - f.lineno > 80] == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_public_names_are_documented(path):
    module = tree(path)
    classes = [node for node in module.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    public = [node for node in module.body if isinstance(node, ast.FunctionDef)] + classes
    own = [c for c in classes if not c.bases]  # what a subclass overrides is documented above it
    public += [node for c in own for node in c.body if isinstance(node, ast.FunctionDef)]
    assert [n.name for n in public if not n.name.startswith("_") and not ast.get_docstring(n)] == []
    assert path.name == "__init__.py" or ast.get_docstring(module)


def test_models_the_loop_and_pq_need_neither_ray_nor_prefect():
    names = ["training.methods", "training.loop", "training.recipes", "evaluation.pq", "preprocessing.shards"]
    code = f"import {', '.join(names)}, sys; sys.exit(bool({{'ray', 'prefect'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
