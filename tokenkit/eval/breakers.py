"""New output rows that speak up where the model they were learnt from stays silent.

An initialiser that writes a donor's row as a sum of shared tokens' rows, and takes the same weights for the base's
rows, can turn a row that does nothing in the donor into one that wins everywhere in the base: the weights reach
different places. Whoever gives the donor away may have planted such a token. TokenForge, Liu+ 2026, 2601.00065.

Both models read the same ids here, so every context is a pair: what a token's row takes in the base is held against
what it takes in the donor at the very same places. What it takes is its probability beside tokens that both models
have, where it is not what follows: that is the harm which a loud row does.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from torch import Tensor

from tokenkit.eval.row_facts import TO_DEVIATION
from tokenkit.scores import LogitForm
from tokenkit.transfer.mixture import Mixture
from tokenkit.transfer.rows import Rows, block_rows

TRUSTED = 4096  # rows that logits are measured by, at most
TILE_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Reading:
    """A model's output rows for the ids of the target, and its hidden states in the contexts."""

    hidden: Float[Tensor, "N D"]
    head: Rows
    form: LogitForm


@dataclass(frozen=True, eq=False)
class Salience:
    """Of some ids, over the contexts that they do not follow."""

    taken: Float64[ndarray, "R"]
    """Mean probability beside the trusted tokens."""
    wins: Int64[ndarray, "R"]
    """Contexts in which it has a larger logit than every trusted token."""
    mean: Float64[ndarray, "R"]
    """Mean logit, in deviations of the trusted tokens' logits from their median."""


@dataclass(frozen=True, eq=False)
class BreakerSearch:
    """The new rows of a matrix. The score is what a row takes in the base and not in the other: at most 1."""

    ids: Int64[ndarray, "R"]
    base: Salience
    other: Salience
    """In the donor; where there is none, of the mean of the token's pieces in the base."""
    against_donor: bool
    contexts: int
    flagged: Int64[ndarray, "F"]
    """Ids, worst first."""

    @property
    def score(self) -> Float64[ndarray, "R"]:
        """Share of places that a row takes in the base beyond what it takes in the other."""
        return self.base.taken - self.other.taken

    @property
    def order(self) -> Int64[ndarray, "R"]:
        """Places in `ids`, worst first."""
        return np.argsort(-self.score, kind="stable")

    def rank(self, i: int) -> int:
        """The rank of an id among all new rows, from 1."""
        return int(np.flatnonzero(self.ids[self.order] == i)[0]) + 1


@torch.no_grad()
def search_breakers(
    base: Reading,
    other: Reading,
    ids: Int64[ndarray, "R"],
    trusted: Int64[ndarray, "A"],
    labels: Int64[ndarray, "N"],
    *,
    against_donor: bool = True,
    least: float = 0.01,
) -> BreakerSearch:
    """Scores the rows of `ids`. `other` is the donor, or the base with rows made of pieces.

    Flagged is a row that wins at least a share `least` of the contexts in the base and is inert in the other: there it
    wins fewer than a tenth as many.
    """
    trusted = trusted[np.linspace(0, len(trusted) - 1, min(TRUSTED, len(trusted))).astype(np.int64)]
    found = [_salience(reading, ids, trusted, labels) for reading in (base, other)]
    one, two = found
    out = (one.wins >= max(1, least * len(labels))) & (one.wins > 10 * two.wins)
    order = np.argsort(two.taken - one.taken, kind="stable")
    return BreakerSearch(ids, one, two, against_donor, len(labels), ids[order[out[order]]])


def _salience(
    reading: Reading, ids: Int64[ndarray, "R"], trusted: Int64[ndarray, "A"], labels: Int64[ndarray, "N"]
) -> Salience:
    known = _logits(reading, trusted)
    best, total = known.amax(1, keepdim=True), known.logsumexp(1, keepdim=True)
    middle = known.median(1, keepdim=True).values
    spread = TO_DEVIATION * (known - middle).abs().median(1, keepdim=True).values
    spread = spread.clamp_min(torch.finfo(spread.dtype).tiny)
    following = torch.from_numpy(labels).to(known.device)
    step = max(1, min(block_rows(reading.head.shape[1]), TILE_BYTES // (4 * len(labels))))
    parts: list[list[Tensor]] = []
    for begin in range(0, len(ids), step):
        block = ids[begin : begin + step]
        logits = _logits(reading, block)
        apart = following[:, None] != torch.from_numpy(block).to(known.device)
        taken = torch.where(apart, torch.sigmoid(logits - total), 0).sum(0) / apart.sum(0).clamp_min(1)
        parts.append([taken, ((logits > best) & apart).sum(0), ((logits - middle) / spread).mean(0)])
    taken, wins, mean = (torch.cat(part).double().cpu().numpy() for part in zip(*parts))
    return Salience(taken, wins.astype(np.int64), mean)


def _logits(reading: Reading, ids: Int64[ndarray, "R"]) -> Float[Tensor, "N R"]:
    form = reading.form
    if form.bias is not None:
        form = LogitForm(form.bias[torch.from_numpy(ids)], form.scale, form.softcap)
    return form(reading.hidden @ reading.head.gather(ids).to(reading.hidden).T)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What a new row is made of."""

    sources: int
    absolute: float
    """Sum of the weights' absolute values; 1 for a mean. Large weights that cancel are what an attack needs."""
    largest_share: float
    """Of that sum, what the heaviest source has."""


def coefficients(mixture: Mixture, i: int) -> Coefficients:
    """The weights of one row."""
    weights = np.abs([weight for _, weight in mixture.sources(i)])
    total = float(weights.sum())
    return Coefficients(len(weights), total, float(weights.max(initial=0)) / total if total else 0.0)


def override_lines(spelled: list[bytes]) -> tuple[dict[str, str], int]:
    """`transfer.override` that makes these tokens of their own pieces; how many are no text and cannot be named."""
    texts: dict[str, str] = {}
    lost = 0
    for spelling in spelled:
        try:
            text = spelling.decode()
            texts[text] = text
        except UnicodeDecodeError:
            lost += 1
    return texts, lost
