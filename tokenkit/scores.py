"""Log-probabilities of a vocabulary's head without its logits: tokens x vocabulary is never held.

Logits exist for one tile of rows x vocabulary at a time and are computed again in the backward pass. They may be
scaled, shifted by a bias and capped, as Cohere's, GPT-J's and Gemma 2's are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenkit import fused

TILE = {"cpu": (512, 2048), "cuda": (4096, 32768)}  # rows x vocabulary that exist at one time: a cache, or 512 MiB
NO_LABEL, UNREAD = -1, -2  # in the place of a label: nothing to score; padding, of which no mass is read either
FAINT = -60.0  # nats below which a mass is added up on its own
WHOLE = 2**24  # logits that exist at one time where gradients are taken before they are asked for
FEWEST = 64  # rows for which that pays: the head's gradient is passed over once for all of them


@dataclass(frozen=True)
class LogitForm:
    """How logits follow from x = head @ hidden: cap(scale * (x + bias)), where cap(z) = softcap * tanh(z / softcap)."""

    bias: Float[Tensor, "V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, products: Float[Tensor, "*N W"], columns: slice = slice(None)) -> Float[Tensor, "*N W"]:
        """The logits of some columns of head @ hidden."""
        shifted = products if self.bias is None else products + self.bias[columns]
        scaled = shifted if self.scale == 1 else shifted * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def pull_back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient at the products, from the one at the logits; `gradient` is overwritten."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square_())
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


PLAIN = LogitForm()


def token_scores(
    hidden: Float[Tensor, "*N D"],
    head: Float[Tensor, "V D"],
    labels: Int[Tensor, "*N"],
    boundary: Bool[Tensor, "V"] | None = None,
    form: LogitForm = PLAIN,
    *,
    alike: bool = False,
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """Log-probability of each label and log-mass of the boundary tokens (0 without `boundary`), in nats.

    A label below 0 is scored 0, and where it is `UNREAD` the mass may be 0 too: such positions cost nothing on a CPU.
    `alike`: every label's score will count for as much as any other's, so on a CPU gradients are taken along with the
    scores; if it was not so, they are taken again. On a GPU the label alone is left to another package's kernel, if one
    is installed.
    """
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    kernel = _kernel(rows, form) if boundary is None else None
    if kernel is not None:
        flat = fused.label_logp(kernel, rows, head, ids, form.bias, form.scale, form.softcap)
        return flat.view(labels.shape), torch.zeros_like(flat).view(labels.shape)
    wanted = _wanted(ids, NO_LABEL if boundary is None else UNREAD) if hidden.device.type == "cpu" else None
    if wanted is not None:
        rows, ids = rows[wanted], ids[wanted]
    if alike and boundary is None and _may_go_ahead(rows, head, form):
        label = _AlikeScores.apply(rows, head, ids, form)
        mass = torch.zeros_like(label)
    else:
        label, mass = _Scores.apply(rows, head, form.bias, ids.unsqueeze(1), boundary, form, False)
    if wanted is not None:
        label, mass = (x.new_zeros(labels.numel()).index_copy(0, wanted, x.view(-1)) for x in (label, mass))
    return label.view(labels.shape), mass.view(labels.shape)


def scores_at(
    hidden: Float[Tensor, "*N D"],
    head: Float[Tensor, "V D"],
    ids: Int[Tensor, "*N K"],
    form: LogitForm = PLAIN,
) -> tuple[Float[Tensor, "*N K"], Float[Tensor, "*N"]]:
    """Log-probability of each id, and log-mass of all the others (the tail), in nats; a row's ids differ."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    values, tail = _Scores.apply(rows, head, form.bias, ids.reshape(-1, ids.shape[-1]), None, form, True)
    return values.view(ids.shape), tail.view(ids.shape[:-1])


def top_k_scores(
    hidden: Float[Tensor, "*N D"], head: Float[Tensor, "V D"], k: int, form: LogitForm = PLAIN
) -> tuple[Float[Tensor, "*N K"], Int[Tensor, "*N K"], Float[Tensor, "*N"]]:
    """The k largest log-probabilities in falling order, their ids, and the log-mass of the tail, in nats."""
    with torch.no_grad():
        ids = _top_k_ids(hidden.reshape(-1, hidden.shape[-1]), head, k, form).view(*hidden.shape[:-1], -1)
    values, tail = scores_at(hidden, head, ids, form)
    return values, ids, tail


