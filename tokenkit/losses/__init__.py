"""The registry of losses: the folder is the list, a signature is the interface, the schema and the help.

A loss is a pure function of named tensors that returns one value per token or chunk. Positional parameters name
tensors, keyword-only parameters are options and become run-file keys. Which units count is a function of its own
(`units`), because the number of units of the whole step must be known before the first backward pass. It returns a
mask, or a weight and a count per unit where the mean is not over units alone.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from tokenkit.config import UserError

Per = Literal["token", "chunk"]
UNITS_PER: dict[Per, str] = {"token": "student_label_mask", "chunk": "chunk_mask"}
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Units:
    """What a loss is averaged over: its mean is sum(weight x value) / sum(count), both over the whole step."""

    weight: Float[Tensor, "B U"]
    """0 where the unit does not count and its value means nothing."""
    count: Float[Tensor, "B U"]


@dataclass(frozen=True)
class Loss:
    """A registered loss: its function and what the signature says of it."""

    name: str
    fn: Callable[..., Tensor]
    per: Per
    units: Callable[..., Tensor | tuple[Tensor, Tensor]] | None
    reads: Callable[[Options], Mapping[str, str]] | None = None
    """Options → parameters that stand for another tensor than the one of their name."""
    presets: Mapping[str, Options] = field(default_factory=dict)
    """Named sets of options; what a run file writes itself goes before."""

    @property
    def tensors(self) -> tuple[str, ...]:
        return _parameters(self.fn, inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        parameters = inspect.signature(self.fn).parameters
        return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def unit_tensors(self) -> tuple[str, ...]:
        if self.units is None:
            return (UNITS_PER[self.per],)
        return _parameters(self.units, inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @property
    def one_vocabulary(self) -> bool:
        """Whether student and teacher logits share an axis `V` in the signature."""
        annotations = inspect.get_annotations(self.fn)
        sides = [name for name in ("student_logits", "teacher_logits") if name in annotations]
        return len(sides) == 2 and all("V" in annotations[name].dim_str.split() for name in sides)

    @property
    def paper(self) -> str:
        """First paragraph of the module: what the loss is and who published it."""
        return (inspect.getmodule(self.fn).__doc__ or "").split("\n\n")[0]

    def named(self, parameters: tuple[str, ...], options: Options) -> list[str]:
        """The tensors that parameters stand for under these options."""
        other = self.reads(options) if self.reads else {}
        return [other.get(name, name) for name in parameters]

    def units_of(self, tensors: Mapping[str, Tensor], options: Options) -> Units:
        """Weight and count of every unit; both 1 or 0 where the loss gives a mask."""
        if self.units is None:
            found: Tensor | tuple[Tensor, Tensor] = tensors[UNITS_PER[self.per]]
        else:
            wanted = _parameters(self.units, inspect.Parameter.KEYWORD_ONLY)
            named = self.named(self.unit_tensors, options)
            found = self.units(*(tensors[n] for n in named), **{n: options[n] for n in wanted})
        return Units(*found) if isinstance(found, tuple) else Units(found.float(), found.float())

    def mask(self, tensors: Mapping[str, Tensor], options: Options) -> Tensor:
        """Which units count, Bool[B T] or Bool[B U]."""
        return self.units_of(tensors, options).weight > 0

    def values(self, tensors: Mapping[str, Tensor], options: Options) -> Tensor:
        """One value per unit; where `mask` is False the value is finite and means nothing."""
        return self.fn(*(tensors[n] for n in self.named(self.tensors, options)), **options)


LOSSES: dict[str, Loss] = {}


def _parameters(fn: Callable[..., Any], kind: Any) -> tuple[str, ...]:
    return tuple(name for name, p in inspect.signature(fn).parameters.items() if p.kind is kind)


def loss(
    *,
    per: Per,
    units: Callable[..., Tensor | tuple[Tensor, Tensor]] | None = None,
    reads: Callable[[Options], Mapping[str, str]] | None = None,
    presets: Mapping[str, Options] = MappingProxyType({}),
) -> Callable[[Callable[..., Tensor]], Callable]:
    """Registers a loss under its function's name."""

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if fn.__name__ in LOSSES:
            raise UserError(f"a loss called {fn.__name__!r} exists already; give yours another name")
        LOSSES[fn.__name__] = Loss(fn.__name__, fn, per, units, reads, presets)
        return fn

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
