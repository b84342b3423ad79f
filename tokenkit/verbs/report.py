"""`tokenkit report`: the page of a run folder, written again from its report.json and metrics."""

from pathlib import Path

from tokenkit.config import Config


class ReportRun(Config):
    """A run file of `tokenkit report`."""

    run: Path
    """The folder of a finished run."""
