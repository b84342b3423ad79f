"""TokAlign: each new token takes the row of the one old token that is used most like it. Li+ 2025, ACL, 2506.03523.

The vectors of two tokenisations of the same texts lie in unlike spaces. What can be compared is how near a token is to
each of the tokens that both have (relative representations: Moschella+ 2023, ICLR). The paper takes GloVe's vectors.
"""

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import initializer
from tokenkit.transfer.evidence import Texts
from tokenkit.transfer.mixture import Mixture, pieces_mixture
from tokenkit.transfer.options import check_positive
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Rows
from tokenkit.transfer.token_vectors import (
    Learning,
    Sums,
    TokenVectors,
    known_sources,
    nearest_mixed,
    sums_of,
    unit,
    vectors_of_tokens,
)


@initializer(copies=True)
def tokalign(
    source: Rows,
    plan: TransferPlan,
    texts: Texts,
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    *,
    side: Side,
    seed: int = 0,
    pivots: int = 300,
    neighbours: int = 10,
    temperature: float = 0.1,
    dimensions: int = 100,
    window_tokens: int = 2,
    min_count: int = 1,
) -> Mixture:
    """Copies of equal tokens; others copy the source token nearest by co-occurrence, or mix the `neighbours` nearest.

    Several are weighted by the softmax of cosines / temperature; the paper takes one.
    """
    how = Learning(dimensions, window_tokens, min_count, seed)
    check_positive("tokalign", pivots=pivots, neighbours=neighbours, temperature=temperature, **how.counts)

    def make() -> Sums:
        old, new = (vectors_of_tokens(texts, one, how) for one in (source_tokenizer, target_tokenizer))
        shared = frequent_anchors(old, new, plan, pivots)
        if len(shared[0]) == 0:
            return sums_of([])
        rows = plan.free[new.known[plan.free]]
        among = known_sources(old.vectors, source_tokenizer, plan)
        relative_new = unit(new.vectors[rows] @ new.vectors[shared[0]].T)
        relative_old = unit(old.vectors[among] @ old.vectors[shared[1]].T)
        return nearest_mixed(rows, relative_new, among, relative_old, neighbours, temperature)

    found = texts.once(("tokalign", plan, pivots, neighbours, temperature, how), make)
    return pieces_mixture(source, plan, side, seed=seed).replaced(*found)


def frequent_anchors(
    old: TokenVectors, new: TokenVectors, plan: TransferPlan, count: int
) -> tuple[Int64[ndarray, "P"], Int64[ndarray, "P"]]:
    """Target and source ids of the shared tokens that are frequent in both tokenisations."""
    target, source = plan.anchors
    counts = np.minimum(new.counts[target], old.counts[source])
    order = np.argsort(-counts, kind="stable")[:count]
    order = order[new.known[target[order]] & old.known[source[order]]]
    return target[order], source[order]
