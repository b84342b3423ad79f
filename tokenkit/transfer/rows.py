"""Rows of a matrix, read where they are wanted: of a tensor in memory, or of a file that is never read whole."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

BLOCK_BYTES = 64 << 20  # of rows in float32 that are in memory at once where a whole matrix is gone through


@runtime_checkable
class Rows(Protocol):
    """An embedding or output matrix, a row per id."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix as it is stored."""
        ...

    def gather(self, ids: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these ids, in at least float32."""
        ...


@dataclass(frozen=True, eq=False)
class TensorRows:
    """The rows of a matrix in memory."""

    matrix: Float[Tensor, "V D"]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.matrix.dtype

    def gather(self, ids: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these ids, in at least float32."""
        rows = self.matrix[torch.from_numpy(ids).to(self.matrix.device)]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


def block_rows(width: int) -> int:
    """How many rows of a width are looked at together."""
    return max(1, BLOCK_BYTES // (4 * max(1, width)))


@dataclass(frozen=True, eq=False)
class Known:
    """Statistics of the first `size` rows of a matrix, those that stand for an id; in one pass each."""

    rows: Rows
    size: int

    @cached_property
    def mean(self) -> Float[Tensor, "D"]:
        """The mean row, in at least float32."""
        return self._sum(lambda block: block.double().sum(0)).div(self.size).to(self._exact)

    @cached_property
    def deviation(self) -> Float[Tensor, "D"]:
        """The standard deviation of every dimension over the rows, divided by their number."""
        centre = self.mean.double()
        return self._sum(lambda block: (block.double() - centre).square().sum(0)).div(self.size).sqrt().to(self._exact)

    @cached_property
    def covariance(self) -> Float[Tensor, "D D"]:
        """The covariance of the dimensions over the rows, divided by their number."""
        centre = self.mean

        def products(block: Tensor) -> Tensor:
            return ((block - centre).T @ (block - centre)).double()

        return self._sum(products).div(self.size).to(self._exact)

    @property
    def _exact(self) -> torch.dtype:
        return torch.promote_types(self.rows.dtype, torch.float32)

    def _sum(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        step = block_rows(self.rows.shape[1])
        blocks = (np.arange(begin, min(begin + step, self.size)) for begin in range(0, self.size, step))
        return reduce(add, (of(self.rows.gather(block)) for block in blocks))
