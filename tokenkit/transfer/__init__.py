"""New embedding rows for a new vocabulary: a plan says which source rows, an initialiser makes rows of them.

An initialiser is `fn(source_rows, plan, *, side, seed) -> rows`, one row per id of the target tokenizer, in a file of
this folder.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Initializer:
    """A registered initialiser. `copies`: an ordinary token that the source spells too gets that row, bit for bit."""

    name: str
    fn: Callable[..., Tensor]
    copies: bool

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (self.fn.__doc__ or "").strip().partition("\n")[0]


INITIALIZERS: dict[str, Initializer] = {}


def initializer(*, copies: bool) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers a function under its own name."""

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        assert fn.__name__ not in INITIALIZERS, fn.__name__
        INITIALIZERS[fn.__name__] = Initializer(fn.__name__, fn, copies)
        return fn

    return register


for module in pkgutil.iter_modules(__path__):
    if module.name not in ("plan", "apply"):
        importlib.import_module(f"{__name__}.{module.name}")
