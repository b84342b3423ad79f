"""`tokenkit bench`: the results of the benchmarks as a table, or two sets of them against each other."""

from pathlib import Path
from typing import Any

from tokenkit.config import Config
from tokenkit.report.claims import changed_orderings, read_claims


class BenchRun(Config):
    """A run file of `tokenkit bench`."""

    folder: Path = Path("benchmarks/results")
    """What `make bench` filled: one JSON file for each claim."""
    against: Path | None = None
    """Another such folder, older or of another machine: is every ordering there the same?"""


def bench(run: BenchRun) -> dict[str, Any]:
    """The claims; with `against` also the orderings that differ, those of one folder alone, and how many are equal."""
    claims = read_claims(run.folder)
    found: dict[str, Any] = {"claims": claims}
    if run.against is not None:
        changed, alone, same = changed_orderings(read_claims(run.against), claims)
        found |= {"changed": changed, "alone": alone, "same": same}
    return found
