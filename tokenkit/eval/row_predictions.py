"""What each output row does in held-out contexts: how likely it is, how often it is among the first, where it wins."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from torch import Tensor

from tokenkit.scores import LogitForm
from tokenkit.transfer.rows import Rows

TILE_BYTES = 64 << 20  # of logits in float32 that are in memory at once

LogitBlocks = Callable[[], Iterator[tuple[slice, Float[Tensor, "N V"]]]]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Per id, over the contexts."""

    contexts: int
    mean_logp: Float64[ndarray, "V"]
    """Mean log-probability, in nats."""
    peak_logp: Float64[ndarray, "V"]
    """The largest log-probability."""
    mass: Float64[ndarray, "V"]
    """Mean probability."""
    among_first: Int64[ndarray, "V"]
    """Contexts in which the id is among the first n; ids with the same logit as the n-th count too."""
    wins: Int64[ndarray, "V"]
    """Contexts in which no id has a larger logit, and none before it the same."""
    false_wins: Int64[ndarray, "V"]
    """Of these, contexts in which another id follows."""


@torch.no_grad()
def predictions(
    hidden: Float[Tensor, "N D"], head: Rows, form: LogitForm, labels: Int64[ndarray, "N"], *, first: int = 10
) -> Predictions:
    """Two passes over the output rows, a block at a time: no table of contexts x vocabulary is held."""

    def tiles() -> Iterator[tuple[slice, Float[Tensor, "N V"]]]:
        size = head.shape[0]
        step = max(1, TILE_BYTES // (4 * len(hidden)))
        for begin in range(0, size, step):
            columns = slice(begin, min(begin + step, size))
            rows = head.gather(np.arange(columns.start, columns.stop)).to(hidden)
            yield columns, form(hidden @ rows.T, columns).nan_to_num(nan=-torch.inf)

    total, least, winner = _over_all(tiles, len(hidden), min(first, head.shape[0]))
    size = head.shape[0]
    mean, peak, mass = np.empty(size), np.empty(size), np.empty(size)
    among = np.empty(size, np.int64)
    for columns, logits in tiles():
        among[columns] = (logits >= least[:, None]).sum(0).cpu().numpy()
        logp = logits - total[:, None]
        mean[columns] = logp.double().mean(0).cpu().numpy()
        peak[columns] = logp.amax(0).double().cpu().numpy()
        mass[columns] = logp.exp_().double().mean(0).cpu().numpy()
    wrong = winner != labels
    wins, false_wins = (np.bincount(one, minlength=size).astype(np.int64) for one in (winner, winner[wrong]))
    return Predictions(len(hidden), mean, peak, mass, among, wins, false_wins)


def _over_all(tiles: LogitBlocks, contexts: int, first: int) -> tuple[Tensor, Tensor, Int64[ndarray, "N"]]:
    """Per context the log of the sum of exponentials, the n-th largest logit, and the id of the largest."""
    total: Tensor | None = None
    top: Tensor | None = None
    best: Tensor | None = None
    winner = np.zeros(contexts, np.int64)
    for columns, logits in tiles():
        part = logits.logsumexp(1)
        total = part if total is None else torch.logaddexp(total, part)
        highest = logits if top is None else torch.cat([top, logits], 1)
        top = highest.topk(min(first, highest.shape[1]), dim=1).values
        peak, place = logits.max(1)
        better = torch.ones_like(peak, dtype=torch.bool) if best is None else peak > best
        best = peak if best is None else torch.maximum(best, peak)
        chosen = better.cpu().numpy()
        winner[chosen] = place.cpu().numpy()[chosen] + columns.start
    assert total is not None
    assert top is not None
    return total, top[:, -1], winner
