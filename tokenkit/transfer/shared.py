"""Rows of a donor model: those of tokens that source and target share, and those of tokens that are new."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from tokenkit.transfer.mixture import Mixture, pieces_mixture
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Rows, block_rows


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of shared tokens: `weights[r, :lengths[r]]` of those in places `ids[r, :lengths[r]]`."""

    ids: Int64[Tensor, "R K"]
    weights: Float[Tensor, "R K"]
    lengths: Int64[Tensor, "R"]


@dataclass(frozen=True, eq=False)
class Shared:
    """What a donor knows of a plan. A donor may have fewer rows than the target has ids: tokens beyond are not here."""

    donor: Rows
    anchors: Int64[ndarray, "A"]
    """Target ids of ordinary tokens that the source has, too."""
    sources: Int64[ndarray, "A"]
    """Their source ids."""
    wanted: Int64[ndarray, "F"]
    """Target ids whose rows are to be made."""

    @staticmethod
    def of(plan: TransferPlan, donor: Rows) -> "Shared":
        """The tokens of a plan for which the donor has a row."""
        ids, sources = plan.anchors
        inside = ids < donor.shape[0]
        return Shared(donor, ids[inside], sources[inside], plan.free[plan.free < donor.shape[0]])

    @cached_property
    def table(self) -> Float[Tensor, "A D"]:
        """The donor's rows of the shared tokens."""
        return self.donor.gather(self.anchors).float()

    def blocks(self) -> Iterator[Float[Tensor, "R D"]]:
        """The donor's rows of the new tokens, in their order."""
        step = block_rows(max(self.donor.shape[1], len(self.anchors)))  # their likeness to all shared ones fits, too
        for begin in range(0, len(self.wanted), step):
            yield self.donor.gather(self.wanted[begin : begin + step]).float()

    def mixture(self, source: Rows, plan: TransferPlan, side: Side, seed: int, found: Sequence[Sums]) -> Mixture:
        """The same sums of the source's rows. A new token that is like no shared one stays with the chain."""
        chain = pieces_mixture(source, plan, side, seed=seed)
        if not found:
            return chain
        lengths = torch.cat([sums.lengths for sums in found]).numpy()
        parts = [torch.arange(sums.ids.shape[1]) < sums.lengths[:, None] for sums in found]
        ids = torch.cat([sums.ids[part] for sums, part in zip(found, parts, strict=True)]).numpy()
        weights = torch.cat([sums.weights[part] for sums, part in zip(found, parts, strict=True)]).numpy()
        some = lengths > 0
        return chain.replaced(
            self.wanted[some], lengths[some], self.sources[ids].astype(np.int32), weights.astype(np.float32)
        )
