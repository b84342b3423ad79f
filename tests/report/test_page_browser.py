"""What headless Chromium draws of the page of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
from chromium import CONTRAST, HIDDEN, STICKING_OUT, Browser, boxes

from tokenkit.report.page import write_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def content(example: Path) -> dict[str, Any]:
    return json.loads((example / "report.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def page(example: Path) -> Path:
    return write_page(example)


def test_bars_are_as_long_as_their_values(browser: Browser, page: Path, content: dict[str, Any]) -> None:
    browser.open(page, 1200)
    drawn, values = boxes(browser, ".bar"), [bar["bits_per_byte"] for bar in content["bars"]]
    assert len(drawn) == len(values)
    assert all(height > 5 for _, height, *_ in drawn)
    scale = drawn[0][0] / values[0]
    assert [width for width, *_ in drawn] == pytest.approx([scale * value for value in values], abs=0.2)
    whiskers = [2 * scale * bar["sd"] for bar in content["bars"] if bar["sd"]]
    assert [width for width, *_ in boxes(browser, ".whisker")] == pytest.approx(whiskers, abs=0.2)


def test_every_run_has_a_curve_in_both_panels(browser: Browser, page: Path, content: dict[str, Any]) -> None:
    browser.open(page, 1200)
    drawn = boxes(browser, "figure .curve")
    assert len(drawn) == 2 * len(content["curves"])
    assert all(width > 100 and height > 20 for width, height, *_ in drawn)
    assert browser.ask(STICKING_OUT) == []


def test_chunks_are_coloured_by_the_difference(browser: Browser, page: Path, content: dict[str, Any]) -> None:
    browser.open(page, 1200)
    drawn, chunks = boxes(browser, ".chunk"), content["aligned"][0]["chunks"]
    assert len(drawn) == len(chunks)
    assert all(width > 3 and height > 20 for width, height, *_ in drawn)
    colours = browser.ask("[...document.querySelectorAll('.chunk')].map(e => getComputedStyle(e).backgroundColor)")
    differences = [c["student_logp"] - c["teacher_logp"] if c["teacher_logp"] is not None else 0.0 for c in chunks]
    lowest, highest = (differences.index(pick(differences)) for pick in (min, max))
    assert len({colours[lowest], colours[highest], colours[0]}) == 3


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_the_tooltip_shows_the_numbers(browser: Browser, page: Path, content: dict[str, Any], by: str) -> None:
    browser.open(page, 1200)
    chunk = content["aligned"][0]["chunks"][1]
    assert boxes(browser, "#tip") == HIDDEN
    if by == "mouse":
        browser.ask("document.querySelectorAll('.chunk')[1].scrollIntoView({block: 'center'})")
        width, height, left, top = boxes(browser, ".chunk")[1]
        browser("Input.dispatchMouseEvent", type="mouseMoved", x=left + width / 2, y=top + height / 2)
    else:
        browser.key("Tab", 9)
        browser.key("ArrowRight", 39)
        assert browser.ask("document.activeElement === document.querySelectorAll('.chunk')[1]")
    width, height, left, top = boxes(browser, "#tip")[0]
    assert width > 100
    assert height > 80
    text = browser.ask("document.getElementById('tip').innerText").replace("\N{MINUS SIGN}", "-")
    assert f"{chunk['teacher_logp']:.2f}" in text
    assert f"{chunk['student_logp']:.2f}" in text
    assert "×" in text
    assert " | ".join(chunk["student_tokens"]).replace(" ", "␣").replace("␣|␣", " | ") in text
    assert left >= 0
    assert top >= 0
    assert left + width <= 1200
    assert top + height <= 900
    browser.key("Escape", 27)
    assert boxes(browser, "#tip") == HIDDEN
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_fits_and_asks_for_nothing(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.ask("innerWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if url != "data:,"] == [page.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_schemes(browser: Browser, page: Path, scheme: str) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for shapes."""
    browser.open(page, 1200, scheme)
    text, shapes, paper = browser.ask(CONTRAST)
    assert (paper > 0.5) == (scheme == "light")
    assert text >= 4.5
    assert shapes >= 3
