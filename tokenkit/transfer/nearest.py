"""Nearest shared tokens in a donor's rows: softmax of their cosines, as WECHSEL takes it of word vectors.

Minixhofer+ 2022, 2112.06598, with its k and temperature; the vectors are those of a donor with the target tokenizer.
"""

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
def nearest(
    source: Rows,
    plan: TransferPlan,
    donor: Rows,
    *,
    side: Side,
    seed: int = 0,
    k: int = 10,
    temperature: float = 0.1,
) -> Mixture:
    """Means of the `k` shared tokens whose donor rows are most alike, weighted by the softmax of the cosine.

    A low `temperature` takes the nearest alone, a high one the plain mean of the k.
    """
    for key, value, least in (("k", k, 1), ("temperature", temperature, 1e-6)):
        if value < least:
            raise UserError(f"transfer.nearest.{key}: {value}, where a number from {least} is needed")
    shared = Shared.of(plan, donor)
    if len(shared.anchors) == 0:
        return shared.mixture(source, plan, side, seed, [])
    table = normalize(shared.table, dim=1)

    def sums(targets: Tensor) -> Sums:
        found = (normalize(targets, dim=1) @ table.T).topk(min(k, len(table)), dim=1)
        known = targets.any(1) * found.values.shape[1]  # a row of zeros is like none
        return Sums(found.indices, torch.softmax(found.values / temperature, dim=1), known)

    return shared.mixture(source, plan, side, seed, [sums(block) for block in shared.blocks()])
