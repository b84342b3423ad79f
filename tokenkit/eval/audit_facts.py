"""What an audit says: findings in sentences with their numbers, and the rows that they speak of."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray
from pydantic import Field

from tokenkit.align.doctor_facts import Finding, Number
from tokenkit.align.show import readable
from tokenkit.config import Config
from tokenkit.eval.row_facts import IdKinds

EXAMPLES = 3  # tokens that a sentence names
KEPT = 1000  # rows of one finding that are listed in the JSON


class AuditOptions(Config):
    """From where on something is worth a word."""

    outlier: float = Field(8.0, gt=0)
    """Deviations from the median of ordinary tokens, for norms and logits."""
    cosine: float = Field(0.999, gt=0, lt=1)
    """From here on two rows count as nearly the same."""
    first: int = Field(10, ge=1)
    """A token that is never among so many most likely ones is never predicted."""
    wins: float = Field(0.01, gt=0, le=1)
    """A new row that wins this share of contexts, and hardly any in the donor, may have been planted."""


@dataclass(frozen=True, slots=True)
class Flagged:
    """A row that a finding speaks of, with the value that it is there for."""

    topic: str
    matrix: str
    id: int
    token: str
    value: float | None
    """None where it is not finite."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one question found: sentences, and the rows behind them."""

    findings: tuple[Finding, ...] = ()
    rows: tuple[Flagged, ...] = ()

    def __add__(self, other: "Part") -> "Part":
        return Part(self.findings + other.findings, self.rows + other.rows)


@dataclass(frozen=True)
class Audit:
    """Everything found of a model, in the order of a reader's questions."""

    name: str
    facts: dict[str, Number]
    part: Part
    breakers: tuple[dict[str, Any], ...] = ()
    """The most suspicious new rows of each matrix, worst first."""
    override: dict[str, str] | None = None
    """Target tokens to make of their own pieces instead: `transfer.override`."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The sentences."""
        return self.part.findings

    def finding(self, topic: str) -> Finding:
        """The finding of one topic."""
        return next(finding for finding in self.findings if finding.topic == topic)

    def flagged(self, topic: str) -> list[Flagged]:
        """The rows of one topic."""
        return [row for row in self.part.rows if row.topic == topic]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "model": self.name,
            "facts": self.facts,
            "findings": [asdict(finding) for finding in self.findings],
            "rows": [asdict(row) for row in self.part.rows],
            "breakers": [*self.breakers],
            "override": self.override,
        }


def flagged(
    topic: str, matrix: str, kinds: IdKinds, ids: Int64[ndarray, "N"], values: ndarray | Sequence[float]
) -> tuple[Flagged, ...]:
    """The rows of a finding, those with the largest values first, at most `KEPT`."""
    numbers = np.asarray(values, np.float64)
    order = np.argsort(-numbers, kind="stable")[:KEPT]
    finite = np.isfinite(numbers)
    return tuple(
        Flagged(topic, matrix, int(ids[i]), kinds.name(int(ids[i])), float(numbers[i]) if finite[i] else None)
        for i in order
    )


def examples(rows: Sequence[Flagged]) -> str:
    """The first of them, in words: `; first 'foo' (17), 'bar' (3)`. Empty for none."""
    if not rows:
        return ""
    named = ", ".join(f"{readable(row.token)!r} ({row.id})" for row in rows[:EXAMPLES])
    return f": {named}" + (" …" if len(rows) > EXAMPLES else "")
