"""The registry of losses: the folder is the list, a signature is the interface, the schema and the help.

A loss is a pure function of named tensors that returns one value per token or chunk. Positional parameters name
tensors, keyword-only parameters are options and become run-file keys. Which units count is a function of its own
(`units`), because the number of units of the whole step must be known before the first backward pass.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Per = Literal["token", "chunk"]
UNITS_PER: dict[Per, str] = {"token": "student_label_mask", "chunk": "chunk_mask"}


@dataclass(frozen=True)
class Loss:
    """A registered loss: its function and what the signature says of it."""

    name: str
    fn: Callable[..., Tensor]
    per: Per
    units: Callable[..., Tensor] | None

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

    def mask(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """Which units count, Bool[B T] or Bool[B C]."""
        if self.units is None:
            return tensors[UNITS_PER[self.per]]
        wanted = _parameters(self.units, inspect.Parameter.KEYWORD_ONLY)
        return self.units(*(tensors[n] for n in self.unit_tensors), **{n: options[n] for n in wanted})

    def values(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """One value per unit; where `mask` is False the value is finite and means nothing."""
        return self.fn(*(tensors[n] for n in self.tensors), **options)


LOSSES: dict[str, Loss] = {}


def _parameters(fn: Callable[..., Any], kind: Any) -> tuple[str, ...]:
    return tuple(name for name, p in inspect.signature(fn).parameters.items() if p.kind is kind)


def loss(*, per: Per, units: Callable[..., Tensor] | None = None) -> Callable[[Callable[..., Tensor]], Callable]:
    """Registers a loss under its function's name."""

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        LOSSES[fn.__name__] = Loss(fn.__name__, fn, per, units)
        return fn

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
