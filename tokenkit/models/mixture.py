"""Several teachers as one: the weighted mean of what they hold for probable. Wu+ 2021, 2106.01023."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.losses.divergences import log_mixture
from tokenkit.models.view import TOP, ModelView
from tokenkit.quantities import at_least_float32
from tokenkit.scores import token_scores_of_logits

OWN = frozenset({"logits", "label_logp", "entropy"}) | TOP


class MixtureView(ModelView):
    """A mixture of probabilities of models with one vocabulary; its logits are the mixture's log-probabilities.

    It has no states of its own: losses over hidden states, attention or sums of token sets are refused.
    """

    def __init__(self, views: Sequence[ModelView], weights: Sequence[float]):
        """Weights are shares of their sum. UserError where the heads have different numbers of rows."""
        super().__init__(views[0].model)
        self.views, self.weights = [*views], [*weights]
        rows = {view.vocab_rows for view in views}
        if len(rows) > 1:
            self.rows = min(rows)
            self.views = [view.limited(self.rows) for view in views]

    def limited(self, rows: int) -> "MixtureView":
        """The same models, each with a head of the first `rows` ids."""
        return MixtureView([view.limited(rows) for view in self.views], self.weights)

    def log_probabilities(
        self, inputs: Int[Tensor, "B T"], counted: Bool[Tensor, "B T"]
    ) -> Sequence[Float[Tensor, "N V"]]:
        """Of what follows the counted positions, some of them at a time."""
        parts = zip(*(view.log_probabilities(inputs, counted) for view in self.views))
        return [log_mixture(part, self.weights) for part in parts]

    def leaves(
        self,
        needs: AbstractSet[str],
        inputs: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        sets: Mapping[str, Bool[Tensor, "V"]] = MappingProxyType({}),
        *,
        top_k: int | None = None,
        top_ids: Int[Tensor, "B T K"] | None = None,
        positions: Int[Tensor, "B T"] | None = None,
    ) -> dict[str, Tensor]:
        """The leaves that a mixture has: `logits`, `label_logp`, `entropy` and the best ids with their tail."""
        foreign = sorted(needs - OWN)
        if foreign:
            raise UserError(
                f"teachers: a loss asks for {foreign[0]} of a mixture of {len(self.views)} models, which has none; use "
                "losses over logits, or one teacher"
            )
        said = [view.leaves({"logits"}, inputs, labels, positions=positions)["logits"] for view in self.views]
        logp = log_mixture([at_least_float32(logits) for logits in said], self.weights)
        found = {"logits": logp, "label_logp": token_scores_of_logits(logp, labels)[0]}
        found["entropy"] = -torch.where(logp > -torch.inf, logp.exp() * logp, 0).sum(-1)
        if needs & TOP:
            count = min(top_k or logp.shape[-1], logp.shape[-1])
            ids = logp.topk(count, -1).indices if top_ids is None else top_ids
            rest = torch.scatter(logp, -1, ids, -torch.inf)
            found |= {"top_logp": logp.gather(-1, ids), "top_ids": ids, "tail_logp": rest.logsumexp(-1)}
        return {name: tensor for name, tensor in found.items() if name in needs}


def views_of(view: ModelView | None) -> list[ModelView]:
    """The views of single models that a view is made of: itself, or those of a mixture."""
    return [] if view is None else view.views if isinstance(view, MixtureView) else [view]
