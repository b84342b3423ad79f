"""`tokenkit bench`, and the section of docs/results.md that its results become."""

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenkit.cli import app
from tokenkit.config import UserError
from tokenkit.report.claims import CLAIMS, make_claim, measured, read_claims, save_claim

ROOT = Path(__file__).parents[2]


def results(folder, ours, peer):
    rows = [measured("align", "TRL", "CPU seconds", ours, peer)]
    save_claim(folder / "alignment.json", make_claim("alignment", "One.", "python x.py", rows, {"trl": "1.16.0"}))
    return folder


def call(*words):
    return CliRunner().invoke(app, ["bench", *words])


def test_table_and_json(tmp_path):
    folder = results(tmp_path, [1.0, 1.0], [2.0, 2.2])
    shown = call(f"folder={folder}")
    assert shown.exit_code == 0
    assert "Alignment: throughput and correctness" in shown.output
    assert json.loads(call(f"folder={folder}", "--json").output)["claims"][0]["rows"][0]["ratio"]["median"] == 2.1


def test_against_a_second_run(tmp_path):
    first, second = results(tmp_path / "a", [1.0, 1.0], [2.0, 2.2]), results(tmp_path / "b", [1.0, 1.0], [1.5, 1.6])
    same = call(f"folder={first}", f"against={second}")
    assert (same.exit_code, same.output.splitlines()[-1]) == (0, "1 orderings are the same, none changed")
    other = call(f"folder={first}", f"against={results(tmp_path / 'c', [2.0, 2.0], [1.0, 1.1])}")
    assert other.exit_code == 1
    assert other.output.startswith(
        "changed: alignment: TRL before align by CPU seconds, 1.9 times; now align before TRL"
    )


def test_without_results_it_is_one_line(tmp_path):
    found = call(f"folder={tmp_path / 'none'}")
    assert isinstance(found.exception, UserError)
    assert "run `make bench`" in str(found.exception)


def test_the_committed_results_are_the_page_s(tmp_path, monkeypatch):
    """No claim is unknown, and writing the section again changes nothing."""
    folder = ROOT / "benchmarks/results"
    names = [claim.claim for claim in read_claims(folder)]
    assert names == list(CLAIMS)
    spec = importlib.util.spec_from_file_location("write_results", ROOT / "benchmarks/write_results.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    page = tmp_path / "results.md"
    text = (ROOT / "docs/results.md").read_text("utf-8")
    page.write_text(text, "utf-8")
    monkeypatch.setattr(writer, "PAGE", page)
    monkeypatch.setattr(writer, "PICTURES", tmp_path)
    writer.write_results(folder)
    assert page.read_text("utf-8") == text
    for picture in tmp_path.glob("*.svg"):
        assert (ROOT / "docs/benchmarks" / picture.name).stat().st_size < 60_000
    page.write_text(text.replace(writer.END, ""), "utf-8")
    with pytest.raises(SystemExit, match="is missing"):
        writer.write_results(folder)
