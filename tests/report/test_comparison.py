"""Several runs on one page: what is compared, what differs, what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run
from test_page import EVIL, Outline, poisoned

from tokenkit.config import UserError
from tokenkit.report.comparison import Runs, duration, write_comparison
from tokenkit.report.runs import distinct_names, read_runs, training_seconds
from tokenkit.verbs.report import ReportRun, load_report, report


def test_the_table_says_what_each_run_came_to(three_runs: list[Path]) -> None:
    runs = Runs(read_runs(three_runs))
    entry, cells = runs.rows()[0]
    assert entry.name == "unigram/alm"
    assert cells == {
        "target": "unigram",
        "objective": "alm",
        "steps": "100",
        "bytes read": "204,800",
        "bits per byte": "4.000 → 1.500",
        "gap closed": "83 %",
        "held-out text": "abababab",
        "training": "25 s",
    }
    assert [cells["gap closed"] for _, cells in runs.rows()] == ["83 %", "67 %", "50 %"]
    assert runs.best() == {"unigram/alm"}


def test_only_what_differs_in_the_run_files(three_runs: list[Path]) -> None:
    found = dict(Runs(read_runs(three_runs)).different())
    assert found == {"losses.alm": ["weight: 1.0", "weight: 1.0", "–"], "losses.clm": ["–", "–", "weight: 1.0"]}
    assert Runs(read_runs(three_runs[:2])).different() == []


def test_unequal_texts_are_flagged(three_runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "alm", 1.2, text="cd")
    page = write_comparison(read_runs([*three_runs, other]), tmp_path / "page.html").read_text("utf-8")
    assert "Not the same held-out text" in page
    assert "measured on 2 texts" in page
    assert Runs(read_runs([*three_runs, other])).best() == {"unigram/alm"}  # other is alone on its text
    same = write_comparison(read_runs(three_runs), tmp_path / "page.html").read_text("utf-8")
    assert "Not the same held-out text" not in same


def test_the_page_holds_curves_texts_samples_and_tasks(three_runs: list[Path], tmp_path: Path) -> None:
    text = write_comparison(read_runs(three_runs), tmp_path / "new" / "page.html").read_text("utf-8")
    outline = Outline(text)
    classes = [attrs.get("class") or "" for _, attrs in outline.elements]
    curves = [one for one in classes if one.startswith("curve ")]
    assert sorted(curves) == sorted(2 * [f"curve run{n} of{n} dash{n}" for n in range(3)])
    assert len([one for one in classes if one.startswith("chunk ")]) == 180
    inputs = [attrs["type"] for tag, attrs in outline.elements if tag == "input"]
    assert inputs == ["checkbox"] * 3 + ["radio"] * 3
    assert outline.text.count("keeper of it") == 1  # all teachers say it
    assert "alm · unigram/alm, bytes/alm" in outline.text
    assert "0.15" in outline.text
    targets = [a.get("src") or a.get("href") for _, a in outline.elements if "src" in a or "href" in a]
    assert targets == ["data:,"]
    assert not re.search(r"https?:|@import|url\(", text)


def test_every_string_is_escaped(three_runs: list[Path], tmp_path: Path) -> None:
    for folder in three_runs:
        evil = tmp_path / folder.parent.name / folder.name
        evil.mkdir(parents=True)
        for name in ("run.yaml", "metrics.jsonl", "results.json"):
            (evil / name).write_bytes((folder / name).read_bytes())
        content: Any = poisoned(json.loads((folder / "report.json").read_text("utf-8")))
        (evil / "report.json").write_text(json.dumps(content), "utf-8")
        (evil / "provenance.json").write_text(
            json.dumps({"verb": EVIL, "made_with": [{"device": EVIL, "version": "1"}]})
        )
    folders = [tmp_path / folder.parent.name / folder.name for folder in three_runs]
    text = write_comparison(read_runs(folders), tmp_path / "page.html").read_text("utf-8")
    assert "<script>alert" not in text
    assert text.count("<script") == text.count("</style>") == 1


def test_a_run_without_a_page_is_compared_by_its_results(three_runs: list[Path], tmp_path: Path) -> None:
    plain = tmp_path / "small"
    plain.mkdir()
    (plain / "results.json").write_text('{"bits_per_byte": 3.25, "steps": 7, "bytes": 99, "parameters": 1234}')
    (plain / "run.yaml").write_text("eval: {source: {path: held.txt}}\n")
    (plain / "provenance.json").write_text('{"verb": "pretrain", "data": {}}')
    page = report(ReportRun(runs=[plain, three_runs[0]], output=tmp_path / "page.html"))
    outline = Outline(page.read_text("utf-8"))
    for seen in ("pretrain", "3.250", "1,234", "no digest"):
        assert seen in outline.text
    assert report(ReportRun(run=plain)) == plain / "report.html"


def test_a_sweep_stands_for_its_finished_runs(three_runs: list[Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name, "alm", 1.5)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "results.json").write_text("{}")
    assert [run.name for run in read_runs([tmp_path])] == ["a", "b"]
    staged = tmp_path / "staged"
    write_run(staged / "first", "alm", 1.5)
    (staged / "results.json").write_text('{"stages": {"first": {}}}')
    assert [run.folder for run in read_runs([staged])] == [staged / "first"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "no results.json inside"),
        ({"run.yaml": "a: 1"}, "not finished; continue it with --resume"),
        ({"results.json": "{"}, "cannot be read"),
        ({"results.json": "[]"}, "an object is expected"),
        ({"report.json": "{"}, "damaged"),
    ],
)
def test_what_is_no_run_is_one_line(
    three_runs: list[Path], tmp_path: Path, files: dict[str, str] | None, message: str
) -> None:
    bad, page = tmp_path / "bad", tmp_path / "page.html"
    for name, content in (files or {}).items():
        bad.mkdir(exist_ok=True)
        (bad / name).write_text(content)
    if files == {}:
        bad.mkdir()
    with pytest.raises(UserError, match=message) as caught:
        report(ReportRun(runs=[three_runs[0], bad], output=page))
    assert "\n" not in str(caught.value)
    assert str(bad) in str(caught.value)
    assert not page.exists()


def test_a_folder_named_twice_is_refused(three_runs: list[Path]) -> None:
    with pytest.raises(UserError, match="named twice"):
        read_runs([three_runs[0], three_runs[0] / ".." / "alm"])


def test_no_other_file_is_replaced(three_runs: list[Path], tmp_path: Path) -> None:
    notes = tmp_path / "notes.html"
    notes.write_text("mine")
    with pytest.raises(UserError, match="something else than a page"):
        report(ReportRun(runs=three_runs, output=notes))
    assert notes.read_text() == "mine"
    with pytest.raises(UserError, match=r"output: .*, a folder"):
        ReportRun(runs=three_runs, output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.html"]


def test_words_name_one_run_or_several(three_runs: list[Path], tmp_path: Path) -> None:
    first, second, _ = map(str, three_runs)
    assert load_report([first]) == ReportRun(run=Path(first))
    assert load_report([f"run={first}"]) == ReportRun(run=Path(first))
    assert load_report([first, second, "output=p.html"]) == ReportRun(
        runs=[Path(first), Path(second)], output=Path("p.html")
    )
    file = tmp_path / "report.yaml"
    file.write_text(f"runs: [{first}, {second}]\noutput: p.html\n")
    assert load_report([str(file)]) == load_report([first, second, "output=p.html"])
    with pytest.raises(UserError, match="neither is given"):
        load_report([])
    with pytest.raises(UserError, match="both are given"):
        load_report([first, second, f"run={first}"])


def test_names_are_as_short_as_they_can_be() -> None:
    assert distinct_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert distinct_names([Path("/a/u/x"), Path("/a/v/x")]) == ["u/x", "v/x"]


def test_time_is_summed_over_steps() -> None:
    assert training_seconds([(10.0, 0.5), (30.0, 0.25)]) == 10.0
    assert [duration(s) for s in (99.6, 150.0, 7300.0)] == ["100 s", "2 min", "2 h 2 min"]
