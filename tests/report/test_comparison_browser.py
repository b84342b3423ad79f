"""What headless Chromium draws of a page of several runs."""

from pathlib import Path

import pytest
from chromium import CONTRAST, STICKING_OUT, Browser, boxes

from tokenkit.report.comparison import write_comparison
from tokenkit.report.runs import read_runs

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def page(three_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(read_runs(three_runs), tmp_path_factory.mktemp("page") / "comparison.html")


def visible(browser: Browser, selector: str) -> int:
    """How many of the elements are drawn."""
    return sum(width > 0 for width, *_ in boxes(browser, selector))


def test_every_run_is_drawn_in_both_panels(browser: Browser, page: Path) -> None:
    browser.open(page, 1200)
    drawn = boxes(browser, "figure .curve")
    assert len(drawn) == 6
    assert all(width > 100 and height > 20 for width, height, *_ in drawn)
    assert browser.ask(STICKING_OUT) == []
    colours = browser.ask("[...document.querySelectorAll('figure .curve')].map(e => getComputedStyle(e).stroke)")
    assert len(set(colours)) == 3
    assert [width for width, *_ in boxes(browser, ".bar")] == sorted(width for width, *_ in boxes(browser, ".bar"))


@pytest.mark.parametrize("script", [True, False])
def test_the_legend_hides_a_curve_by_keyboard(browser: Browser, page: Path, tmp_path: Path, script: bool) -> None:
    """Also without scripts: boxes and style are enough."""
    if not script:
        whole = page.read_text("utf-8")
        page = tmp_path / "without.html"
        page.write_text(whole[: whole.index("<script>")] + whole[whole.index("</script>") :], "utf-8")
    browser.open(page, 1200)
    assert visible(browser, ".of1.curve") == 2
    browser.ask("document.getElementById('show1').focus()")
    browser.key(" ", 32)
    assert visible(browser, ".of1.curve") == 0
    assert visible(browser, ".of0.curve, .of2.curve") == 4
    browser.key(" ", 32)
    assert visible(browser, ".of1.curve") == 2


def test_one_aligned_text_at_a_time_and_all_on_paper(browser: Browser, page: Path) -> None:
    browser.open(page, 1200)
    assert [visible(browser, f".text{n} .chunk") for n in range(3)] == [60, 0, 0]
    browser.ask("document.getElementById('text0').focus()")
    browser.key("ArrowDown", 40)
    assert [visible(browser, f".text{n} .chunk") for n in range(3)] == [0, 60, 0]
    browser("Emulation.setEmulatedMedia", media="print")
    assert [visible(browser, f".text{n} .chunk") for n in range(3)] == [60, 60, 60]
    browser("Emulation.setEmulatedMedia", media="screen")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_fits_and_asks_for_nothing(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    beyond = browser.ask(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && "
        "!e.closest('.table')).length"
    )
    assert beyond == 0
    assert browser.complaints() == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if url != "data:,"] == [page.as_uri()]
    text, shapes, paper = browser.ask(CONTRAST)
    assert (paper > 0.5) == (scheme == "light")
    assert text >= 4.5  # WCAG 2.2 AA
    assert shapes >= 3


def test_a_narrow_table_names_every_figure(browser: Browser, page: Path) -> None:
    browser.open(page, 400)
    found = browser.ask("[...document.querySelectorAll('td')].map(e => getComputedStyle(e, '::before').content)")
    assert all(len(name) > 3 for name in found)
    roles = browser.ask("[...document.querySelectorAll('table')].map(e => e.getAttribute('role'))")
    assert set(roles) == {"table"}
