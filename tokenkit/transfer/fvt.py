"""Fast vocabulary transfer: equal tokens are copied, the others are the mean of their pieces. Gee+ 2022."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokenkit.transfer import initializer
from tokenkit.transfer.plan import Kind, Side, TransferPlan

BLOCK = 8192  # target rows whose pieces are gathered at once, in at least float32


@initializer(copies=True)
def fvt(source_rows: Float[Tensor, "V D"], plan: TransferPlan, *, side: Side, seed: int = 0) -> Float[Tensor, "W D"]:
    """Copies of equal tokens, else means over pieces (Gee+ 2022); a random row only for bytes the source lacks."""
    device, exact = source_rows.device, torch.promote_types(source_rows.dtype, torch.float32)
    pieces = torch.from_numpy(plan.side(side)).to(device, torch.int64)
    known = source_rows[: plan.source_vocab]
    rows = torch.empty(len(plan), source_rows.shape[1], dtype=source_rows.dtype, device=device)
    rows[:] = known.mean(0, dtype=exact)
    single = plan.lengths == 1
    rows[_on(np.flatnonzero(single), device)] = source_rows[pieces[_on(plan.offsets[:-1][single], device)]]
    several = np.flatnonzero(plan.lengths > 1)
    for begin in range(0, len(several), BLOCK):
        ids = several[begin : begin + BLOCK]
        flat = np.concatenate([np.arange(plan.offsets[i], plan.offsets[i + 1]) for i in ids])
        gathered = source_rows[pieces[_on(flat, device)]].to(exact)
        means = torch.segment_reduce(gathered, "mean", lengths=_on(plan.lengths[ids], device))
        rows[_on(ids, device)] = means.to(rows.dtype)
    drawn = np.flatnonzero(plan.kinds == Kind.DRAWN)
    if len(drawn):
        spread = known.to(exact).std(0, correction=0)
        noise = torch.randn(len(drawn), rows.shape[1], generator=torch.Generator().manual_seed(seed), dtype=exact)
        rows[_on(drawn, device)] = (known.mean(0, dtype=exact) + spread * noise.to(device)).to(rows.dtype)
    return rows


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
