"""Cross-lingual and progressive transfer: weights by likeness in a donor. Ostendorff & Rehm 2023, 2301.09626."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenkit.config import UserError
from tokenkit.transfer import initializer
from tokenkit.transfer.mixture import Mixture
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Rows
from tokenkit.transfer.shared import Shared, Sums


@initializer(copies=True)
def clp(source: Rows, plan: TransferPlan, donor: Rows, *, side: Side, seed: int = 0, top: int | None = 256) -> Mixture:
    """Means of shared tokens, weighted by the cosine of their donor rows where it is positive.

    The paper takes all shared tokens, which is `top: null` and makes every new row much like the mean of all; `top`
    takes so many of the most alike.
    """
    if top is not None and top < 1:
        raise UserError(f"transfer.clp.top: {top}, where a number from 1 is needed; write null for all")
    shared = Shared.of(plan, donor)
    if len(shared.anchors) == 0:
        return shared.mixture(source, plan, side, seed, [])
    table = normalize(shared.table, dim=1)
    size = len(table) if top is None else min(top, len(table))

    def sums(targets: Tensor) -> Sums:
        found = (normalize(targets, dim=1) @ table.T).topk(size, dim=1)
        likeness = found.values.clamp_min(0)
        weights = likeness / likeness.sum(1, keepdim=True).clamp_min(torch.finfo(likeness.dtype).tiny)
        return Sums(found.indices, weights, (likeness > 0).sum(1))

    return shared.mixture(source, plan, side, seed, [sums(block) for block in shared.blocks()])
