"""Draws from the normal distribution of the source rows. Hewitt 2021, "Initializing new word embeddings"."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.transfer import initializer
from tokenkit.transfer.mixture import Mixture, pieces_mixture
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Rows


@initializer(copies=True)
def normal(source: Rows, plan: TransferPlan, *, side: Side, seed: int = 0, scale: float = 1.0) -> Mixture:
    """Copies of equal tokens; every other ordinary row is drawn from N(mean, scale x covariance) of the source rows.

    `resize_token_embeddings` of transformers means scale 1e-9, and takes the mean itself where rounding makes its
    covariance indefinite. Here a covariance of any rank is drawn from.
    """
    if scale < 0:
        raise UserError(f"transfer.normal.scale: {scale}, where 0 or more is needed")
    made = pieces_mixture(source, plan, side, seed=seed).constant(plan.free, centre=1.0, noise=scale**0.5)
    return replace(made, spread=covariance_root(made.known.covariance)) if len(plan.free) else made


def covariance_root(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """A matrix whose product with its transpose is the covariance, which may be singular."""
    exact = covariance.double()
    root, failed = torch.linalg.cholesky_ex(exact)
    if failed.item():
        values, directions = torch.linalg.eigh(exact)
        root = directions * values.clamp_min(0).sqrt()
    return root.to(covariance.dtype)
