"""The written page: every number is there, every text is escaped, nothing points outside."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tokenkit.config import UserError
from tokenkit.report import aligned
from tokenkit.report.content import Chunk
from tokenkit.report.page import write_page

EVIL = "\"'><script>alert(1)</script></style></title></pre>&amp;{{ 7 * 7 }}\ud83d"  # ends in half a pair


class Outline(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def poisoned(value: Any, key: str = "") -> Any:
    """The same report with EVIL in every string that is shown."""
    if isinstance(value, dict):
        return {name: poisoned(child, name) for name, child in value.items()}
    if isinstance(value, list):
        return [poisoned(child, key) for child in value]
    return EVIL if isinstance(value, str) and key not in ("kind", "metrics") else value


def test_every_number_is_on_the_page(example: Path) -> None:
    page = write_page(example)
    outline = Outline(page.read_text("utf-8"))
    report = json.loads((example / "report.json").read_text("utf-8"))
    for bar in report["bars"]:
        assert f"{bar['bits_per_byte']:.3f}" in outline.text
    chunks = [attrs for _, attrs in outline.elements if (attrs.get("class") or "").startswith("chunk ")]
    assert len(chunks) == 150
    for attrs, chunk in zip(chunks, report["aligned"][0]["chunks"]):
        for value in (chunk["teacher_logp"], chunk["student_logp"]):
            assert (aligned.number(value) if value is not None else "not scored") in (attrs["title"] or "")
    assert "ALM closes 94 % of the gap" in outline.text
    assert report["run"].strip() in outline.text
    assert [path.name for path in example.glob(".report*")] == []
    longest = max(len(path) for path in re.findall(r' d="M([^"]*)"', page.read_text("utf-8")))
    assert longest <= 600 * len("508.0,262.0 ")


def test_every_string_is_escaped(example: Path, tmp_path: Path) -> None:
    content = poisoned(json.loads((example / "report.json").read_text("utf-8")))
    for curve in content["curves"]:
        curve["metrics"] = "metrics.jsonl"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n', "utf-8")
    (tmp_path / "report.json").write_text(json.dumps(content), "utf-8")
    text = write_page(tmp_path).read_text("utf-8")
    clean = write_page(example).read_text("utf-8")
    assert "<script>alert" not in text
    assert text.count("<script") == clean.count("<script") == 1
    assert text.count("</style>") == clean.count("</style>") == 1
    outline = Outline(text)
    assert outline.text.count(EVIL.replace("\ud83d", r"\ud83d")) > 20
    assert not any(name.startswith("on") for _, attrs in outline.elements for name in attrs)


def test_nothing_points_outside(example: Path) -> None:
    text = write_page(example).read_text("utf-8")
    targets = [a.get("src") or a.get("href") for _, a in Outline(text).elements if "src" in a or "href" in a]
    assert targets == ["data:,"]
    assert not re.search(r"https?:|@import|url\(", text)


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"title": "nothing yet", "version": "0"}', "utf-8")
    outline = Outline(write_page(tmp_path).read_text("utf-8"))
    assert [tag for tag, _ in outline.elements if tag in ("section", "h2")] == []


def test_the_old_page_survives_a_failure(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"title": "first", "version": "0"}', "utf-8")
    page = write_page(tmp_path)
    before = page.read_bytes()
    (tmp_path / "report.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match="damaged"):
        write_page(tmp_path)
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a b\n", "a␣b\\n"),
        ("\tx\x00", "\\tx\\x00"),
        ("\u202eevil", "\\u202eevil"),
        ("\\xe2\\x82", "\\xe2\\x82"),
        ("東京🎉é", "東京🎉é"),
    ],
)
def test_invisible_characters_are_escapes(text: str, seen: str) -> None:
    assert aligned.token(text) == seen


@pytest.mark.parametrize(
    ("teacher", "student", "side", "mix"),
    [(-1.0, -1.0, "worse", 0), (-1.0, -2.5, "worse", 50), (-9.0, -1.0, "better", 100), (None, -1.0, "none", 0)],
)
def test_colour_follows_the_difference(teacher: float | None, student: float, side: str, mix: int) -> None:
    chunk = Chunk(text="a", teacher_tokens=("a",), student_tokens=("a",), teacher_logp=teacher, student_logp=student)
    seen = aligned.shown(chunk)
    assert (seen.side, seen.mix) == (side, mix)


def test_the_ratio_is_that_of_the_probabilities() -> None:
    chunk = Chunk(text="a", teacher_tokens=(), student_tokens=("a",), teacher_logp=-2.0, student_logp=-1.0)
    assert "student / teacher: ×2.72" in aligned.shown(chunk).tip
    far = chunk.model_copy(update={"teacher_logp": -5000.0})
    assert "×1.01e+304" in aligned.shown(far).tip
