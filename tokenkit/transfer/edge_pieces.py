"""Pieces weighted from one edge: what was read last decides an input, what is said first decides an output.

Where a source model reads the pieces of a token, it has read all of it only at the last one, and where it writes the
token, it chooses the first one. So input rows lean on last pieces and output rows on first ones. The idea is that of
jukofyork/transplant-vocab (2025); AdaptiVocab (Nakash+ 2025, 2503.19693) weights both sides in the same directions.
"""

import numpy as np

from tokenkit.config import UserError
from tokenkit.transfer import initializer
from tokenkit.transfer.mixture import Mixture, pieces_mixture, ranges
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Rows


@initializer(copies=True)
def edge_pieces(
    source: Rows, plan: TransferPlan, *, side: Side, seed: int = 0, input_decay: float = 0.5, head_decay: float = 0.5
) -> Mixture:
    """Copies of equal tokens, else pieces weighted from the last one back (input) or from the first one on (output).

    Every further piece has `input_decay` or `head_decay` times the weight of the one before it: 0 is the edge alone,
    1 is `fvt`. A model with one matrix for both takes the input side.
    """
    for name, decay in (("input_decay", input_decay), ("head_decay", head_decay)):
        if not 0 <= decay <= 1:
            raise UserError(f"transfer.edge_pieces.{name}: {decay}, where a number from 0 to 1 is needed")
    rows = plan.free[plan.lengths[plan.free] > 0]
    lengths = plan.lengths[rows]
    firsts = np.cumsum(lengths) - lengths
    from_edge = np.arange(int(lengths.sum())) - np.repeat(firsts, lengths)
    decay = head_decay
    if side == "input":
        from_edge, decay = np.repeat(lengths - 1, lengths) - from_edge, input_decay
    weights = np.power(decay, from_edge, dtype=np.float64)
    group = np.repeat(np.arange(len(rows)), lengths)
    weights /= np.bincount(group, weights, len(rows))[group]
    used = weights > 0
    ids = plan.side(side)[ranges(plan.offsets[:-1][rows], lengths)]
    counts = np.bincount(group[used], minlength=len(rows))
    mixture = pieces_mixture(source, plan, side, seed=seed)
    return mixture.replaced(rows, counts, ids[used], weights[used].astype(np.float32))
