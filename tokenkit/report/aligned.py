"""The aligned text as the page shows it: what stands in a chunk, its colour and its tooltip."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from tokenkit.report.content import Chunk

FULL_COLOUR = 3.0  # nats of difference from which the colour no longer deepens: a factor of 20 in probability
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@dataclass(frozen=True)
class ShownChunk:
    """One chunk ready to print: `side` is better, worse or none, `mix` the depth of its colour in per cent."""

    teacher_tokens: list[str]
    student_tokens: list[str]
    side: str
    mix: int
    tip: str
    ends_line: bool


def visible(text: str, keep: str = "") -> str:
    """The text with control, format and unpaired characters as escapes, but for those to keep."""
    return "".join(_escaped(c) if c not in keep and unicodedata.category(c) in INVISIBLE else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def token(text: str) -> str:
    """One token: as `visible`, with its spaces drawn."""
    return visible(text).replace(" ", "␣")


def number(value: float) -> str:
    """Two decimals with a true minus sign."""
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def shown(chunk: Chunk) -> ShownChunk:
    """One chunk, coloured by how much likelier the student finds it than the teacher does."""
    teacher, student = chunk.teacher_logp, chunk.student_logp
    difference = None if teacher is None or student is None else student - teacher
    above, below = ([token(text) for text in side] for side in (chunk.teacher_tokens, chunk.student_tokens))
    lines = [token(chunk.text), f"teacher: {_log_probability(teacher)}", f"student: {_log_probability(student)}"]
    if difference is not None:
        lines.append(f"student / teacher: ×{math.exp(min(difference, 700.0)):.3g}")
    lines += [f"teacher tokens: {' | '.join(above)}", f"student tokens: {' | '.join(below)}"]
    side = "none" if difference is None else "better" if difference > 0 else "worse"
    mix = 0 if difference is None else round(100 * min(abs(difference) / FULL_COLOUR, 1.0))
    return ShownChunk(above, below, side, mix, "\n".join(lines), chunk.text.endswith("\n"))


def _log_probability(value: float | None) -> str:
    return "not scored" if value is None else f"ln p = {number(value)}, p = {math.exp(min(value, 0.0)):.3g}"


def summary(chunks: Sequence[Chunk]) -> str:
    """One sentence: the mean log-probability per chunk on each side."""
    pairs = [
        (c.teacher_logp, c.student_logp) for c in chunks if c.teacher_logp is not None and c.student_logp is not None
    ]
    if not pairs:
        return f"{len(chunks)} chunks, none of them scored by both models."
    teacher, student = (sum(side) / len(pairs) for side in zip(*pairs))
    return (
        f"{len(chunks)} chunks, {len(pairs)} scored by both models; mean log-probability per chunk: "
        f"teacher {number(teacher)}, student {number(student)} nats."
    )
