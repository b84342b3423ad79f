"""The schema of report.json: every mistake is one line that names the file and the place."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokenkit.config import UserError
from tokenkit.report.content import read_report
from tokenkit.report.page import write_page

SMALLEST = {"title": "a", "version": "0"}
BAR = {"group": "g", "label": "l", "kind": "alm", "bits_per_byte": 1.5}


def test_the_example_is_read_whole(example: Path) -> None:
    report = read_report(example)
    written = json.loads((example / "report.json").read_text("utf-8"))
    assert json.loads(report.model_dump_json()) == written


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"colour": "red"}, "colour: unknown key"),
        ({"bars": [BAR | {"kind": "zeroshot"}]}, "bars.0.kind"),
        ({"bars": [BAR | {"bits_per_byte": 0}]}, "bars.0.bits_per_byte"),
        ({"bars": [BAR | {"bits_per_byte": float("nan")}]}, "bars.0.bits_per_byte"),
        ({"bars": [BAR | {"sd": -1}]}, "bars.0.sd"),
        ({"bars": [{"group": "g"}]}, "bars.0.label: missing"),
        ({"bars": "x" * 5000}, "bars"),
        ({"curves": [{"label": "l", "kind": "alm", "metrics": "../x.jsonl"}]}, "outside the run folder"),
        ({"curves": [{"label": "l", "kind": "alm", "metrics": "/x.jsonl"}]}, "outside the run folder"),
        ({"curves": [{"label": "l", "kind": "alm", "metrics": "none.jsonl"}]}, "none.jsonl"),
        ({"title": 3}, "title"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, change: dict[str, Any], place: str) -> None:
    (tmp_path / "report.json").write_text(json.dumps(SMALLEST | change), "utf-8")
    with pytest.raises(UserError) as error:
        write_page(tmp_path)
    assert place in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"title": "a"', b"[]", b"3", b"\xff\xfe"])
def test_a_missing_or_damaged_file_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UserError, match=r"report\.json: [^\n]+$"):
        read_report(tmp_path)
