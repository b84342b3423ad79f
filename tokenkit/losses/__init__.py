"""The registry of losses: the folder is the list, a signature is the interface, the schema and the help.

A loss is a pure function of named tensors that returns one value per token, chunk or row. Positional parameters name
tensors, keyword-only parameters are options and become run-file keys. Which units count is a function of its own
(`units`), because the number of units of the whole step must be known before the first backward pass. It returns a
mask; a weight and a count per unit where the mean is not over units alone; or `Units` where the loss is a sum of
several means. A loss that measures against a mean over the whole step says how it is made (`step_mean`).
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.quantities import AUTOENCODER_LEAVES, PAIRED, STEP_MEAN

Per = Literal["token", "chunk", "row"]
UNITS_PER: dict[Per, str] = {"token": "student_label_mask", "chunk": "chunk_mask", "row": "student_row_mask"}
STATES_OF = {"block": "states", "attention": "attention_states", "mlp": "mlp_states"}
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Units:
    """What a loss is averaged over: its mean is sum(weight x value) / sum(count), both over the whole step."""

    weight: Float[Tensor, "B U"]
    """0 where the unit does not count and its value means nothing."""
    count: Float[Tensor, "B U"]
    part: Int[Tensor, "U"] | None = None
    """Which mean each unit belongs to, from 0; the loss is the sum of the means. None: one mean."""

    def sums(self, values: Float[Tensor, "B U"]) -> Float[Tensor, "P"]:
        """Weighted sum of the values of each part; what does not count is not looked at."""
        return self._by_part(torch.where(self.weight > 0, values, 0.0) * self.weight)

    def counts(self) -> Float[Tensor, "P"]:
        """What divides the sum of each part, in float64."""
        return self._by_part(self.count.double())

    def _by_part(self, values: Float[Tensor, "B U"]) -> Float[Tensor, "P"]:
        if self.part is None:
            return values.sum().unsqueeze(0)
        sums = values.new_zeros(int(self.part[-1]) + 1)
        return sums.index_add(0, self.part, values.sum(0))


@dataclass(frozen=True)
class Loss:
    """A registered loss: its function and what the signature says of it."""

    name: str
    fn: Callable[..., Tensor]
    per: Per
    units: Callable[..., "Tensor | tuple[Tensor, Tensor] | Units"] | None
    reads: Callable[[Options], Mapping[str, str]] | None = None
    """Options → parameters that stand for another tensor than the one of their name."""
    presets: Mapping[str, Options] = field(default_factory=dict)
    """Named sets of options; what a run file writes itself goes before."""
    step_mean: Callable[..., tuple[Tensor, Tensor]] | None = None
    """Data and teacher tensors → a sum and what divides it, both added up over the microbatches of a step."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that the function takes, in its order."""
        return _parameters(self.fn, inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """What a run file may set, by name."""
        parameters = inspect.signature(self.fn).parameters
        return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def unit_tensors(self) -> tuple[str, ...]:
        """Names of the tensors that say which units count."""
        if self.units is None:
            return (UNITS_PER[self.per],)
        return _parameters(self.units, inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @property
    def step_tensors(self) -> tuple[str, ...]:
        """What the mean over the step is computed from."""
        return _parameters(self.step_mean, inspect.Parameter.POSITIONAL_OR_KEYWORD) if self.step_mean else ()

    @property
    def paired(self) -> bool:
        """Whether it compares pairs of layers, position by position; its option `layers` says which."""
        return any(name in PAIRED for name in self.tensors)

    @property
    def one_vocabulary(self) -> bool:
        """Whether positions are compared, or the last axis of both sides' logits or best ids' scores is one."""
        if self.paired or "student_divergence" in self.tensors:
            return True
        annotations = inspect.get_annotations(self.fn)
        pairs = [[f"{side}_{name}" for side in ("student", "teacher")] for name in ("logits", "top_logp")]
        axes = [[annotations[n].dim_str.split()[-1] for n in pair if n in annotations] for pair in pairs]
        return any(len(found) == 2 and found[0] == found[1] for found in axes)

    @property
    def of_byte_strings(self) -> bool:
        """Whether it asks for what an auto-encoder of byte strings says, which no language model does."""
        return any(name.partition("_")[2] in AUTOENCODER_LEAVES for name in self.tensors)

    @property
    def paper(self) -> str:
        """First paragraph of the module: what the loss is and who published it."""
        return (inspect.getmodule(self.fn).__doc__ or "").split("\n\n")[0]

    def named(self, parameters: tuple[str, ...], options: Options) -> list[str]:
        """The tensors that parameters stand for under these options."""
        other = {STEP_MEAN: self.step_mean_name, **(self.reads(options) if self.reads else {})}
        if self.paired:
            own = {name: other.get(name, name) for name in parameters if name in PAIRED}
            other |= {name: f"{self.name}.{_paired_of(of, options)}" for name, of in own.items()}
        return [other.get(name, name) for name in parameters]

    @property
    def step_mean_name(self) -> str:
        """Under which name the mean over the step stands among the tensors."""
        return f"{self.name}.{STEP_MEAN}"

    def step_mean_of(
        self,
        parts: Iterable[Mapping[str, Tensor]],
        options: Options,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> dict[str, Tensor]:
        """The loss's mean over the microbatches of a step, by its name; nothing if it takes none.

        `total` adds up what other processes have.
        """
        if self.step_mean is None:
            return {}
        found = [self._call(self.step_mean, tensors, options) for tensors in parts]
        value, count = (total(torch.stack([pair[i] for pair in found]).sum(0)) for i in (0, 1))
        return {self.step_mean_name: value / count.clamp_min(1)}

    def _call(self, fn: Callable[..., Any], tensors: Mapping[str, Tensor], options: Options) -> Any:
        """A function of tensors by name, and of those of the options that it has parameters for."""
        wanted = _parameters(fn, inspect.Parameter.KEYWORD_ONLY)
        named = self.named(_parameters(fn, inspect.Parameter.POSITIONAL_OR_KEYWORD), options)
        return fn(*(tensors[n] for n in named), **{n: options[n] for n in wanted})

    def units_of(self, tensors: Mapping[str, Tensor], options: Options) -> Units:
        """Weight and count of every unit; both 1 or 0 where the loss gives a mask."""
        found = self._call(self.units, tensors, options) if self.units else tensors[UNITS_PER[self.per]]
        if isinstance(found, Units):
            return found
        return Units(*found) if isinstance(found, tuple) else Units(found.float(), found.float())

    def mask(self, tensors: Mapping[str, Tensor], options: Options) -> Tensor:
        """Which units count, Bool[B T] or Bool[B U]."""
        return self.units_of(tensors, options).weight > 0

    def values(self, tensors: Mapping[str, Tensor], options: Options) -> Tensor:
        """One value per unit; where `mask` is False the value is finite and means nothing."""
        return self.fn(*(tensors[n] for n in self.named(self.tensors, options)), **options)


LOSSES: dict[str, Loss] = {}
"""Every loss by its name; what a file of this folder registers, and the plugins of a run."""


def _parameters(fn: Callable[..., Any], kind: Any) -> tuple[str, ...]:
    return tuple(name for name, p in inspect.signature(fn).parameters.items() if p.kind is kind)


def _paired_of(name: str, options: Options) -> str:
    """Which states of a pair of layers are meant; the last ones alone need no other to be kept."""
    side, _, kind = name.partition("_")
    if kind != "states":
        return name
    of = options.get("of", "block")
    alone = of == "block" and options["layers"] == "last" and not options.get("include_embeddings", False)
    return f"{side}_last_states" if alone else f"{side}_{STATES_OF[of]}"


def loss(
    *,
    per: Per,
    units: Callable[..., Tensor | tuple[Tensor, Tensor] | Units] | None = None,
    reads: Callable[[Options], Mapping[str, str]] | None = None,
    presets: Mapping[str, Options] = MappingProxyType({}),
    step_mean: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable]:
    """Registers a loss under its function's name."""

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if fn.__name__ in LOSSES:
            raise UserError(f"a loss called {fn.__name__!r} exists already; give yours another name")
        LOSSES[fn.__name__] = Loss(fn.__name__, fn, per, units, reads, presets, step_mean)
        return fn

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