def token_scores_of_logits(
    logits: Float[Tensor, "*N V"], labels: Int[Tensor, "*N"], boundary: Bool[Tensor, "V"] | None = None
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """`token_scores` where logits exist anyway: no product with the head, and no second tensor of their size kept."""
    total = logits.logsumexp(-1)
    label = logits.gather(-1, labels.clamp_min(0).long().unsqueeze(-1)).squeeze(-1) - total
    label = label.masked_fill(labels < 0, 0.0)
    if boundary is None:
        return label, torch.zeros_like(label)
    return label, logits[..., boundary.nonzero().squeeze(1)].logsumexp(-1) - total


def token_scores_dense(
    logits: Float[Tensor, "*N V"], labels: Int[Tensor, "*N"], boundary: Bool[Tensor, "V"] | None = None
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """`token_scores` the plain way, from logits that already exist."""
    logp = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
    label = logp.gather(-1, labels.clamp_min(0).long().unsqueeze(-1)).squeeze(-1).masked_fill(labels < 0, 0.0)
    if boundary is None:
        return label, torch.zeros_like(label)
    return label, logp.masked_fill(~boundary, -torch.inf).logsumexp(-1)


def _wanted(ids: Tensor, above: int) -> Tensor | None:
    """Places of the rows whose label is above a number; None where that is all of them."""
    mask = ids > above
    return None if bool(mask.all()) else mask.nonzero().squeeze(1)


def _may_go_ahead(hidden: Tensor, head: Tensor, form: LogitForm) -> bool:
    """Whether gradients will be asked for that are simple enough to be taken beforehand."""
    simple = form.bias is None and form.softcap is None and hidden.device.type == "cpu"
    return simple and len(hidden) > 0 and torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)


def _kernel(hidden: Tensor, form: LogitForm) -> fused.Kernel | None:
    kind = {"bias": form.bias is not None, "softcap": form.softcap is not None}
    return fused.choose(hidden.device.type, hidden.dtype, **kind, packages=fused.installed())


def _top_k_ids(hidden: Tensor, head: Tensor, k: int, form: LogitForm) -> Tensor:
    row_parts, column_parts = _tiles(hidden, head)
    values = [hidden.new_empty(len(hidden[rows]), 0, dtype=_accumulator(hidden)) for rows in row_parts]
    ids = [torch.empty_like(few, dtype=torch.long) for few in values]
    for columns in column_parts:
        part = head[columns].to(hidden.dtype)
        for number, rows in enumerate(row_parts):
            logits = _logits(hidden[rows], part, columns, form)
            own = torch.arange(columns.start, columns.stop, device=logits.device).expand_as(logits)
            candidates, candidate_ids = torch.cat([values[number], logits], 1), torch.cat([ids[number], own], 1)
            values[number], place = candidates.topk(min(k, candidates.shape[1]), 1)
            ids[number] = candidate_ids.gather(1, place)
    return torch.cat(ids)


class _Scores(torch.autograd.Function):
    """Log-softmax of a head at some ids per row, and the log-mass of a token set or, with `rest`, of all other ids."""

    @staticmethod
    def forward(ctx, hidden, head, bias, ids, boundary, form, rest):
        row_parts, column_parts = _tiles(hidden, head)
        peak = hidden.new_full((len(ids),), -torch.inf, dtype=_accumulator(hidden))
        total, mass = torch.zeros_like(peak), torch.zeros_like(peak)
        at = peak.new_zeros(ids.shape)
        weight = _set_weight(boundary, rest, head, peak.dtype)
        for columns in column_parts:
            part = head[columns].to(hidden.dtype)  # once, however many rows there are
            for rows in row_parts:
                logits = _logits(hidden[rows], part, columns, form)
                here = _places(ids[rows], columns)
                at[rows][here[0], here[1]] = logits[here[0], here[2]]
                new_peak = torch.maximum(peak[rows], logits.amax(1))
                shrink = (peak[rows] - new_peak).exp_()
                exp = logits.sub_(new_peak.unsqueeze(1)).exp_()
                total[rows] = total[rows] * shrink + exp.sum(1)
                if rest:
                    exp[here[0], here[2]] = 0
                if weight is not None:
                    mass[rows] = mass[rows] * shrink + exp @ weight[columns]
                peak[rows] = new_peak
        total = total.log_() + peak
        log_mass = None if weight is None else mass.log_() + peak
        if log_mass is not None:
            faint = torch.nonzero(log_mass - total < FAINT).squeeze(1)  # what float32 cannot add up beside the peak
            height, width = TILE[head.device.type]
            for few in faint.split(max(1, height * width // len(head))):
                log_mass[few] = _mass_alone(hidden[few], head, form, ids[few], boundary)
        ctx.save_for_backward(hidden, head, bias, ids, boundary, total, log_mass)
        ctx.form, ctx.rest = form, rest
        logp = (at - total.unsqueeze(1)).masked_fill(ids < 0, 0.0)
        return logp, torch.zeros_like(total) if log_mass is None else log_mass - total

    @staticmethod
    def backward(ctx, *gradients):
        hidden, head, bias, ids, boundary, total, mass = ctx.saved_tensors
        scored = _Scored(hidden, head, bias, ids, boundary, ctx.form, ctx.rest, total, mass)
        return *_gradients(scored, gradients[0], gradients[1], ctx.needs_input_grad[:3]), *[None] * 4


@dataclass(frozen=True)
class _Scored:
    """What was scored, with the log of the sum over the vocabulary and over the set."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    ids: Tensor
    boundary: Tensor | None
    form: LogitForm
    rest: bool
    total: Tensor
    mass: Tensor | None


def _gradients(
    of: _Scored, at_ids: Tensor, at_mass: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """At the hidden states, the head and the bias, where they are needed, from those at both scores."""
    hidden, head, ids, form, total, mass = of.hidden, of.head, of.ids, of.form, of.total, of.mass
    id_grad = at_ids.masked_fill(ids < 0, 0.0)
    mass_grad = torch.zeros_like(total) if mass is None or at_mass is None else at_mass
    all_grad = id_grad.sum(1) + mass_grad
    weight = _set_weight(of.boundary, of.rest, head, total.dtype)
    hidden_grad = torch.zeros_like(hidden, dtype=total.dtype)
    head_grad = torch.zeros_like(head, dtype=total.dtype) if needed[1] else None
    bias_grad = torch.zeros_like(of.bias, dtype=total.dtype) if needed[2] and of.bias is not None else None
    row_parts, column_parts = _tiles(hidden, head)
    for columns in column_parts:
        part = head[columns].to(hidden.dtype)
        for rows in row_parts:
            logits = _logits(hidden[rows], part, columns, form)
            here = _places(ids[rows], columns)
            capped = logits.clone() if form.softcap is not None else logits
            if mass is None or weight is None:
                grad = logits.sub_(total[rows].unsqueeze(1)).exp_().mul_(-all_grad[rows].unsqueeze(1))
            else:
                parts = (total[rows], mass[rows], all_grad[rows], mass_grad[rows], weight[columns])
                grad = _grad_with_mass(logits, *parts, here if of.rest else None)
            grad.index_put_((here[0], here[2]), id_grad[rows][here[0], here[1]], accumulate=True)
            grad = form.pull_back(grad, capped)
            if bias_grad is not None:
                bias_grad[columns] += grad.sum(0)
            grad = grad.to(hidden.dtype)
            hidden_grad[rows] += grad @ part
            if head_grad is not None:
                head_grad[columns] += grad.T @ hidden[rows]
    return (
        hidden_grad.to(hidden.dtype) if needed[0] else None,
        None if head_grad is None else head_grad.to(head.dtype),
        None if bias_grad is None or of.bias is None else bias_grad.to(of.bias.dtype),
    )


class _AlikeScores(torch.autograd.Function):
    """Log-softmax of a head at one id per row, with the gradients of the sum of all rows taken in the same pass.

    In the backward pass they are multiplied with what every row counts for; where rows count for different amounts, or
    at a second backward pass, logits are computed again.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, form):
        at, total = (hidden.new_empty(len(hidden), dtype=_accumulator(hidden)) for _ in range(2))
        needed = ctx.needs_input_grad
        hidden_grad = torch.zeros_like(hidden, dtype=total.dtype) if needed[0] else None
        head_grad = torch.zeros_like(head, dtype=total.dtype) if needed[1] else None
        column_parts = _cut(len(head), TILE["cpu"][1])
        parts = [head[columns].to(hidden.dtype) for columns in column_parts]  # once, however many rows there are
        for rows in _cut(len(hidden), max(FEWEST, WHOLE // len(head))):
            own, ids = hidden[rows], labels[rows].long()
            tiles = [_logits(own, part, columns, form) for part, columns in zip(parts, column_parts)]
            for tile, columns in zip(tiles, column_parts):
                row, _, column = _places(labels[rows].unsqueeze(1), columns)
                at[rows][row] = tile[row, column]
            peaks = torch.stack([tile.amax(1) for tile in tiles]).amax(0)
            tiles = [tile.sub_(peaks.unsqueeze(1)).exp_() for tile in tiles]
            total[rows] = peaks + torch.stack([tile.sum(1) for tile in tiles]).sum(0).log()
            share = (peaks - total[rows]).exp_().unsqueeze(1)  # turns exponentials into probabilities
            if hidden_grad is not None:
                expected = torch.zeros_like(hidden_grad[rows])
                for tile, part in zip(tiles, parts):
                    expected += tile.to(own.dtype) @ part
                hidden_grad[rows] = (head[ids] - share * expected) * form.scale
            if head_grad is not None:
                weighted = (own * share * -form.scale).to(own.dtype)
                for tile, columns in zip(tiles, column_parts):
                    head_grad[columns] += tile.T.to(own.dtype) @ weighted
                head_grad.index_add_(0, ids, (own * form.scale).to(head_grad.dtype))
        ctx.save_for_backward(hidden, head, labels, total)
        ctx.form, ctx.ready = form, (hidden_grad, head_grad)
        return at - total

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyrefly: ignore [bad-override] (a decorator hides the signature)
        (gradient,), ready, ctx.ready = gradients, ctx.ready, None
        hidden, head, labels, total = ctx.saved_tensors
        if ready is not None and bool((gradient == gradient[0]).all()):
            found = [None if grad is None else grad.mul_(gradient[0]) for grad in ready]
            return *(None if g is None else g.to(of.dtype) for g, of in zip(found, (hidden, head))), None, None
        scored = _Scored(hidden, head, None, labels.unsqueeze(1), None, ctx.form, False, total, None)
        needed = (*ctx.needs_input_grad[:2], False)
        return *_gradients(scored, gradient.unsqueeze(1), None, needed)[:2], None, None


def _set_weight(boundary: Tensor | None, rest: bool, head: Tensor, dtype: torch.dtype) -> Tensor | None:
    """1 for the rows of the head whose mass is wanted, None where none is; of the rest a row's ids are taken out."""
    if rest:
        return torch.ones(len(head), dtype=dtype, device=head.device)
    return None if boundary is None else boundary.to(dtype)


def _grad_with_mass(
    logits: Tensor,
    total: Tensor,
    mass: Tensor,
    all_grad: Tensor,
    mass_grad: Tensor,
    weight: Tensor,
    outside: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """mass_grad * softmax over the set - all_grad * softmax, `outside` taken out of the set; overwrites `logits`."""
    if (mass - total).amin() >= FAINT:  # one exp for both: the ratio of the sums is a number
        factor = torch.outer(mass_grad * (total - mass).exp(), weight).sub_(all_grad.unsqueeze(1))
        if outside is not None:
            factor[outside[0], outside[2]] = -all_grad[outside[0]]
        return logits.sub_(total.unsqueeze(1)).exp_().mul_(factor)
    inside = (logits - mass.unsqueeze(1)).clamp_max_(0).exp_().mul_(torch.outer(mass_grad, weight))
    if outside is not None:
        inside[outside[0], outside[2]] = 0
    return logits.sub_(total.unsqueeze(1)).exp_().mul_(-all_grad.unsqueeze(1)).add_(inside)


def _mass_alone(hidden: Tensor, head: Tensor, form: LogitForm, ids: Tensor, boundary: Tensor | None) -> Tensor:
    """Log of the sum of exp over the set, or over all but the ids, for the few rows where it is faint."""
    logits = _logits(hidden, head.to(hidden.dtype), slice(0, len(head)), form)
    if boundary is not None:
        return logits.masked_fill_(~boundary, -torch.inf).logsumexp(-1)
    row, _, column = _places(ids, slice(0, len(head)))
    logits[row, column] = -torch.inf
    return logits.logsumexp(-1)


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _tiles(hidden: Tensor, head: Tensor) -> tuple[list[slice], list[slice]]:
    height, width = TILE[head.device.type]
    return _cut(len(hidden), height), _cut(len(head), width)


def _cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(hidden: Tensor, part: Tensor, columns: slice, form: LogitForm) -> Tensor:
    """The logits of some columns, from that part of the head in the type of the hidden states."""
    products = hidden @ part.T
    return form(products.to(_accumulator(hidden)), columns)


def _places(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Row, place among the row's ids, and column in the tile of the ids that lie in the tile."""
    row, place = torch.nonzero((ids >= columns.start) & (ids < columns.stop), as_tuple=True)
    return row, place, ids[row, place].long() - columns.start
