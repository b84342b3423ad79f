"""Rows of nothing: a floor beside `mean`. Zero rows give every new token the same logit, 0, and the same input."""

from tokenkit.transfer import initializer
from tokenkit.transfer.mixture import Mixture, pieces_mixture
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Rows


@initializer(copies=True)
def zero(source: Rows, plan: TransferPlan, *, side: Side, seed: int = 0) -> Mixture:
    """Copies of equal tokens; every other ordinary row is zero."""
    return pieces_mixture(source, plan, side, seed=seed).constant(plan.free, centre=0.0)
