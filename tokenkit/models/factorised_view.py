"""A model whose ids are partly codes: a stock model for the ids that have rows, and the tables of codes beside it.

The tables are a child of the model, so they are trained, moved and saved in checkpoints with it. The model itself knows
nothing of them: who wants the whole asks for `view_of(model)`.
"""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.factorised import MORE, Factorised, OpenShape
from tokenkit.models.latents import Method, latent_rows, rms
from tokenkit.models.load import head_matrix, input_matrix, write_token_ids
from tokenkit.models.view import TOP, ModelView
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer

CHILD, FACTORISED, TOKENIZER = "factorised", "factorised.safetensors", "tokenizer"  # in a model, in a folder


class FactorisedView(ModelView):
    """Scores of a model with tables of codes. Its head has rows for special tokens, bytes and pins."""

    def __init__(self, model: PreTrainedModel, factorised: Factorised) -> None:
        super().__init__(model)
        self.factorised = factorised

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
        """The model leaves that are asked for; `logits` are log-probabilities, and only of a small grid."""
        foreign = needs & (TOP | {"boundary_logp"})
        if foreign:
            raise UserError(
                f"{sorted(foreign)[0]}: a tokenizer with open codes has too many ids for it; use its compact form"
            )
        own = needs & {"label_logp", "eos_logp", "logits"}
        found = super().leaves((needs - own) | {"hidden"}, inputs, labels, positions=positions)
        at = found["hidden"], self.head()
        if "label_logp" in own:
            found["label_logp"] = self.factorised.label_logp(*at, labels, self.form())
        if "eos_logp" in own:
            ends = torch.full_like(labels, int(sets["eos_logp"].nonzero()[0]))
            found["eos_logp"] = self.factorised.label_logp(*at, ends, self.form())
        if "logits" in own:
            found["logits"] = self.factorised.listed(*at, self.form())
        return {name: tensor for name, tensor in found.items() if name in needs}

    def _body(self, inputs: Int[Tensor, "B T"], **options: Any) -> Any:
        with self._adapters():
            embeds = self.factorised.embed(self.model.get_input_embeddings(), inputs)
            return self.model.base_model(inputs_embeds=embeds, **{"use_cache": False, **options})

    @torch.no_grad()
    def continued(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] = (),
        valid: bool = True,
    ) -> list[list[int]]:
        """New ids after each row, up to the first stop, which is left out. Draws from torch's own generator.

        `valid`: only runs of codes as a chunk can have; whether one decodes to bytes that are spelled so is not asked.
        """
        device = input_matrix(self.model).device
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + [*row] for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        cache, run = DynamicCache(config=self.model.config), torch.zeros(len(rows), dtype=torch.long, device=device)
        stops, ended = torch.tensor([*stop_ids], device=device), torch.zeros(len(rows), dtype=torch.bool, device=device)
        drawn: list[Tensor] = []
        while len(drawn) < max_new_tokens and not ended.all():
            position = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            options = {"attention_mask": mask, "position_ids": position, "past_key_values": cache, "use_cache": True}
            last = self._body(ids, **options).last_hidden_state[:, -1]
            allowed = run if valid else None
            options = {"temperature": temperature, "top_p": top_p, "run": allowed}
            ids = self.factorised.sample(last, self.head(), self.form(), **options).unsqueeze(1)
            kind = self.factorised.type_of(ids[:, 0])
            run = torch.where(kind == MORE, run + 1, 0)
            ended |= torch.isin(ids[:, 0], stops)
            drawn.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        found = torch.cat(drawn, 1).tolist() if drawn else [[] for _ in rows]
        ends = set(stop_ids)
        return [row[: next((i for i, one in enumerate(row) if one in ends), len(row))] for row in found]


def factorised_of(model: PreTrainedModel) -> Factorised | None:
    """The tables of codes beside a model, if it has some."""
    return next((module for module in model.children() if isinstance(module, Factorised)), None)


def view_of(model: PreTrainedModel) -> ModelView:
    """The model as named tensors, with the tables of codes beside it if it has some."""
    factorised = factorised_of(model)
    return ModelView(model) if factorised is None else FactorisedView(model, factorised)


@torch.no_grad()
def attach_factorised(
    model: PreTrainedModel, tokenizer: LearnedTokenizer, *, method: Method | None = None, seed: int = 0
) -> FactorisedView:
    """Gives a model tables for the codes of an open tokenizer, in the scale of its rows; UserError if these are not
    those of the other ids.

    `method`: rows of special tokens, bytes and pins are made of latents too; None leaves them as they are.
    """
    shape, matrix = OpenShape.of(tokenizer.codec), input_matrix(model)
    fixed = shape.layout.open_base
    if len(matrix) < fixed:
        raise UserError(f"{len(matrix)} embedding rows for {fixed} ids that are no codes; resize the model first")
    if method is not None:
        pairs = [(matrix, seed), *([] if head_matrix(model) is matrix else [(head_matrix(model), seed + 1)])]
        for own, drawn in pairs:
            options = {"method": method, "std": rms(own), "seed": drawn}
            own[:fixed] = latent_rows(tokenizer.network(), tokenizer.codec, own.shape[1], **options).to(own)
    embedded = model.get_input_embeddings()(torch.arange(fixed, device=matrix.device))
    factorised = Factorised(shape, matrix.shape[1], std=rms(embedded), seed=seed).to(matrix)
    model.add_module(CHILD, factorised)
    write_token_ids(model, tokenizer)
    return FactorisedView(model, factorised)


def attach_saved(model: PreTrainedModel, factorised: Factorised) -> None:
    """Puts tables of codes that were loaded beside a model."""
    model.add_module(CHILD, factorised.to(input_matrix(model)))


@contextmanager
def without_factorised(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is a stock one."""
    factorised = model._modules.pop(CHILD)
    try:
        yield
    finally:
        model._modules[CHILD] = factorised
