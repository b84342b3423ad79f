"""What a model card says, as plain values, and which way is better."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tokenkit.config import Config
from tokenkit.eval.harness import EvalRow
from tokenkit.eval.summary import Direction, ratio

LESS_IS_BETTER = (
    "bits_per_byte",
    "byte_perplexity",
    "cer",
    "cross_entropy",
    "kl",
    "kl_to_teacher",
    "loss",
    "nll",
    "perplexity",
    "ppl",
    "wer",
    "word_perplexity",
)
MORE_IS_BETTER = ("acc", "acc_norm", "accuracy", "accuracy_by_bytes", "exact_match", "f1", "top1_agreement")
BLOCKS = "▁▂▃▄▅▆▇█"


class CardConfig(Config):
    """The card (README.md) of an exported model folder."""

    write: bool = True
    license: str | None = None
    """Licence of the model, as the hub spells it (`apache-2.0`, `mit`). Null: none is named, and the card says so."""
    language: list[str] = []
    """Codes of its languages (`en`)."""
    datasets: list[str] = []
    """Hub ids of what it was trained on, where the run read copies."""
    name: str | None = None
    """What the model is called; null: the run folder's name."""


@dataclass(frozen=True)
class Measured:
    """One model's figures."""

    name: str
    values: Mapping[str, float]
    is_teacher: bool = False


@dataclass(frozen=True)
class Curve:
    """The loss of a run: how it began, how low it was, how it ended, and its course in a line of blocks."""

    first: float
    lowest: float
    last: float
    steps: int
    course: str


@dataclass(frozen=True)
class Place:
    """The text that was measured, as a model index names it."""

    dataset: str
    name: str
    split: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """All that a card says. Lists of pairs become lines `name: value`."""

    name: str
    summary: str
    verb: str
    run_file: str
    command: str
    files: Sequence[str] = ()
    """What has to lie beside the run file, under these names."""
    license: str | None = None
    language: Sequence[str] = ()
    base_models: Sequence[str] = ()
    """Hub ids."""
    relation: str | None = None
    datasets: Sequence[str] = ()
    """Hub ids."""
    tags: Sequence[str] = ()
    made_with: Sequence[Mapping[str, Any]] = ()
    """What `provenance` said when the run began, and each time it went on with something else."""
    sizes: Sequence[Sequence[str]] = ()
    """Rows of a table: a header, the student, the teacher."""
    differences: Sequence[Sequence[str]] = ()
    """Keys of the configuration with the teacher's and the student's values."""
    made: Sequence[tuple[str, str]] = ()
    objective: Sequence[tuple[str, str]] = ()
    data: Sequence[tuple[str, str]] = ()
    curve: Curve | None = None
    evaluation: Sequence[Measured] = ()
    place: Place | None = None
    benchmarks: Sequence[EvalRow] = ()
    teacher_benchmarks: Sequence[EvalRow] = ()
    over_tasks: Mapping[str, float | int] = field(default_factory=dict)
    resources: Sequence[tuple[str, str]] = ()
    limits: Sequence[str] = ()


def direction_of(metric: str) -> Direction | None:
    """What is better of a metric; None where nobody said."""
    if metric in LESS_IS_BETTER:
        return "min"
    return "max" if metric in MORE_IS_BETTER else None


def best(values: Sequence[float | None], direction: Direction | None) -> set[int]:
    """Places of the best values; none where the direction is unknown or there is nothing to choose from."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if direction is None or len(known) < 2:
        return set()
    top = min(known) if direction == "min" else max(known)
    return {place for place, value in enumerate(values) if value == top}


def retention(value: float | None, teacher: float | None, direction: Direction | None) -> str:
    """How much of the teacher is kept, in per cent: 100 % is as good, more is better."""
    if value is None or teacher is None or direction is None or value < 0 or teacher < 0:
        return "–"
    share = 100 * ratio(value, teacher, direction)
    return f"{share:.1f} %" if share < 1e4 else f"{share:.3g} %"


def figure(value: float | None) -> str:
    """A number as a table shows it."""
    if value is None:
        return "–"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"


def curve_of(losses: Mapping[int, float], width: int = 40) -> Curve | None:
    """The course of a loss by step, as means of at most `width` stretches; None without a finite value."""
    steps = [step for step in sorted(losses) if math.isfinite(losses[step])]
    if not steps:
        return None
    values = [losses[step] for step in steps]
    count = min(width, len(values))
    cuts = [round(part * len(values) / count) for part in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, span = min(means), max(means) - min(means)
    course = "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1)) if span else 0] for mean in means)
    return Curve(values[0], min(values), values[-1], steps[-1], course)
