"""Text in the tokens of a tokenizer that was drawn a moment ago, read by a frozen model with rows of a hypernetwork.

Minixhofer+ 2024, 2405.07883. The softmax runs over what the batch holds and over some other tokens of the vocabulary,
each of which counts for several: so a step costs the same for a vocabulary of any size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from numpy import ndarray
from torch import Tensor, nn

from tokenkit.align.boundary import boundary_tokens
from tokenkit.config import UserError
from tokenkit.data.batch import NO_LABEL, Batch, Batches
from tokenkit.data.example import Window
from tokenkit.losses import Loss
from tokenkit.models.hypernet import Hypernet, matrices_of
from tokenkit.models.load import logit_settings, output_head
from tokenkit.models.view import ModelView
from tokenkit.objective import Objective, Term
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.sampler import TokenizerSampler
from tokenkit.train.tasks.distill import TextTask
from tokenkit.transfer.hypernet import surface_forms
from tokenkit.transfer.specials import role_sources
from tokenkit.transfer.spelling import Speller

SAMPLED = "sampled_"  # begins the names of what a batch says of its vocabulary
LEXICAL = "lexical"


def lexical(sampled_distance: Float[Tensor, "1 S"]) -> Float[Tensor, "1 S"]:
    """Squared distance of each predicted row from the source's, over the mean norm of the source's rows."""
    return sampled_distance


@dataclass(frozen=True)
class OwnTerm(Term):
    """A term over tensors of this task alone, which no model is asked for."""

    @cached_property
    def names(self) -> set[str]:
        """None of those that models or data know."""
        return set()

    @property
    def unit_tensors(self) -> list[str]:
        """None, likewise."""
        return []


@dataclass(frozen=True)
class HypernetObjective(Objective):
    """Losses of a run, behind some steps in which the network only learns to leave tokens alone that the source has."""

    identity_steps: int = 0

    @classmethod
    def around(cls, objective: Objective, lexical_weight: float, identity_steps: int) -> "HypernetObjective":
        """The objective with the lexical loss beside it, where that weighs anything."""
        wanted = lexical_weight > 0 or identity_steps > 0
        loss = Loss(LEXICAL, lexical, "token", lambda sampled_single: sampled_single.float())
        own = (OwnTerm(loss, lexical_weight, {}),) if wanted else ()
        return cls((*objective.terms, *own), identity_steps)

    def weights_at(self, step: int, steps: int) -> dict[str, float]:
        """The weight of each loss at a step: of the lexical one alone as long as the network learns identity."""
        if step < self.identity_steps:
            return {name: float(name == LEXICAL) for name in self.weights()}
        return super().weights_at(step, steps)


class SampledBatches(Batches):
    """The windows of a step in the tokens of a tokenizer that is drawn for it, and what those tokens are made of."""

    def __init__(
        self,
        *args: Any,
        sampler: TokenizerSampler,
        source: Tokenizer,
        source_rows: int,
        longest: int,
        negatives: int | None = None,
        every: int = 1,
        **options: Any,
    ) -> None:
        """`negatives` are the tokens beside those of a step that its softmax runs over, None: all. A tokenizer serves
        `every` so many steps."""
        super().__init__(*args, **options)
        self.sampler, self.source, self.longest = sampler, source, longest
        self.negatives, self.every = negatives, every
        self._spell = Speller(source, min(source_rows, source.vocab_size))
        self._drawn = -1

    def at(self, step: int, num_microbatches: int = 1, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The microbatches of a step, and the same vocabulary with each of them."""
        number = step // self.every
        if number != self._drawn:
            steps = range(number * self.every, (number + 1) * self.every)
            windows = [window for one in steps for window in self.texts(one)]
            self.student = self.sampler.draw(number, [one.text for one in windows if isinstance(one, Window)])
            self._drawn = number
        batches = super().at(step, num_microbatches * ranks)  # the vocabulary is that of the whole step
        held = np.zeros(self.student.vocab_size, bool)
        held[[*self.student.special_ids, 0]] = True  # 0 fills rows up
        for batch in batches:
            for name in ("student_inputs", "student_labels"):
                ids = batch.tensors[name].numpy()
                held[ids[ids >= 0]] = True
        ids, bias = softmax_ids(held, self.negatives, np.random.default_rng([self.seed, step, 1]))
        place = np.full(len(held), NO_LABEL, np.int64)
        place[ids] = np.arange(len(ids))
        said = self._said(ids, bias)
        own = batches[rank::ranks]
        return [replace(batch, tensors={**_placed(batch.tensors, place), **said}) for batch in own]

    def _said(self, ids: Int64[ndarray, "S"], bias: Float32[ndarray, "S"]) -> dict[str, Tensor]:
        drawn = self.student
        forms, lengths = surface_forms(self._spell, [drawn.token_bytes[i] for i in ids.tolist()], self.longest)
        roles = role_sources(self.source, drawn, self._spell.vocab, "input")
        special = np.isin(ids, list(roles))
        forms[special, 0], lengths[special] = [roles[i] for i in ids[special].tolist()], 1
        found = {
            "forms": forms,
            "lengths": lengths,
            "bias": bias,
            "single": ((lengths == 1) & (forms[:, 0] < self._spell.vocab))[None],
            "special": special,
            "boundary": boundary_tokens(drawn)[ids],
            "eos": ids == drawn.eos_id,
        }
        return {SAMPLED + name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}


