"""A graph that was written and loaded again must answer as the model in memory: alone, padded, and step by step."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.export.traced import Past, Signature
from tokenkit.export.verify import TOLERANCES, ExportError, allowed, logits_of
from tokenkit.models.generate import empty_ids
from tokenkit.models.load import input_matrix
from tokenkit.tokenizers.base import Tokenizer

Call = Callable[[dict[str, Tensor]], list[Tensor]]
LONG = 256  # tokens of the longest row, if the model can
STEPS = 16  # tokens that are generated


class GraphReader:
    """Reads ids with a graph and carries its cache along; what a consumer does, in a few lines."""

    def __init__(self, call: Call, signature: Signature, mask: Int64[Tensor, "B T"]) -> None:
        self.call, self.signature = call, signature
        self.mask = mask[:, :0]
        self.past: Past = signature.empty(len(mask))

    def __call__(self, ids: Int64[Tensor, "B T"], mask: Int64[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits after every id of this call."""
        self.mask = torch.cat([self.mask, mask], 1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        states = [part for pair in self.past for part in pair]
        given = dict(zip(self.signature.inputs, [ids, self.mask, positions, *states], strict=True))
        logits, *states = self.call(given)
        self.past = list(zip(states[::2], states[1::2], strict=True))
        return logits.float()


def verify_graph(
    call: Call, signature: Signature, model: PreTrainedModel, tokenizer: Tokenizer, rows: list[list[int]], name: str
) -> dict[str, int | float | str]:
    """Figures of the comparison; ExportError where logits differ beyond rounding, or another token would be taken."""
    rows = _shown(rows, signature, model)
    expected = [logits_of(model, row)[0] for row in rows]
    largest = max(float(logits.abs().max()) for logits in expected)
    tolerance = TOLERANCES[signature.dtype] * largest
    checks = {"padded": _fixed} if signature.length else {"alone": _alone, "in a padded batch": _padded}
    if signature.layers:
        checks["step by step"] = _stepwise
    worst = 0.0
    for how, check in checks.items():
        found = check(call, signature, rows)
        for wanted, got in zip(expected, found, strict=True):
            difference = float((wanted[-len(got) :] - got).abs().max())
            if signature.dtype == torch.float32:
                tolerance = allowed(difference, tolerance, model, rows)
            if not difference <= tolerance:  # NaN is a difference too
                raise ExportError(f"{name}: logits differ by {difference:.3g} {how}, {tolerance:.3g} allowed")
            worst = max(worst, difference)
    figures: dict[str, int | float | str] = {"rows": len(rows), "tokens": sum(map(len, rows))}
    if signature.layers:
        figures["generated_tokens"] = _greedy(call, signature, model, tokenizer, rows, 2 * tolerance, name)
    return figures | {"logit_difference": worst, "tolerance": tolerance}


def _shown(rows: list[list[int]], signature: Signature, model: PreTrainedModel) -> list[list[int]]:
    """The rows and a long one, longer than the model's window where it has a small one; all cut to what can be read."""
    config = model.config.get_text_config().to_dict()
    limit = config.get("max_position_embeddings") or LONG
    if signature.length:
        return [row[: min(signature.length, limit)] for row in rows]
    limit -= STEPS if limit > 2 * STEPS else 0
    window = config.get("sliding_window") or 0
    length = min(limit, max(LONG, window + 32 if window <= 4 * LONG else 0))
    joined = [i for row in rows for i in row[1:]]
    return [row[:limit] for row in [*rows, [rows[0][0], *(joined * (length // len(joined) + 1))][:length]]]


def _alone(call: Call, signature: Signature, rows: list[list[int]]) -> list[Tensor]:
    found = []
    for row in rows:
        ids = torch.tensor([row])
        found.append(GraphReader(call, signature, ids)(ids, torch.ones_like(ids))[0])
    return found


def _batch(rows: list[list[int]], length: int | None = None) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
    """Ids and mask, padded on the left with an id that no answer may depend on."""
    length = length or max(map(len, rows))
    ids = torch.tensor([[row[-1]] * (length - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])


def _padded(call: Call, signature: Signature, rows: list[list[int]]) -> list[Tensor]:
    ids, mask = _batch(rows)
    logits = GraphReader(call, signature, mask)(ids, mask)
    return [one[-len(row) :] for one, row in zip(logits, rows, strict=True)]


def _fixed(call: Call, signature: Signature, rows: list[list[int]]) -> list[Tensor]:
    assert signature.length is not None
    found = []
    for row in rows:
        ids, mask = _batch([row], signature.length)
        found.append(GraphReader(call, signature, mask)(ids, mask)[0][-len(row) :])
    return found


def _stepwise(call: Call, signature: Signature, rows: list[list[int]]) -> list[Tensor]:
    """All but the last tokens of the padded batch, then two, then one and one, with the cache."""
    ids, mask = _batch(rows)
    read = GraphReader(call, signature, mask)
    parts, at = [], 0
    for length in (ids.shape[1] - 4, 2, 1, 1):
        parts.append(read(ids[:, at : at + length], mask[:, at : at + length]))
        at += length
    return [one[-min(len(row), 4) :] for one, row in zip(torch.cat(parts, 1), rows, strict=True)]


def _greedy(
    call: Call,
    signature: Signature,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: list[list[int]],
    slack: float,
    name: str,
) -> int:
    """Tokens generated; every one is the model's own first choice, or within `slack` of it where two are as good."""
    ids, mask = _batch(rows)
    read = GraphReader(call, signature, mask)
    allowed = torch.zeros(len(input_matrix(model)))
    allowed[empty_ids(tokenizer, len(allowed))] = -torch.inf
    taken: list[Tensor] = []
    for _ in range(STEPS):
        taken.append((read(ids, mask)[:, -1] + allowed).argmax(-1, keepdim=True))
        ids, mask = taken[-1], torch.ones_like(taken[-1])
    for row, more in zip(rows, torch.cat(taken, 1).tolist(), strict=True):
        logits = logits_of(model, [*row, *more])[0, len(row) - 1 : -1] + allowed
        lost = logits.amax(-1) - logits.gather(1, torch.tensor(more).unsqueeze(1))[:, 0]
        if not float(lost.max()) <= slack:
            raise ExportError(f"{name}: generates other tokens than the model in memory")
    return len(rows) * STEPS
