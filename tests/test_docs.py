"""What the documents say is so: generated pages are the code's, links lead somewhere, README stays short."""

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
named = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of scripts/ as a module, which may import its neighbours."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@cache
def anchors(page: Path) -> set[str]:
    """What `page#...` may name: headings as code hosts and the site slug them, twice the same one with a number."""
    slug, found, names = slugify(case="lower"), set(), FENCE.sub("", page.read_text("utf-8"))
    for title in re.findall(r"^#+ (.+?)\s*$", names, re.M):
        name = plain = slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title), "-")
        number = 0
        while name in found:
            number += 1
            name = f"{plain}_{number}"
        found.add(name)
    return found


def test_generated_pages_are_current(monkeypatch):
    written = script("write_reference", monkeypatch).pages()
    stale = [path.name for path, text in written.items() if not path.exists() or path.read_text("utf-8") != text]
    left = {path for path in (DOCS / "api").glob("*.md") if path.name != "index.md"} - set(written)
    assert not stale, f"run make docs: {stale}"
    assert not left, f"run make docs, which removes {left}"


def test_the_pictures_are_current(monkeypatch):
    for path, drawn in script("draw_how_it_works", monkeypatch).pictures().items():
        assert path.read_text("utf-8") == drawn, f"{path.name}: run make docs"
        assert path.stat().st_size < 40_000
    pipeline = script("draw_pipeline", monkeypatch)
    assert pipeline.TARGET.read_text("utf-8") == pipeline.picture(), "run make docs"


def test_readme_is_short():
    assert (ROOT / "README.md").read_text("utf-8").count("\n") < 200


@named
def test_links_and_anchors_lead_somewhere(page):
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md" and not anchor.startswith("tokenkit."):  # those the site makes
            assert anchor in anchors(target), link


@named
def test_a_page_reads_alike_on_a_code_host_and_on_the_site(page):
    """Python-Markdown wants a blank line before a list and a table, and four spaces below an item."""
    before, mistakes = "", []
    for number, line in enumerate(
        FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text("utf-8")).split("\n"), 1
    ):
        item, goes_on = (re.match(r" *([-*+]|\d+\.) ", text) for text in (line, before))
        if item and before.strip() and not goes_on and not before.startswith((" ", "#")):
            mistakes.append(f"{number}: no blank line before a list")
        if item and len(line) - len(line.lstrip()) in (1, 2, 3):
            mistakes.append(f"{number}: a list below a list is indented by four")
        if line.startswith("|") and before.strip() and not before.startswith("|"):
            mistakes.append(f"{number}: no blank line before a table")
        before = line
    for block in re.findall(r"^(?: {1,3}| {5,7})```.*$", page.read_text("utf-8"), re.M):
        mistakes.append(f"{block!r}: a fence stands at the line's beginning, or four below an item")
    assert not mistakes


def test_make_targets_are_the_documented_ones():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    found = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))
    assert found >= {"setup", "demo", "test", "test-all", "fix", "check", "docs"}
