"""The floor that every initialiser must beat: all ordinary tokens start alike."""

import numpy as np

from tokenkit.transfer import initializer
from tokenkit.transfer.mixture import Mixture, pieces_mixture
from tokenkit.transfer.plan import TransferPlan
from tokenkit.transfer.rows import Rows
from tokenkit.transfer.specials import Side
from tokenkit.transfer.spelling import Kind


@initializer(copies=False)
def mean(source: Rows, plan: TransferPlan, *, side: Side, seed: int = 0) -> Mixture:
    """Special tokens as `fvt` makes them; every other row is the mean of all source rows."""
    ordinary = ~np.isin(plan.kinds, (Kind.SPECIAL, Kind.OVERRIDDEN, Kind.UNREACHABLE)) & ~plan.special
    return pieces_mixture(source, plan, side, seed=seed).constant(np.flatnonzero(ordinary), centre=1.0)
