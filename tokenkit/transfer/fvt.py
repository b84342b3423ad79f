"""Fast vocabulary transfer, seen as bytes. Gee+ 2022, EMNLP industry track 41."""

from dataclasses import replace

from tokenkit.transfer import initializer
from tokenkit.transfer.mixture import Mixture, pieces_mixture
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Rows


@initializer(copies=True)
def fvt(source: Rows, plan: TransferPlan, *, side: Side, seed: int = 0, keep_norm: bool = False) -> Mixture:
    """Copies of equal tokens, else means over pieces; a random row only for bytes the source lacks.

    `keep_norm` makes a mean as long as its pieces are on average.
    """
    return replace(pieces_mixture(source, plan, side, seed=seed), keep_norm=keep_norm)
