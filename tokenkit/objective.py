"""The `losses:` section of a run file, read against the signatures of the losses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, create_model
from torch import Tensor

from tokenkit.config import Config, UserError
from tokenkit.losses import LOSSES, Loss
from tokenkit.quantities import DATA_LEAVES, MODEL_LEAVES, leaves_of


class LossConfig(Config):
    """What every loss has in a run file, beside its own options."""

    weight: float = Field(1.0, ge=0)
    """Factor of the loss's mean in the sum that is minimised."""


def _section(entry: Loss) -> type[LossConfig]:
    options: dict[str, Any] = {name: (p.annotation, p.default) for name, p in entry.options.items()}
    return create_model(f"{entry.name}_options", __base__=LossConfig, __doc__=entry.paper, **options)


_SECTIONS: dict[str, Any] = {name: (_section(entry) | None, None) for name, entry in LOSSES.items()}
LossesConfig = create_model(
    "LossesConfig", __base__=Config, __doc__="Losses by name; `alm: {temperature: 5}` or `clm: {}`.", **_SECTIONS
)


@dataclass(frozen=True)
class Term:
    """One loss of a run with its options."""

    loss: Loss
    weight: float
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """The weighted sum of a run's losses, and what has to be computed for it."""

    terms: tuple[Term, ...]

    @classmethod
    def of(cls, section: Config) -> "Objective":
        """The objective of a `losses:` section."""
        terms = []
        for name, entry in LOSSES.items():
            options = section.__dict__[name]
            if options is not None:
                values = options.model_dump()
                terms.append(Term(entry, values.pop("weight"), values))
        if not terms:
            raise UserError(f"losses: empty; name at least one of {', '.join(LOSSES)}, for example losses.alm={{}}")
        return cls(tuple(terms))

    def needs(self, side: Literal["student", "teacher"]) -> set[str]:
        """The model leaves (without their side) that the losses are computed from."""
        names = {n for term in self.terms for n in (*term.loss.tensors, *term.loss.unit_tensors)}
        return _model_leaves(names, side)

    @property
    def counting_needs_teacher(self) -> bool:
        """Whether the number of units is known only after the teacher has read the text."""
        return bool(_model_leaves({n for term in self.terms for n in term.loss.unit_tensors}, "teacher"))

    def check_vocabularies(self, student_size: int, teacher_size: int, same_tokenizer: bool) -> None:
        """UserError where a loss wants one vocabulary and there are two."""
        for term in self.terms:
            if term.loss.one_vocabulary and not same_tokenizer:
                raise UserError(
                    f"losses.{term.loss.name}: needs one vocabulary, but the student's ({student_size:,} ids) and the "
                    f"teacher's ({teacher_size:,} ids) are two; use a loss that works across tokenizers, such as alm"
                )

    def masks(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which units of a microbatch count, by loss."""
        with torch.no_grad():
            return {term.loss.name: term.loss.mask(tensors, term.options) for term in self.terms}

    def sums(self, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masked sum of each loss over a microbatch, unweighted."""
        return {
            term.loss.name: torch.where(masks[term.loss.name], term.loss.values(tensors, term.options), 0.0).sum()
            for term in self.terms
        }

    def weights(self) -> dict[str, float]:
        return {term.loss.name: term.weight for term in self.terms}


def _model_leaves(names: set[str], side: str) -> set[str]:
    bases = {name.removeprefix(f"{side}_") for name in leaves_of(names) if name.startswith(f"{side}_")}
    return (bases - DATA_LEAVES) & MODEL_LEAVES
