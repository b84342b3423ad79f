"""Programs beside the package (benchmarks, scripts, examples): what they import from it is there."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OF_ANOTHER = {"upstream_worker.py"}  # runs beside the JAX toolkit, whose package has the same name
PROGRAMS = sorted(
    path
    for folder in ("benchmarks", "scripts", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if path.name not in OF_ANOTHER
)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imported_names_exist(path):
    """No program is run for it: some measure for minutes, some need a peer that is not installed."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokenkit":
            module = import_module(node.module)
            for name in node.names:
                here = name.name in vars(module) or name.name in dir(module)
                assert here or find_spec(f"{node.module}.{name.name}"), f"{node.module} has no {name.name}"
