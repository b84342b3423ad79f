"""An import may only point to a smaller layer: eval, export and report can never need a trainer."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tokenkit"
LAYERS = {
    "version": 0,
    "config": 0,
    "schedule": 1,
    "tokenizers": 1,
    "align": 2,
    "fused": 2,
    "quantities": 3,
    "scores": 3,
    "losses": 4,
    "objective": 5,
    "plugins": 5,
    "models": 6,
    "transfer": 7,
    "data": 8,
    "eval": 9,
    "export": 10,
    "report": 11,
    "train": 12,
    "verbs": 13,
    "cli_shared": 14,
    "cli_tokenizer": 15,
    "cli_vocabulary": 15,
    "cli_transfer": 15,
    "cli_sweep": 15,
    "cli_report": 15,
    "cli": 16,
    "cli_guide": 17,
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in filter(None, names):
            package, _, rest = name.partition(".")
            if package == "tokenkit" and rest:
                other = rest.split(".")[0]
                assert other == own or LAYERS[other] < LAYERS[own], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_files_are_short_and_functions_too(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is long"


def test_no_drawer_for_everything():
    names = {p.stem for p in PACKAGE.rglob("*.py")}
    assert not names & {"utils", "common", "helpers", "misc"}
