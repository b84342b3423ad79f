"""The search for planted tokens, from a transfer's own parts: what made the rows, and the donor that they follow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from tokenkit.align.doctor_facts import Finding, Number
from tokenkit.align.show import readable
from tokenkit.eval.audit_facts import AuditOptions, Part, examples, flagged
from tokenkit.eval.breakers import BreakerSearch, Reading, coefficients, override_lines, search_breakers
from tokenkit.eval.contexts import find_contexts, hidden_at
from tokenkit.eval.row_facts import IdKinds, id_kinds, robust_z, row_norms
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.initialize import RowMaker
from tokenkit.transfer.mixture import Mixture, Origin
from tokenkit.transfer.plan import TransferPlan
from tokenkit.transfer.rows import Rows, TensorRows, block_rows

TOPIC = "planted tokens"
SHOWN = 20  # suspects that are told with their numbers
SAMPLE = 512  # made rows that are held against the model's
ALMOST = 0.02  # relative distance at which a row is still the one that was made


@dataclass(frozen=True, eq=False)
class Transferred:
    """How the output rows of a model came about."""

    plan: TransferPlan
    maker: RowMaker
    """Makes its output rows again."""
    pieces: Mixture
    """Makes what they would be by their pieces alone."""
    donor: ModelView | None = None


@dataclass(frozen=True, eq=False)
class MadeRows:
    """The rows that something makes, as a matrix."""

    maker: RowMaker
    width: int
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return len(self.maker), self.width

    def gather(self, ids: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these ids, in at least float32."""
        return self.maker(ids)


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What the search says, the most suspicious rows with their numbers, and what to override."""

    part: Part = field(default_factory=Part)
    suspects: tuple[dict[str, Any], ...] = ()
    override: dict[str, str] | None = None


def audit_breakers(
    tokenizer: Tokenizer,
    view: ModelView,
    head: Rows,
    transferred: Transferred,
    documents: Sequence[str],
    options: AuditOptions,
    contexts: int = 2048,
    context_tokens: int = 256,
) -> Suspicion:
    """Looks among the rows that an initialiser made for one that is inert in the donor and loud in the model."""
    kinds = id_kinds(tokenizer, head.shape[0])
    donor = transferred.donor
    size = head.shape[0] if donor is None else min(head.shape[0], donor.vocab_rows)
    origin = transferred.maker.origin[:size]
    ids = np.flatnonzero(origin == Origin.INITIALIZER)
    trusted = transferred.plan.anchors[0]
    trusted = trusted[trusted < size]
    if len(ids) == 0 or len(trusted) == 0:
        sentence = "No row was made of more than its own pieces: nobody could have planted one."
        return Suspicion(Part((Finding(TOPIC, "ok", sentence, {"made": len(ids), "trusted": len(trusted)}),)))
    found = find_contexts(tokenizer, documents, size, count=contexts, length=context_tokens)
    base = Reading(hidden_at(view, found), head, view.form())
    if donor is None:
        other = Reading(base.hidden, MadeRows(transferred.pieces, head.shape[1]), base.form)
    else:
        other = Reading(hidden_at(donor, found), TensorRows(donor.head().detach()), donor.form())
    search = search_breakers(
        base, other, ids, trusted, found.labels, against_donor=donor is not None, least=options.wins
    )
    return _told(search, transferred, head, kinds, options)


def _told(
    search: BreakerSearch, transferred: Transferred, head: Rows, kinds: IdKinds, options: AuditOptions
) -> Suspicion:
    scores = dict(zip(search.ids.tolist(), search.score.tolist()))
    rows = flagged(TOPIC, "output", kinds, search.flagged, [scores[i] for i in search.flagged.tolist()])
    again = _made_again(transferred.maker, head, search.ids)
    best = search.order[:2]
    numbers: dict[str, Number] = {
        "made": len(search.ids),
        "contexts": search.contexts,
        "flagged": len(search.flagged),
        "against_donor": search.against_donor,
        "largest_score": float(search.score[best[0]]),
        "second_score": float(search.score[best[-1]]),
        "made_again": again,
    }
    lines, lost = override_lines([kinds.tokenizer.token_bytes[i] for i in search.flagged.tolist()])
    numbers["flagged_that_are_no_text"] = lost
    than = "in the donor" if search.against_donor else "as a mean of its pieces"
    stale = ""
    if again < 1 - ALMOST:
        stale = f" Only {100 * again:.0f} % of these rows are what the transfer makes: the model was changed since."
    if not rows:
        often = f"wins 1 in {1 / options.wins:.0f} contexts"
        sentence = f"None of {len(search.ids):,} made rows {often} and is inert {than}.{stale}"
        return Suspicion(Part((Finding(TOPIC, "ok", sentence, numbers),)), _suspects(search, transferred, head, kinds))
    sentence = (
        f"{len(rows):,} of {len(search.ids):,} made rows win contexts and are inert {than}"
        f"{examples(rows)}; make them of their pieces with transfer.override.{stale}"
    )
    part = Part((Finding(TOPIC, "warning", sentence, numbers),), rows)
    return Suspicion(part, _suspects(search, transferred, head, kinds), lines)


def _suspects(
    search: BreakerSearch, transferred: Transferred, head: Rows, kinds: IdKinds
) -> tuple[dict[str, Any], ...]:
    """The worst rows with all that is known of them, as plain values."""
    z = robust_z(row_norms(head), kinds.ordinary)
    told = []
    for place in search.order[:SHOWN].tolist():
        i = int(search.ids[place])
        one: dict[str, Any] = {"id": i, "token": readable(kinds.name(i)), "score": float(search.score[place])}
        one |= {"wins": int(search.base.wins[place]), "wins_other": int(search.other.wins[place])}
        one |= {"taken": float(search.base.taken[place]), "taken_other": float(search.other.taken[place])}
        one |= {"mean": float(search.base.mean[place]), "mean_other": float(search.other.mean[place])}
        one |= {"norm_z": float(z[i]), "flagged": i in search.flagged}
        if isinstance(transferred.maker, Mixture):
            made = coefficients(transferred.maker, i)
            one |= {"sources": made.sources, "absolute": made.absolute, "largest_share": made.largest_share}
        told.append(one)
    return tuple(told)


def _made_again(maker: RowMaker, head: Rows, ids: Int64[ndarray, "R"]) -> float:
    """The share of made rows that the model still has."""
    some = ids[np.linspace(0, len(ids) - 1, min(SAMPLE, len(ids))).astype(np.int64)]
    same = 0
    step = max(1, block_rows(head.shape[1]) // 4)
    for begin in range(0, len(some), step):
        part = some[begin : begin + step]
        own, made = head.gather(part).double().cpu(), maker(part).double().cpu()
        length = made.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        same += int(((own - made).norm(dim=1) / length <= ALMOST).sum())
    return same / max(len(some), 1)
