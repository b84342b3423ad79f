"""The `losses:` section of a run file, read against the signatures of the losses."""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, create_model, model_validator
from torch import Tensor

from tokenkit.config import Config, UserError
from tokenkit.losses import LOSSES, Loss, Units
from tokenkit.quantities import BY_TASK, MODEL_LEAVES, PAIR_LEAVES, SHARED_LEAVES, with_inputs
from tokenkit.schedule import Schedule

TokenWeight = Literal["none", "entropy", "certainty"]
TEACHER_ENTROPY = "teacher_entropy"


class LossConfig(Config):
    """What every loss has in a run file, beside its own options."""

    weight: float = Field(1.0, ge=0)
    """Factor of the loss's mean in the sum that is minimised."""
    schedule: Schedule | None = None
    """Course of that factor over the steps: `linear(0,1,1000)`, `constant(1)`, `cosine(1000)`, or its keys."""
    token_weight: TokenWeight = "none"
    """What each position counts for beside the others: the teacher's entropy H there, or exp(-H), its certainty."""

    @model_validator(mode="before")
    @classmethod
    def _whole_schedule(cls, values: Any) -> Any:
        schedule = values.get("schedule") if isinstance(values, dict) else None
        if isinstance(schedule, str) and "(" in schedule and ")" not in schedule:  # a comma ends a word inside braces
            raise ValueError("a schedule ends with `)` and inside {...} stands in quotes: schedule: 'linear(0,1,1000)'")
        return values


def _section(entry: Loss) -> type[LossConfig]:
    for option in entry.options:
        if option in LossConfig.model_fields:
            raise UserError(f"{entry.name}: every loss has the key {option!r}; give the option another name")
        if option.startswith("_") or option in dir(LossConfig):
            raise UserError(f"{entry.name}: {option!r} cannot be a key of a run file; give the option another name")
    options: dict[str, Any] = {name: (p.annotation, p.default) for name, p in entry.options.items()}
    validators: dict[str, Any] = {}
    if entry.presets:
        options["preset"] = (Literal[tuple(entry.presets)] | None, None)  # pyrefly: ignore [invalid-literal] (its names)
        validators["fill"] = model_validator(mode="before")(lambda values: _with_preset(entry, values))
    return create_model(
        f"{entry.name}_options", __base__=LossConfig, __doc__=entry.paper, __validators__=validators, **options
    )


def _with_preset(entry: Loss, values: Any) -> Any:
    """The keys of a section and, behind them, those of the preset that it names: a resolved run shows them all."""
    preset = values.get("preset") if isinstance(values, dict) else None
    return {**entry.presets[preset], **values} if isinstance(preset, str) and preset in entry.presets else values


class LossesSection(Config):
    """Losses by name; `alm: {temperature: 5}` or `clm: {}`."""

    known: ClassVar[Mapping[str, Loss]] = {}


def losses_config(own: Mapping[str, Loss]) -> type[LossesSection]:
    """The schema of a `losses:` section: the losses of the package and a run's own."""
    known = {**LOSSES, **own}
    for name in own:
        if name.startswith("_") or name in dir(LossesSection):
            raise UserError(f"a loss called {name!r} cannot be a key of a run file; give it another name")
    sections: dict[str, Any] = {name: (_section(entry) | None, None) for name, entry in known.items()}
    schema = create_model("LossesConfig", __base__=LossesSection, __doc__=LossesSection.__doc__, **sections)
    schema.known = known
    return schema


LossesConfig = losses_config({})


@dataclass(frozen=True)
class Term:
    """One loss of a run with its options."""

    loss: Loss
    weight: float
    options: Mapping[str, Any]
    schedule: Schedule | None = None
    token_weight: TokenWeight = "none"

    @property
    def tensors(self) -> list[str]:
        """The tensors that the values are computed from."""
        return self.loss.named(self.loss.tensors, self.options)

    @property
    def unit_tensors(self) -> list[str]:
        """The tensors that tell which units count."""
        own = self.loss.named(self.loss.unit_tensors, self.options)
        return own if self.token_weight == "none" else [*own, TEACHER_ENTROPY]

    @property
    def step_tensors(self) -> list[str]:
        """The tensors that a mean over the whole step is computed from."""
        return self.loss.named(self.loss.step_tensors, self.options)

    def units(self, tensors: Mapping[str, Tensor]) -> Units:
        """What counts of a microbatch; with token weights, whose mean over the step is 1, how much."""
        found = self.loss.units_of(tensors, self.options)
        if self.token_weight == "none":
            return found
        entropy = tensors[TEACHER_ENTROPY].to(found.weight.dtype)
        weight = entropy if self.token_weight == "entropy" else (-entropy).exp()
        return Units(found.weight * weight, found.count * weight, found.part)

    @cached_property
    def names(self) -> set[str]:
        """Every tensor that this loss, or something it needs, is computed from."""
        return with_inputs([*self.tensors, *self.unit_tensors, *self.step_tensors])


