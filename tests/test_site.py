"""The site builds strictly, loads nothing from elsewhere, and its Python reference leaves no public name out."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

from mkdocstrings import Inventory

import tokenkit
from tokenkit import quantities
from tokenkit.losses import LOSSES
from tokenkit.transfer import INITIALIZERS

ROOT = Path(__file__).parents[1]
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}


class Loaded(HTMLParser):
    """Addresses that a browser fetches of its own accord."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Of each element the attribute that loads something."""
        self.found += [value or "" for name, value in attrs if LOADS.get(tag) == name]


def outside(site: Path) -> list[str]:
    """What pages and style sheets would fetch from elsewhere."""
    found = []
    for page in site.rglob("*.html"):
        parser = Loaded()
        parser.feed(page.read_text("utf-8"))
        found += [f"{page.name}: {address}" for address in parser.found if re.match(r"(https?:)?//", address)]
    for sheet in site.rglob("*.css"):
        found += re.findall(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)", sheet.read_text("utf-8"))
    return found


def public(path: Path) -> Iterator[tuple[str, bool]]:
    """Classes, functions and methods without an underscore before their name; whether each says what it is."""

    def below(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, bool]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield f"{prefix}.{node.name}", ast.get_docstring(node) is not None
                if isinstance(node, ast.ClassDef):
                    yield from below(node.body, f"{prefix}.{node.name}")

    parts = path.relative_to(ROOT).with_suffix("").parts
    return below(ast.parse(path.read_text("utf-8")).body, ".".join(p for p in parts if p != "__init__"))


def stable_names() -> set[str]:
    """Where the names live that the package, the losses, the initialisers and the tensors promise."""
    homes = {f"{module}.{name}" for name, module in tokenkit.HOME.items()}
    assert set(tokenkit.__all__) - set(tokenkit.HOME) == {"__version__", "align"}
    functions = [entry.fn for registry in (LOSSES, INITIALIZERS) for entry in registry.values()]
    functions += [f for f in vars(quantities).values() if callable(f) and f.__module__ == "tokenkit.quantities"]
    homes |= {f"{f.__module__}.{f.__qualname__}" for f in functions if not f.__name__.startswith("_")}
    registries = {"tokenkit.losses.LOSSES", "tokenkit.transfer.INITIALIZERS"}
    return homes | registries | {"tokenkit.align.spans.align", "tokenkit.version.__version__"}


def inherits(module: str, name: str) -> bool:
    """Whether an overriding method says what it is by the docstring of the class above, or a setter by its getter's."""
    found = import_module(module)
    for part in name.removeprefix(f"{module}.").split("."):
        found = inspect.getattr_static(found, part)
    return inspect.getdoc(found) is not None


def check_reference(inventory: Inventory) -> None:
    """Every public name has an entry and says what it is; an override may leave that to its base class."""
    pages = (page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    modules = [module for page in pages for module in re.findall(r"^::: (\S+)$", page, re.M)]
    undocumented, missing = [], stable_names() - set(inventory)
    for module in modules:
        file = ROOT / Path(*module.split("."))
        path = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        for name, documented in public(path):
            if documented or not inherits(module, name):
                missing |= {name} - set(inventory)
                undocumented += [] if documented else [name]
    assert len(modules) > 300
    assert not missing
    assert not undocumented


def test_the_site_is_whole_and_needs_no_network(tmp_path):
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    site = tmp_path / "site"
    assert not outside(site)
    written = {p.relative_to(ROOT / "docs").with_suffix(".html") for p in (ROOT / "docs").rglob("*.md")}
    assert written <= {p.relative_to(site) for p in site.rglob("*.html")}
    with (site / "objects.inv").open("rb") as file:
        check_reference(Inventory.parse_sphinx(file))
