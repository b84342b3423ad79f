"""One self-contained HTML page per run folder, made from its data alone."""

import os
from functools import partial
from pathlib import Path

import jinja2

from tokenkit.report.aligned import FULL_COLOUR, shown, summary, visible
from tokenkit.report.content import read_report
from tokenkit.report.curves import panels
from tokenkit.report.tables import gap_sentence, grouped


def page_templates() -> jinja2.Environment:
    """What renders the pages of this folder: everything escaped, nothing undefined."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(folder: Path) -> Path:
    """`folder/report.html`, from `folder/report.json` and the metrics it names; replaced whole or not at all."""
    report = read_report(folder)
    templates = page_templates()
    templates.filters["readable"] = partial(visible, keep="\n\t\N{ZERO WIDTH JOINER}")
    text = templates.get_template("page.html.jinja").render(
        report=report,
        groups=grouped(report.bars),
        longest=max((bar.bits_per_byte + (bar.sd or 0.0) for bar in report.bars), default=1.0),
        panels=panels(folder, report.curves),
        texts=[(text, summary(text.chunks), [shown(chunk) for chunk in text.chunks]) for text in report.aligned],
        gap_sentence=gap_sentence,
        full_colour=FULL_COLOUR,
    )
    page, part = folder / "report.html", folder / f".report.html.{os.getpid()}"
    part.write_text(text, "utf-8", errors="backslashreplace")
    part.replace(page)
    return page
