"""The notebooks run in a fresh kernel, say nothing on standard error, and say what the committed ones say."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("run_notebooks", ROOT / "scripts" / "run_notebooks.py")
runner = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(runner)
NOTEBOOKS = runner.all_notebooks()
LARGEST = 300_000  # bytes of a file


def test_the_three_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["alm_from_scratch", "learned_tokenizer", "pair"]
    page = (ROOT / "docs" / "notebooks.md").read_text("utf-8")
    assert all(path.name in page for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_says_the_same(path, tmp_path):
    notebook = runner.executed(path, tmp_path)
    assert runner.complaints(notebook) == []
    assert runner.differences(nbformat.read(path, as_version=4), notebook) == [], "run make notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_file_is_clean(path):
    """As the script writes it: valid, small, without traces of a machine; every claim is asserted in the cells."""
    text = path.read_text("utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert runner.written(runner.cleaned(nbformat.reads(text, as_version=4))) == text, "run make notebooks"
    assert len(text.encode()) < LARGEST
    assert not any(trace in text for trace in (str(ROOT), str(Path.home()) + "/", "/tmp/"))
    assert runner.complaints(notebook) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert sum("assert" in cell.source for cell in code) >= len(code) // 2
    for cell in notebook.cells:
        for target in runner.LINK.findall(cell.source if cell.cell_type == "markdown" else ""):
            assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("loss 0.12345, 7 units", "loss 0.12346, 7 units", True),
        ("loss 0.12345, 7 units", "loss 0.12945, 7 units", False),
        ("loss 0.12345, 7 units", "loss 0.12345, 8 units", False),
        ("loss 0.12345, 7 units", "mean 0.12345, 7 units", False),
        ("1,024 rows", "1,024 rows", True),
        ("1,024 rows", "1,124 rows", False),
        ("−3.0", "3.0", False),
    ],
)
def test_rounding_is_no_difference_and_other_numbers_are(one, other, same):
    assert runner.same_text(one, other) is same


def test_a_changed_output_is_told():
    path = NOTEBOOKS[0]
    before, after = (nbformat.read(path, as_version=4) for _ in range(2))
    assert runner.differences(before, after) == []
    cell = next(cell for cell in after.cells if any(out.output_type == "stream" for out in cell.get("outputs", [])))
    cell.outputs[0].text = "another\n"
    assert len(runner.differences(before, after)) == 1
    cell.outputs = []
    assert any("outputs became" in one for one in runner.differences(before, after))


def test_what_a_cell_complains_about_is_told(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import sys\nprint('no', file=sys.stderr)")])
    path = tmp_path / "complains.ipynb"
    nbformat.write(notebook, path)
    assert runner.complaints(runner.executed(path, tmp_path)) == ["cell 0: no"]