def softmax_ids(
    held: Bool[ndarray, "V"], negatives: int | None, rng: np.random.Generator
) -> tuple[Int64[ndarray, "S"], Float32[ndarray, "S"]]:
    """The ids that are held and `negatives` others, ascending, and the logarithm of how many ids each stands for.

    With these added to the logits, a sum of exponentials over the ids is on average the sum over the vocabulary.
    """
    others = np.flatnonzero(~held)
    if negatives is None or negatives >= len(others):
        return np.arange(len(held)), np.zeros(len(held), np.float32)
    bias = np.zeros(len(held), np.float32)
    drawn = rng.choice(others, negatives, replace=False)
    bias[drawn] = math.log(len(others) / negatives)
    ids = np.sort(np.concatenate([np.flatnonzero(held), drawn]))
    return ids, bias[ids]


def _placed(tensors: Mapping[str, Tensor], place: Int64[ndarray, "V"]) -> dict[str, Tensor]:
    """The tensors of a batch with ids as places among the tokens that its softmax runs over."""
    found = dict(tensors)
    for name in ("student_inputs", "student_labels"):
        ids = found[name].numpy()
        found[name] = torch.from_numpy(np.where(ids < 0, NO_LABEL, place[ids.clip(0)]))
    return found


class HypernetTask(TextTask):
    """A frozen model whose embedding rows a network predicts from the pieces of each token; the network is learnt."""

    def __init__(
        self,
        objective: Objective,
        network: Hypernet,
        model: ModelView,
        source: Tokenizer,
        *,
        copies: bool,
        **options: Any,
    ) -> None:
        """`copies`: a token that the source has keeps its row."""
        model.model.requires_grad_(False).eval()
        teacher = ModelView(model.model) if objective.needs("teacher") else None
        super().__init__(objective, model, source, teacher, source, **options)
        extra = objective.by_task() | objective.pair_needs()
        if extra:
            raise UserError(
                f"losses: {sorted(extra)[0]} is not computed while a hypernetwork is trained; take clm or alm"
            )
        self.network, self.copies = network.to(self.device), copies
        rows = min(source.vocab_size, *map(len, matrices_of(model.model)))
        self._sources: Float[Tensor, "V K D"] = torch.stack(
            [one.detach()[:rows] for one in matrices_of(model.model)], 1
        )
        self._norms = self._sources.norm(dim=-1).mean(0)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of the network, by name."""
        return {f"hypernet.{name}": p for name, p in self.network.named_parameters() if p.requires_grad}

    def modules(self) -> list[nn.Module]:
        """The network."""
        return [self.network]

    def last_layer(self) -> list[nn.Parameter]:
        """What makes rows of the network's last states."""
        return [p for name, p in self.network.named_parameters() if ".out." in name]

    def train_mode(self, on: bool) -> None:
        """Nothing: neither the network nor the model, which is frozen, has dropout on."""

    def student_tensors(
        self, batch: Batch, teacher: Mapping[str, Tensor], means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the losses ask of the model with the predicted rows, and how far these are from known ones."""
        said = {name.removeprefix(SAMPLED): t for name, t in batch.tensors.items() if name.startswith(SAMPLED)}
        with self._autocast():
            found, rows = self._predicted(said)
            view = ModelView(self.student.model, tables=self._tables(rows, said))
            self._sets["student"] = {"boundary_logp": said["boundary"], "eos_logp": said["eos"]}
            return found | self._leaves(view, "student", self.objective.needs("student"), batch)

    def _predicted(self, said: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Float[Tensor, "S K D"]]:
        """The rows of a step's vocabulary; where all are predicted, also how far from the source's those are."""
        forms, lengths, single = said["forms"], said["lengths"], said["single"][0]
        known = self._sources[forms[:, 0].clamp_max(len(self._sources) - 1)]
        kept = single if self.copies else said["special"]
        asked = (~kept).nonzero()[:, 0]
        rows = known.index_copy(0, asked, self.network.rows(self._gather, forms[asked], lengths[asked]).to(known))
        if LEXICAL not in self.objective.weights():
            return {}, rows
        distances = (rows - known).square().sum(-1) / self._norms
        return {"sampled_distance": distances.mean(1)[None]}, rows

    def _gather(self, ids: Tensor) -> Tensor:
        vocab = len(self._sources)
        rows, beyond = self._sources[ids.clamp_max(vocab - 1)], ids >= vocab
        return torch.where(beyond[:, None, None], self.network.byte_rows[(ids - vocab).clamp_min(0)], rows)

    def _tables(self, rows: Float[Tensor, "S K D"], said: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bias = said["bias"] / logit_settings(self.student.model).get("scale", 1)
        own = output_head(self.student.model).bias
        if own is not None:
            inside = torch.arange(said["forms"].shape[1], device=bias.device) < said["lengths"][:, None]
            pieces = torch.where(inside, own.detach()[said["forms"].clamp_max(len(own) - 1)], 0.0)
            bias = bias + pieces.sum(1) / said["lengths"].clamp_min(1)
        return {"input": rows[:, 0], "head": rows[:, -1], "bias": bias}
