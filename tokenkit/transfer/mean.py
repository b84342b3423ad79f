"""The floor that every initialiser must beat: all ordinary tokens start alike."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokenkit.transfer import initializer
from tokenkit.transfer.fvt import fvt
from tokenkit.transfer.plan import Kind, Side, TransferPlan


@initializer(copies=False)
def mean(source_rows: Float[Tensor, "V D"], plan: TransferPlan, *, side: Side, seed: int = 0) -> Float[Tensor, "W D"]:
    """Special tokens as `fvt` makes them; every other row is the mean of all source rows."""
    rows = fvt(source_rows, plan, side=side, seed=seed)
    exact = torch.promote_types(rows.dtype, torch.float32)
    ordinary = torch.from_numpy(np.flatnonzero(plan.kinds != Kind.SPECIAL)).to(rows.device)
    rows[ordinary] = source_rows[: plan.source_vocab].mean(0, dtype=exact).to(rows.dtype)
    return rows
