"""WECHSEL: the nearest source tokens in a space of vectors that both vocabularies share. Minixhofer+ 2022, NAACL 293.

The paper aligns fastText vectors of two languages by a dictionary. Here texts of any languages make one space, by the
words whose byte n-grams a token shares (`words`); or each tokenisation makes its own, and the tokens that both have
turn one onto the other, by orthogonal Procrustes (`tokens`).
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

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
    known_sources,
    nearest_mixed,
    vectors_by_bytes,
    vectors_of_tokens,
)


@initializer(copies=True)
def wechsel(
    source: Rows,
    plan: TransferPlan,
    texts: Texts,
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    *,
    side: Side,
    seed: int = 0,
    space: Literal["words", "tokens"] = "tokens",
    neighbours: int = 10,
    temperature: float = 0.1,
    dimensions: int = 100,
    window_tokens: int = 2,
    min_count: int = 1,
) -> Mixture:
    """Copies of equal tokens; others are the softmax of cosines / temperature over the nearest source tokens."""
    how = Learning(dimensions, window_tokens, min_count, seed)
    check_positive("wechsel", neighbours=neighbours, temperature=temperature, **how.counts)

    def make() -> Sums:
        if space == "words":
            old, new = vectors_by_bytes(texts, [source_tokenizer, target_tokenizer], how)
        else:
            new = vectors_of_tokens(texts, target_tokenizer, how).vectors
            old = turned(vectors_of_tokens(texts, source_tokenizer, how).vectors, new, plan.anchors)
        rows = plan.free[new[plan.free].any(1).numpy()]
        among = known_sources(old, source_tokenizer, plan)
        return nearest_mixed(rows, new[rows], among, old[among], neighbours, temperature)

    found = texts.once(("wechsel", plan, space, neighbours, temperature, how), make)
    return pieces_mixture(source, plan, side, seed=seed).replaced(*found)


def turned(
    old: Float[Tensor, "V E"], new: Float[Tensor, "W E"], anchors: tuple[Int64[ndarray, "A"], Int64[ndarray, "A"]]
) -> Float[Tensor, "V E"]:
    """The old space, turned so that its anchors come to lie on the new one's; anchors are target ids and source ids."""
    left, _, right = torch.linalg.svd(old[anchors[1]].T @ new[anchors[0]])
    return old @ (left @ right)
