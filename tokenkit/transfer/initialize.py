"""From the name of an initialiser to something that makes rows, a block of target ids at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.transfer import INITIALIZERS
from tokenkit.transfer.evidence import Evidence
from tokenkit.transfer.mixture import Origin
from tokenkit.transfer.plan import RULES, Rule, Side, TransferPlan
from tokenkit.transfer.rows import Known, Rows, block_rows

Options = Mapping[str, Mapping[str, Any]]


@runtime_checkable
class RowMaker(Protocol):
    """Makes the rows of target ids, and knows what each is made of."""

    @property
    def origin(self) -> UInt8[ndarray, "W"]:
        """The `Origin` of each row."""
        ...

    def __len__(self) -> int: ...

    def __call__(self, wanted: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these target ids, in at least float32."""
        ...


@dataclass(frozen=True)
class Choice:
    """Which initialiser makes the input rows, which the output rows, and their options by name."""

    initializer: str = "fvt"
    head_initializer: str | None = None
    """None: the same one."""
    options: Options = field(default_factory=dict)
    seed: int = 0
    rules: tuple[Rule, ...] = RULES
    """Which tokens are made of their pieces whatever the initialiser would make of them."""

    def __post_init__(self) -> None:
        for key in ("initializer", "head_initializer"):
            name = self.__dict__[key]
            if name is not None and name not in INITIALIZERS:
                raise UserError(f"transfer.{key}: {name!r} is unknown; write one of {', '.join(sorted(INITIALIZERS))}")

    def of(self, side: Side) -> str:
        """The name of the initialiser of a side."""
        return self.initializer if side == "input" or self.head_initializer is None else self.head_initializer

    def maker(self, side: Side, source: Rows, plan: TransferPlan, evidence: Evidence) -> RowMaker:
        """What makes the rows of a side; UserError where evidence is lacking."""
        name = self.of(side)
        entry = INITIALIZERS[name]
        plan = plan.with_rules(self.rules)
        given = [evidence.named(need, side, name) for need in entry.needs]
        return entry.fn(source, plan, *given, side=side, seed=self.seed, **self.options.get(name, {}))


def row_blocks(maker: RowMaker, padding: Known, size: int) -> Iterator[Float[Tensor, "N D"]]:
    """All rows from the first, in blocks; beyond the last id mean source rows, so that none of them has the largest
    logit of all."""
    width = padding.rows.shape[1]
    step = max(1, block_rows(width) // 4)  # a row is made of several
    for begin in range(0, len(maker), step):
        yield maker(np.arange(begin, min(begin + step, len(maker))))
    if size > len(maker):
        yield padding.mean.expand(size - len(maker), -1)


def all_rows(maker: RowMaker, source: Rows, plan: TransferPlan, size: int) -> Float[Tensor, "R D"]:
    """The whole matrix, in the type of the source."""
    known = Known(source, min(plan.source_vocab, source.shape[0]))
    return torch.cat([block.to(source.dtype) for block in row_blocks(maker, known, size)])


def origins(maker: RowMaker) -> dict[str, int]:
    """How many rows were made in which way, only ways that occur."""
    counts = np.bincount(maker.origin, minlength=len(Origin)).tolist()
    return {origin.name.lower(): counts[origin] for origin in Origin if counts[origin]}
