"""FOCUS: new tokens as few of the shared ones, those that are used alike. Dobler and de Melo 2023, EMNLP 829.

Vectors of the target's tokens are learnt from text as the target cuts it (`token_vectors`; the paper takes fastText).
The paper's weights are sparsemax (Martins and Astudillo 2016, ICML) of plain cosines, which is temperature 1.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import initializer
from tokenkit.transfer.evidence import Texts
from tokenkit.transfer.mixture import Mixture, pieces_mixture
from tokenkit.transfer.options import check_positive
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Rows
from tokenkit.transfer.token_vectors import Learning, Sums, nearest, sums_of, vectors_of_tokens

LOOKED_AT = 256  # largest similarities, before all of them are where a sparsemax has a larger support


@initializer(copies=True)
def focus(
    source: Rows,
    plan: TransferPlan,
    texts: Texts,
    target_tokenizer: Tokenizer,
    *,
    side: Side,
    seed: int = 0,
    temperature: float = 1.0,
    dimensions: int = 100,
    window_tokens: int = 2,
    min_count: int = 1,
) -> Mixture:
    """Copies of equal tokens; others are made of the copied ones with the nearest vectors, by sparsemax of cosines."""
    how = Learning(dimensions, window_tokens, min_count, seed)
    check_positive("focus", temperature=temperature, **how.counts)

    def make() -> Sums:
        vectors = vectors_of_tokens(texts, target_tokenizer, how)
        rows = plan.free[vectors.known[plan.free]]
        anchors, anchor_sources = (one[vectors.known[plan.anchors[0]]] for one in plan.anchors)
        among, sums = vectors.vectors[anchors], []
        for part, values, ids in nearest(vectors.vectors[rows], among, LOOKED_AT):
            weights = sparsemax(values / temperature)
            wide = (weights[:, -1] > 0).nonzero()[:, 0] if len(anchors) > LOOKED_AT else torch.zeros(0).long()
            for row in wide.tolist():  # the least of those looked at has a weight: there may be more
                every, order = (vectors.vectors[rows[part][row]] @ among.T).sort(descending=True)
                one = sparsemax(every[None] / temperature)
                sums.append((rows[part][row : row + 1], one, anchor_sources[order.numpy()][None]))
            narrow = np.setdiff1d(np.arange(len(ids)), wide.numpy())
            sums.append((rows[part][narrow], weights[narrow], anchor_sources[ids[narrow]]))
        return sums_of(sums)

    found = texts.once(("focus", plan, temperature, how), make)
    return pieces_mixture(source, plan, side, seed=seed).replaced(*found)


def sparsemax(falling: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """The nearest distribution to each row of falling numbers: all lowered by one amount, and none below 0."""
    sums = falling.cumsum(1)
    counts = torch.arange(1, falling.shape[1] + 1)
    support = (1 + counts * falling > sums).sum(1, keepdim=True)
    lowered_by = (sums.gather(1, support - 1) - 1) / support
    return (falling - lowered_by).clamp_min(0)
