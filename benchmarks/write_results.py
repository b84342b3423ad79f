"""Writes the first section of docs/results.md, between its marks, and docs/benchmarks/CLAIM.svg, from results.

python -m benchmarks.write_results [FOLDER]
"""

import sys
from pathlib import Path

from tokenkit.report.claim_tables import claim_markdown, plot_claim
from tokenkit.report.claims import read_claims

CLOSING = "# One by one\n"
ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURES = ROOT / "docs/results.md", ROOT / "docs/benchmarks"
BEGIN, END = "<!-- claims: written by benchmarks/write_results.py -->", "<!-- end of claims -->"
INTRODUCTION = """# Claims, side by side

`make bench` (see [benchmarks](benchmarks.md)) measures each claim and its peer in one run, in turn, on one thread,
and writes this section. *Times as good* is the peer's figure over ours where less is better and ours over the peer's
where more is, so above 1 tokenkit is ahead; in brackets the smallest and largest of the repeats. Seconds are left
out, because only their ratios mean something between machines. Sizes are small, so that all of it takes under half an
hour; the sections below have the larger runs.
"""


def write_results(folder: Path) -> None:
    """The section and its pictures; all else on the page stays as it is."""
    sections = []
    for claim in read_claims(folder):
        drawn = plot_claim(claim, PICTURES / f"{claim.claim}.svg")
        sections.append(claim_markdown(claim, f"benchmarks/{claim.claim}.svg" if drawn else None))
    written = "\n".join([BEGIN, "", INTRODUCTION, *sections, CLOSING, END])
    text = PAGE.read_text("utf-8")
    before, mark, rest = text.partition(BEGIN)
    if mark:
        _, end, after = rest.partition(END)
        if not end:
            sys.exit(f"{PAGE.name}: the mark {END!r} is missing")
    else:
        before, heading, after = text.partition("\n## ")  # behind what the page says of itself
        before, after = before + "\n", "\n" + heading + after
    PAGE.write_text(before + written + after, "utf-8")


if __name__ == "__main__":
    write_results(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks/results")
