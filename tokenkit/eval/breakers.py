"""New output rows that speak up where the model they were learnt from stays silent.

An initialiser that writes a donor's row as a sum of shared tokens' rows, and takes the same weights for the base's
rows, can turn a row that does nothing in the donor into one that wins everywhere in the base: the weights reach
different places. Whoever gives the donor away may have planted such a token. TokenForge, Liu+ 2026, 2601.00065.

Both models read the same ids here, so every context is a pair: what a token's row says in the base is held against
what it says in the donor at the very same place. Each model's logits are told in deviations of the rows of tokens that
both have, so that scales do not matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from torch import Tensor

from tokenkit.eval.row_facts import TO_DEVIATION, robust_z
from tokenkit.scores import LogitForm
from tokenkit.transfer.mixture import Mixture
from tokenkit.transfer.rows import Rows, block_rows

TRUSTED = 4096  # rows that logits are measured by, at most
TOP_SHARE = 0.01  # of contexts, over which the largest excess is averaged
TILE_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Reading:
    """A model's output rows for the ids of the target, and its hidden states in the contexts."""

    hidden: Float[Tensor, "N D"]
    head: Rows
    form: LogitForm


@dataclass(frozen=True, eq=False)
class Salience:
    """Of some ids, over the contexts: in deviations of trusted tokens' logits there."""

    mean: Float64[ndarray, "R"]
    top: Float64[ndarray, "R"]
    """Mean over the contexts in which it is largest."""
    wins: Int64[ndarray, "R"]
    """Contexts in which it has a larger logit than every trusted token, and does not follow."""


@dataclass(frozen=True, eq=False)
class BreakerSearch:
    """The new rows of a matrix. The score is how far a row's excess is out of line with that of other new rows."""

    ids: Int64[ndarray, "R"]
    score: Float64[ndarray, "R"]
    base: Salience
    other: Salience
    """In the donor; where there is none, of the mean of the token's pieces in the base."""
    against_donor: bool
    contexts: int
    flagged: Int64[ndarray, "F"]
    """Ids, worst first."""

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
    limit: float = 8.0,
) -> BreakerSearch:
    """Scores the rows of `ids`. `other` is the donor, or the base with rows made of pieces.

    Flagged is a row that is far out of line, wins contexts in the base, and is inert in the other: there it wins in
    fewer than a tenth as many.
    """
    trusted = trusted[np.linspace(0, len(trusted) - 1, min(TRUSTED, len(trusted))).astype(np.int64)]
    sides = [_Scale(reading, trusted) for reading in (base, other)]
    count = max(1, round(TOP_SHARE * len(labels)))
    following = torch.from_numpy(labels)
    found: list[list[Tensor]] = []
    for block in _blocks(ids, len(labels), base, other):
        one, two = (side.standardised(block) for side in sides)
        excess = one - two
        follows = following[:, None] == torch.from_numpy(block)
        told = [_of(z, side, follows, count) for z, side in zip((one, two), sides)]
        found.append([excess.mean(0), _top(excess, count), *told[0], *told[1]])
    columns = [torch.cat(part).double().cpu().numpy() for part in zip(*found)]
    mean, top = columns[:2]
    everyone = np.ones(len(ids), bool)
    score = np.maximum(robust_z(mean, everyone), robust_z(top, everyone))
    one, two = (Salience(columns[i], columns[i + 1], columns[i + 2].astype(np.int64)) for i in (2, 5))
    out = (score > limit) & (one.wins > 0) & (one.wins > 10 * two.wins)
    order = np.argsort(-score, kind="stable")
    return BreakerSearch(ids, score, one, two, against_donor, len(labels), ids[order[out[order]]])


class _Scale:
    """A model's logits per context, from the median of trusted tokens' and in their deviation."""

    def __init__(self, reading: Reading, trusted: Int64[ndarray, "A"]) -> None:
        self.reading = reading
        logits = self._logits(trusted)
        self.middle = logits.median(1, keepdim=True).values
        spread = TO_DEVIATION * (logits - self.middle).abs().median(1, keepdim=True).values
        self.spread = spread.clamp_min(torch.finfo(spread.dtype).tiny)
        self.best = (logits.amax(1, keepdim=True) - self.middle) / self.spread

    def standardised(self, ids: Int64[ndarray, "R"]) -> Float[Tensor, "N R"]:
        return (self._logits(ids) - self.middle) / self.spread

    def _logits(self, ids: Int64[ndarray, "R"]) -> Float[Tensor, "N R"]:
        form = self.reading.form
        if form.bias is not None:
            form = LogitForm(form.bias[torch.from_numpy(ids)], form.scale, form.softcap)
        return form(self.reading.hidden @ self.reading.head.gather(ids).to(self.reading.hidden).T)


def _of(values: Float[Tensor, "N R"], side: _Scale, follows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    return values.mean(0), _top(values, count), ((values > side.best) & ~follows).sum(0)


def _top(values: Float[Tensor, "N R"], count: int) -> Float[Tensor, "R"]:
    return values.topk(count, 0).values.mean(0)


def _blocks(ids: Int64[ndarray, "R"], contexts: int, base: Reading, other: Reading) -> Iterator[Int64[ndarray, "B"]]:
    width = max(base.head.shape[1], other.head.shape[1], contexts)
    step = min(block_rows(width), max(1, TILE_BYTES // (4 * contexts)))
    return (ids[begin : begin + step] for begin in range(0, len(ids), step))


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
