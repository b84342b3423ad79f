"""New embedding rows for a new vocabulary: a plan says which source rows, an initialiser makes rows of them.

An initialiser is `fn(source, plan, *evidence, side, seed, **options)` in a file of this folder. Positional parameters
behind the plan name evidence (rows of a donor, texts, the live model), which only they get who ask; keyword-only ones
besides `side` and `seed` are options and become run-file keys. It returns something that makes the rows of target
ids when it is called with them, and says of each what it was made of: for all but two a `Mixture` of source rows.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MACHINERY = (  # files of this folder that are no initialiser
    "plan",
    "spelling",
    "specials",
    "rows",
    "mixture",
    "evidence",
    "initialize",
    "options",
    "apply",
    "shared",
    "solver",
    "token_vectors",
    "snippets",
    "shards",
    "stream",
    "delta",
)


@dataclass(frozen=True)
class Initializer:
    """A registered initialiser. `copies`: an ordinary token that the source spells too gets that row, bit for bit."""

    name: str
    fn: Callable[..., Any]
    copies: bool

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (self.fn.__doc__ or "").strip().partition("\n")[0]

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence that it asks for."""
        return tuple(_parameters(self.fn, inspect.Parameter.POSITIONAL_OR_KEYWORD))[2:]

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """What a run file may set."""
        found = _parameters(self.fn, inspect.Parameter.KEYWORD_ONLY)
        return {name: parameter for name, parameter in found.items() if name not in ("side", "seed")}


INITIALIZERS: dict[str, Initializer] = {}
"""Every initialiser by its name; what a file of this folder registers."""


def initializer(*, copies: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function under its own name."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        assert fn.__name__ not in INITIALIZERS, fn.__name__
        INITIALIZERS[fn.__name__] = Initializer(fn.__name__, fn, copies)
        return fn

    return register


def _parameters(fn: Callable[..., Any], kind: Any) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(fn).parameters.items() if p.kind is kind}


for module in pkgutil.iter_modules(__path__):
    if module.name not in MACHINERY:
        importlib.import_module(f"{__name__}.{module.name}")
