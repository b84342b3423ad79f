"""What the documents say is so: the reference is the code's, links lead somewhere, README stays short."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_is_current():
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "scripts" / "write_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text("utf-8") == module.reference(), "run make docs"


def test_readme_is_short():
    assert (ROOT / "README.md").read_text("utf-8").count("\n") < 200


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_make_targets_are_the_documented_ones():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    found = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))
    assert found >= {"setup", "demo", "test", "test-all", "fix", "check", "docs"}
