"""The course of a loss's weight over the steps of a run, written `linear(0,1,1000)` or as keys."""

import math
import re
from typing import Any, Literal

from pydantic import Field, model_validator

from tokenkit.config import Config

Kind = Literal["constant", "linear", "cosine", "reverse_cosine"]
ENDS: dict[str, tuple[float, float]] = {
    "constant": (1.0, 1.0),
    "linear": (0.0, 1.0),
    "cosine": (1.0, 0.0),
    "reverse_cosine": (0.0, 1.0),
}
FORMS = (
    "linear(0,1,1000), constant(1), cosine(1000), reverse_cosine(1000) or {kind: linear, start: 0, end: 1, steps: 1000}"
)


class Schedule(Config):
    """A factor that goes from `start` to `end`, on a line or on half a wave of a cosine, and stays there."""

    kind: Kind
    start: float = Field(ge=0)
    """Factor at the first step; by default 1 for constant and cosine, 0 for linear and reverse_cosine."""
    end: float = Field(ge=0)
    """Factor from step `steps` on; by default 0 for cosine, else 1."""
    steps: int | None = Field(None, ge=1)
    """Steps from `start` to `end`; null: all steps of the run."""

    @model_validator(mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        keys = _keys_of(value) if isinstance(value, str) else value
        if not isinstance(keys, dict):
            raise ValueError(f"a schedule is {FORMS}")
        start, end = ENDS.get(str(keys.get("kind")), (0.0, 1.0))
        if keys.get("kind") == "constant":
            end = keys.get("start", start)
        return {"start": start, "end": end, **keys}

    @model_validator(mode="after")
    def _constant(self) -> "Schedule":
        if self.kind == "constant" and (self.start != self.end or self.steps is not None):
            raise ValueError("a constant schedule has a start and nothing else, as in constant(1)")
        return self

    def at(self, step: int, steps: int) -> float:
        """The factor of a step counted from 0, in a run of `steps` steps."""
        share = min(1.0, step / (self.steps or steps))
        if self.kind in ("cosine", "reverse_cosine"):
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


def _keys_of(text: str) -> dict[str, Any]:
    """The keys of a schedule that is written as a call."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    if match is None or match[1] not in ENDS:
        raise ValueError(f"a schedule is {FORMS}")
    kind, words = match[1], [word.strip() for word in (match[2] or "").split(",")]
    names = {"constant": [["start"]]}.get(kind, [["steps"], ["start", "end", "steps"]])
    if words == [""] and match[2] is None:
        return {"kind": kind}
    found = next((keys for keys in names if len(keys) == len(words)), None)
    if found is None or "" in words:
        raise ValueError(f"a schedule is {FORMS}")
    return {"kind": kind, **dict(zip(found, words, strict=True))}
