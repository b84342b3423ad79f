"""Runs the notebooks, each in a fresh kernel and an empty folder, and writes them with what came out.

`python scripts/run_notebooks.py [NOTEBOOK ...]` writes; with `--check` it says which text or number became another and
writes nothing. What Jupyter notes of time, version and kernel is left out, so a second run gives the same file.
"""

import argparse
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
VARIES = "varies"  # tag of a cell whose numbers depend on a machine's arithmetic
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
QUIET = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
LINK = re.compile(r"\]\(([^)#]+)")
NUMBER = re.compile(r"[-−]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
RELATIVE, ABSOLUTE = 2e-3, 2e-4


def all_notebooks() -> list[Path]:
    """The notebooks of the project, in order."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def executed(path: Path, folder: Path, timeout: int = 600) -> NotebookNode:
    """A notebook with what a fresh kernel in `folder` makes of it; nbclient's error where a cell fails."""
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")  # the folders that Jupyter will use without being told
    import matplotlib.font_manager  # noqa: F401 (its cache is made here, so that no cell tells of it)
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        startup_timeout=timeout,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(folder)}},
        allow_errors=False,
        extra_arguments=["--log-level=ERROR"],  # it warns that ports of the loopback device are not encrypted
    )
    client.execute(env={**os.environ, **QUIET, "IPYTHONDIR": str(folder / ".ipython")})
    return cleaned(notebook)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook, in place, without anything that differs from run to run."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return notebook


def written(notebook: NotebookNode) -> str:
    """The text of a notebook's file."""
    return nbformat.writes(notebook) + "\n"


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs of a cell: what was printed in several pieces is one, and a picture is a picture only."""
    found: list[NotebookNode] = []
    for output in outputs:
        last = found[-1] if found else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.text += output.text
            continue
        if "image/png" in output.get("data", {}):
            output.data.pop("text/plain", None)
            output.metadata = nbformat.from_dict({})
        found.append(output)
    return found


def complaints(notebook: NotebookNode) -> list[str]:
    """What cells wrote to standard error."""
    cells = enumerate(notebook.cells)
    written = [(n, out.text) for n, cell in cells for out in cell.get("outputs", []) if out.get("name") == "stderr"]
    return [f"cell {number}: {text.strip()}" for number, text in written]


def differences(before: NotebookNode, after: NotebookNode) -> list[str]:
    """Where two runs of a notebook say something else: texts differ, or numbers by more than rounding."""
    found = []
    for number, (old, new) in enumerate(zip(before.cells, after.cells, strict=True)):
        if VARIES in old.metadata.get("tags", []):
            continue
        for one, other in zip(_said(old), _said(new), strict=False):
            if not same_text(one, other):
                found.append(f"cell {number}: {one.strip()!r} became {other.strip()!r}")
        if len([*_said(old)]) != len([*_said(new)]):
            found.append(f"cell {number}: {len([*_said(old)])} outputs became {len([*_said(new)])}")
    return found


def _said(cell: NotebookNode) -> Iterator[str]:
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.text
        elif "image/png" in output.get("data", {}):
            yield "a picture"
        else:
            yield output.data.get("text/html") or output.data.get("text/plain", "")


def same_text(one: str, other: str) -> bool:
    """Whether two texts are the same but for the rounding of numbers."""
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other))
    return all(math.isclose(_value(a), _value(b), rel_tol=RELATIVE, abs_tol=ABSOLUTE) for a, b in pairs)


def _value(written: str) -> float:
    return float(written.replace(",", "").replace("−", "-"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of the folder notebooks, if none is named")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something differs")
    arguments = parser.parse_args()
    wrong = 0
    for path in arguments.notebooks or all_notebooks():
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        told = complaints(notebook)
        if arguments.check:
            told += differences(nbformat.read(path, as_version=4), notebook)
        else:
            path.write_text(written(notebook), "utf-8")
        print("\n".join([f"{path.name}: {'as before' if arguments.check and not told else 'ran'}", *told]))
        wrong += bool(told)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
