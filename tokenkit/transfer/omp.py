"""Orthogonal matching pursuit. Goddard & Fernandes Neto 2025, 2506.06607.

A donor model has the target tokenizer. Its row of a new token is written as a sum of a few of its rows of tokens that
source and target share, and the same sum of the source's rows of those tokens is the new row.
"""

import torch

from tokenkit.config import UserError
from tokenkit.transfer import initializer
from tokenkit.transfer.mixture import Mixture
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Rows
from tokenkit.transfer.shared import Shared, Sums
from tokenkit.transfer.solver import Atoms


@initializer(copies=True)
def omp(
    source: Rows,
    plan: TransferPlan,
    donor: Rows,
    *,
    side: Side,
    seed: int = 0,
    k: int = 64,
    screen: int | None = None,
    normalize: bool = True,
    tolerance: float = 0.0,
) -> Mixture:
    """Sums of at most `k` shared tokens, chosen and weighted so that the donor's rows of them give its row.

    `screen`: between two looks at all shared tokens, choose among so many that are most alike, where rows are wider
    than 384. `normalize`: go by the angle between rows, not by the length of the shared token's as well. `tolerance`:
    stop where no more than this share of the row's length is left.
    """
    for key, value, least in (("k", k, 1), ("screen", screen, 1), ("tolerance", tolerance, 0)):
        if value is not None and value < least:
            raise UserError(f"transfer.omp.{key}: {value}, where a number from {least} is needed")
    shared = Shared.of(plan, donor)
    if len(shared.anchors) == 0:
        return shared.mixture(source, plan, side, seed, [])
    lengths = shared.table.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    table = shared.table / lengths[:, None] if normalize else shared.table
    atoms = Atoms.of(table, rows=len(shared.wanted), k=k)

    def sums(targets: torch.Tensor) -> Sums:
        found = atoms.pursue(targets, k, screen=screen, tolerance=tolerance)
        weights = found.weights / lengths[found.ids] if normalize else found.weights
        return Sums(found.ids, weights, found.lengths)

    return shared.mixture(source, plan, side, seed, [sums(block) for block in shared.blocks()])