@dataclass(frozen=True)
class Objective:
    """The weighted sum of a run's losses, and what has to be computed for it."""

    terms: tuple[Term, ...]

    @classmethod
    def of(cls, section: LossesSection) -> "Objective":
        """The objective of a `losses:` section."""
        terms = []
        for name, entry in section.known.items():
            options = section.__dict__[name]
            if options is not None and options.weight > 0:  # what weighs nothing is not computed either
                values = options.model_dump()
                own = {name: values[name] for name in entry.options}
                if options.token_weight != "none" and entry.per != "token":
                    raise UserError(
                        f"losses.{name}.token_weight: has a value per {entry.per}, not per token; leave it out"
                    )
                terms.append(Term(entry, values["weight"], own, options.schedule, options.token_weight))
        if not terms:
            names = ", ".join(section.known)
            raise UserError(f"losses: empty; name at least one of {names}, for example losses.alm={{}}")
        return cls(tuple(terms))

    @cached_property
    def names(self) -> set[str]:
        """Every tensor that some loss, or something it needs, is computed from."""
        return {name for term in self.terms for name in term.names}

    @cached_property
    def scores_alike(self) -> bool:
        """Whether all label scores of a microbatch count for the same: only a plain cross-entropy reads them."""
        readers = [term for term in self.terms if "student_label_logp" in term.names]
        return all(term.loss.name == "clm" and term.token_weight == "none" for term in readers)

    def needs(self, side: Literal["student", "teacher"]) -> set[str]:
        """The model leaves (without their side) that the losses are computed from."""
        return _model_leaves(self.names, side)

    def by_task(self) -> set[str]:
        """The tensors that the task computes from both sides, or with parts that are learnt along."""
        return self.names & BY_TASK.keys()

    def pair_needs(self) -> set[str]:
        """The tables of the pair of tokenizers that the losses are computed from."""
        return self.names & PAIR_LEAVES

    def shared_needs(self) -> set[str]:
        """What the losses ask of the data about both sides."""
        return self.names & SHARED_LEAVES

    def option(self, tensor: str, name: str) -> Any:
        """The largest value of an option among the losses that read a tensor; None without one."""
        values = [term.options[name] for term in self.terms if tensor in term.names and name in term.options]
        return max(values, default=None)

    @cached_property
    def counting_needs_teacher(self) -> bool:
        """Whether the number of units, or a mean over the step, is known only after the teacher has read the text."""
        counted = with_inputs(n for term in self.terms for n in (*term.unit_tensors, *term.step_tensors))
        return bool(_model_leaves(counted, "teacher"))

    @cached_property
    def counting_needs_student(self) -> bool:
        """Whether the number of units is known only after the student has read the text."""
        return bool(_model_leaves(with_inputs(n for term in self.terms for n in term.unit_tensors), "student"))

    def check_vocabularies(self, student_size: int, teacher_size: int, same_tokenizer: bool) -> None:
        """UserError where a loss wants one vocabulary and there are two."""
        for term in self.terms:
            if term.loss.one_vocabulary and not same_tokenizer:
                usable = {name: entry for name, entry in LOSSES.items() if name != "clm" and not entry.of_byte_strings}
                others = [name for name, entry in usable.items() if not entry.one_vocabulary]
                raise UserError(
                    f"losses.{term.loss.name}: needs one vocabulary, but the student's ({student_size:,} ids) and the "
                    f"teacher's ({teacher_size:,} ids) are two; use a loss that works across tokenizers: "
                    f"{', '.join(sorted(others))}"
                )

    def check_text(self) -> None:
        """UserError where a loss asks for what only an auto-encoder of byte strings says."""
        for term in self.terms:
            if term.loss.of_byte_strings:
                raise UserError(
                    f"losses.{term.loss.name}: needs {term.tensors[0]}, which an auto-encoder has and a language model "
                    "has not; it is for `tokenkit tokenizer pretrain`"
                )

    def step_means(
        self, parts: Sequence[Mapping[str, Tensor]], total: Callable[[Tensor], Tensor] = lambda values: values
    ) -> dict[str, Tensor]:
        """The means over a step that losses measure against, from the tensors of its microbatches.

        `total` adds up what other processes have.
        """
        with torch.no_grad():
            found = [term.loss.step_mean_of(parts, term.options, total) for term in self.terms]
        return {name: value for part in found for name, value in part.items()}

    def units(self, tensors: Mapping[str, Tensor]) -> dict[str, Units]:
        """What a microbatch is averaged over, by loss."""
        with torch.no_grad():
            return {term.loss.name: term.units(tensors) for term in self.terms}

    def sums(self, tensors: Mapping[str, Tensor], units: Mapping[str, Units]) -> dict[str, Tensor]:
        """The sums of each loss's parts over a microbatch, Float[P]; the step's counts are yet to divide them."""
        values = {term.loss.name: term.loss.values(tensors, term.options) for term in self.terms}
        return {name: units[name].sums(value) for name, value in values.items()}

    def weights(self) -> dict[str, float]:
        """The weight of each loss where its schedule is at 1."""
        return {term.loss.name: term.weight for term in self.terms}

    def weights_at(self, step: int, steps: int) -> dict[str, float]:
        """The weight of each loss at a step counted from 0, in a run of `steps` steps."""
        factors = {t.loss.name: t.schedule.at(step, steps) if t.schedule else 1.0 for t in self.terms}
        return {name: weight * factors[name] for name, weight in self.weights().items()}


def _model_leaves(names: AbstractSet[str], side: str) -> set[str]:
    return {name.removeprefix(f"{side}_") for name in names if name.startswith(f"{side}_")} & MODEL_LEAVES
