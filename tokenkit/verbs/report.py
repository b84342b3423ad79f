"""`tokenkit report`: the page of a run folder, written again from what it holds; or one page of several runs."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from tokenkit.config import Config, UserError, build, load, override
from tokenkit.report.comparison import write_comparison
from tokenkit.report.content import REPORT
from tokenkit.report.page import PAGE, write_page
from tokenkit.report.runs import read_runs

COMPARISON = Path("comparison.html")


class ReportRun(Config):
    """A run file of `tokenkit report`."""

    run: Path | None = None
    """The folder of a finished run."""
    runs: list[Path] = []
    """Instead of one several, for a page that compares them; a sweep's folder stands for its finished runs."""
    output: Path | None = None
    """The page to write; null: `report.html` in the folder of the run, or of several `comparison.html` here."""

    @model_validator(mode="after")
    def _one_or_several(self) -> "ReportRun":
        if (self.run is None) == (not self.runs):
            given = "both are given" if self.runs else "neither is given"
            raise UserError(f"run: a folder here or several in runs, and {given}; write tokenkit report FOLDER ...")
        if self.output is not None and self.output.is_dir():
            raise UserError(f"output: {self.output}, a folder; write the name of a page, such as {COMPARISON}")
        return self


def load_report(words: list[str]) -> ReportRun:
    """The run of `tokenkit report A B ...`, of a run file, or of key=value."""
    folders = [word for word in words if _is_folder(word)]
    if not folders:
        return load(ReportRun, words)
    values: dict[str, Any] = {"run": folders[0]} if len(folders) == 1 else {"runs": folders}
    for word in words:
        if word not in folders:
            override(values, word)
    return build(ReportRun, values)


def _is_folder(word: str) -> bool:
    """Whether a word names a folder: it is one, or it can be nothing else."""
    return Path(word).is_dir() or ("=" not in word and not word.endswith((".yaml", ".yml")))


def report(run: ReportRun) -> Path:
    """Writes the page; where it is."""
    folders = [run.run] if run.run is not None else run.runs
    if len(folders) == 1:
        if (folders[0] / REPORT).is_file():
            return write_page(folders[0], run.output)
        return write_comparison(read_runs(folders), run.output or folders[0] / PAGE)
    return write_comparison(read_runs(folders), run.output or COMPARISON)
