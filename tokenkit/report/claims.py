"""What a benchmark found, side by side with its peer: one closed form for all, so that two runs can be compared."""

import datetime
import importlib.metadata
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from tokenkit.config import Config, UserError

CLAIMS = {
    "alignment": "Alignment: throughput and correctness",
    "transplant": "Zero-shot transfer beside a transplant",
    "losses": "Objectives at equal steps and in equal time",
    "training": "Training throughput and memory",
    "memory": "Losses over a vocabulary of 150 thousand",
    "learned_tokenizer": "A learned tokenizer beside BPE and words",
    "ternary": "Ternary beside float in llama.cpp",
    "evaluation": "Evaluation beside lm-evaluation-harness's own class",
}

NOISE = 0.01  # of a ratio: what two runs of one seed or of one allocator may differ by


class Machine(Config):
    """The class of machine; no name of it and no path."""

    processor: str
    cores: int
    memory_gib: int
    accelerator: str = "none"


class Ratio(Config):
    """How many times as good ours is as the peer: above 1, ours is better. Median and extremes of the repeats."""

    median: float = Field(gt=0)
    min: float = Field(gt=0)
    max: float = Field(gt=0)


class Row(Config):
    """One thing measured on both sides in one run."""

    what: str
    """Ours; with the peer's name it is unique in a claim and in one unit."""
    beside: str
    """What it is measured against."""
    unit: str
    better: Literal["less", "more", "equal"] = "less"
    """equal: the two figures ought to agree, and neither is ahead."""
    ours: float | None = None
    """The median of the repeats."""
    peer: float | None = None
    """The same of the peer; None where it is absent, and `note` says why."""
    ratio: Ratio | None = None
    repeats: int = Field(1, ge=0)
    note: str = ""


class Ordering(Config):
    """A statement that a second run should repeat: `first` is ahead of `second` by `by`, so many times."""

    first: str
    second: str
    by: str
    ratio: float = Field(ge=1)
    decided: bool
    """Whether every repeat said so, by more than a hundredth; otherwise the two are even."""

    @property
    def pair(self) -> tuple[str, str, str]:
        """What is ordered, whoever is first."""
        one, other = sorted((self.first, self.second))
        return one, other, self.by

    def __str__(self) -> str:
        verb = "before" if self.decided else "even with, a little before,"
        return f"{self.first} {verb} {self.second} by {self.by}, {self.ratio:.3g} times"


class Claim(Config):
    """What one benchmark found: `benchmarks/results/CLAIM.json`."""

    claim: str
    title: str
    sentence: str
    """What the figures say, in one sentence."""
    command: str
    machine: Machine
    date: datetime.date
    versions: dict[str, str]
    """Of torch, transformers and the peer; `absent: why` for one that was not there."""
    rows: list[Row]
    orderings: list[Ordering]


def spread(ours: Sequence[float], peer: Sequence[float], better: str = "less") -> Ratio:
    """The ratio of the medians, and the extremes of the ratios of repeats that ran one after the other."""
    above, below = (peer, ours) if better == "less" else (ours, peer)
    each = [a / b for a, b in zip(above, below, strict=True)]
    middle = statistics.median(above) / statistics.median(below)
    return Ratio(median=_short(middle), min=_short(min([*each, middle])), max=_short(max([*each, middle])))


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def measured(
    what: str,
    beside: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    better: Literal["less", "more", "equal"] = "less",
    note: str = "",
) -> Row:
    """A row of interleaved repeats: medians, and where one side ought to be ahead the ratio with its spread."""
    return Row(
        what=what,
        beside=beside,
        unit=unit,
        better=better,
        ours=_short(statistics.median(ours)),
        peer=_short(statistics.median(peer)),
        ratio=None if better == "equal" else spread(ours, peer, better),
        repeats=len(ours),
        note=note,
    )


def absent(what: str, beside: str, unit: str, why: str, ours: Sequence[float] = ()) -> Row:
    """A row whose peer is not there; what ours takes stands alone."""
    own = _short(statistics.median(ours)) if ours else None
    return Row(what=what, beside=beside, unit=unit, ours=own, repeats=len(ours), note=f"absent: {why}")


def orderings_of(rows: Sequence[Row]) -> list[Ordering]:
    """Who is ahead in every row that has a ratio."""
    found = []
    for row in rows:
        if row.ratio is None:
            continue
        ahead = row.ratio.median >= 1
        first, second = (row.what, row.beside) if ahead else (row.beside, row.what)
        decided = row.ratio.min > 1 + NOISE or row.ratio.max < 1 - NOISE
        ratio = row.ratio.median if ahead else _short(1 / row.ratio.median)
        found.append(Ordering(first=first, second=second, by=row.unit, ratio=ratio, decided=decided))
    return found


def make_claim(claim: str, sentence: str, command: str, rows: Sequence[Row], peers: dict[str, str]) -> Claim:
    """The whole, with machine, date and versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")} | peers
    return Claim(
        claim=claim,
        title=CLAIMS[claim],
        sentence=sentence,
        command=command,
        machine=machine_class(),
        date=datetime.datetime.now(datetime.UTC).date(),
        versions=versions,
        rows=list(rows),
        orderings=orderings_of(rows),
    )


def save_claim(path: Path, claim: Claim) -> None:
    """Writes it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")
    text = json.dumps(claim.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False, indent=1)
    half.write_text(text + "\n", "utf-8")
    half.replace(path)


def read_claims(folder: Path) -> list[Claim]:
    """All of a folder, in the order of CLAIMS. UserError where there is none, or one that is no result."""
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not paths:
        raise UserError(
            f"{folder} holds no results; run `make bench` in a checkout of the repository, or write the folder "
            "that it filled"
        )
    found = []
    for path in paths:
        try:
            found.append(Claim.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(f"{path}: {place}: {first['msg']}; write one with `make bench`") from None
    order = list(CLAIMS)
    return sorted(found, key=lambda one: order.index(one.claim) if one.claim in order else len(order))


def machine_class() -> Machine:
    """The processor, cores and memory of this machine."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        text = ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processor = name[1].strip() if name else os.uname().machine
    return Machine(processor=processor, cores=os.cpu_count() or 1, memory_gib=round(memory / 2**30))


def changed_orderings(first: Sequence[Claim], second: Sequence[Claim]) -> tuple[list[str], list[str], int]:
    """A line per ordering that the two say otherwise, a line per one that only one of them has; how many are the same.

    Two runs contradict each other where another side is ahead and at least one of them was sure of it; where neither
    is, both say that the two are even.
    """
    before, after = ({(c.claim, o.pair): o for c in claims for o in c.orderings} for claims in (first, second))
    changed, alone, same = [], [], 0
    for key in dict.fromkeys([*before, *after]):
        one, other = before.get(key), after.get(key)
        if one is None or other is None:
            where = "the second" if one is None else "the first"
            alone.append(f"{key[0]}: only {where} has: {one or other}")
        elif one.first != other.first and (one.decided or other.decided):
            changed.append(f"{key[0]}: {one}; now {other}")
        else:
            same += 1
    return changed, alone, same


def own_command() -> str:
    """How the running program was started, without the file that gets its results."""
    name, words = Path(sys.argv[0]).stem, sys.argv[1:]
    if "--json" in words:
        place = words.index("--json")
        del words[place : place + 2]
    module = sys.modules["__main__"].__spec__ is not None
    return shlex.join(["python", *(["-m", f"benchmarks.{name}"] if module else [f"benchmarks/{name}.py"]), *words])
