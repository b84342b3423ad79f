"""One self-contained HTML page per run folder, made from its data alone."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2

from tokenkit.report.aligned import FULL_COLOUR, ShownChunk, shown, summary, visible
from tokenkit.report.content import Aligned, Report, read_report
from tokenkit.report.curves import panels
from tokenkit.report.tables import gap_sentence, grouped
from tokenkit.tokenizers.whole_file import write_whole

PAGE = "report.html"
JOINER = "\N{ZERO WIDTH JOINER}"  # without it a family of emoji falls apart
Shown = tuple[Aligned, str, list[ShownChunk]]


@cache  # compiling them takes longer than filling them in
def page_templates() -> jinja2.Environment:
    """What renders the pages of this folder: everything escaped, nothing undefined."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["visible"] = partial(visible, keep=JOINER)
    templates.filters["readable"] = partial(visible, keep="\n\t" + JOINER)
    return templates


def write_html(path: Path, template: str, **values: Any) -> None:
    """The rendered template at `path`, replaced whole or not at all."""
    text = page_templates().get_template(template).render(values)
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def write_page(folder: Path, output: Path | None = None) -> Path:
    """`folder/report.html`, or `output`, from `folder/report.json` and the metrics it names."""
    report = read_report(folder)
    page = output or folder / PAGE
    write_html(page, "page.html.jinja", **page_values(folder, report))
    return page


def page_values(folder: Path, report: Report) -> dict[str, Any]:
    """What the page of one report shows."""
    return {
        "report": report,
        "version": report.version,
        "groups": grouped(report.bars),
        "longest": max((bar.bits_per_byte + (bar.sd or 0.0) for bar in report.bars), default=1.0),
        "panels": panels(folder, report.curves),
        "texts": [shown_text(text) for text in report.aligned],
        "gap_sentence": gap_sentence,
        "full_colour": FULL_COLOUR,
    }


def shown_text(text: Aligned) -> Shown:
    """A text in both tokenisations, a sentence on it, and its boxes."""
    return text, summary(text.chunks), [shown(chunk) for chunk in text.chunks]
