"""Which rows of a transferred model are of tokens that the old tokenizer does not have."""

from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.plan import Override, plan_transfer
from tokenkit.transfer.spelling import Kind


def new_rows(
    source: Tokenizer, target: Tokenizer, *, source_rows: int, rows: int, override: Override = MappingProxyType({})
) -> Bool[Tensor, "V"]:
    """Of `rows` rows those whose token the source has no row for.

    Old are tokens of the same bytes, and special tokens that took the row of a special token: the same literal or the
    same part in texts. New are all others, also rows chosen by hand, and rows that no text becomes.
    """
    plan = plan_transfer(source, target, source_rows=source_rows, override=override)
    old = plan.kinds == Kind.COPIED
    special = np.flatnonzero((plan.kinds == Kind.SPECIAL) & (plan.lengths == 1))
    taken = plan.pieces[plan.offsets[:-1][special]]
    old[special[np.isin(taken, sorted(source.special_ids))]] = True
    found = torch.ones(rows, dtype=torch.bool)
    found[: len(plan)] = torch.from_numpy(~old)
    return found
