"""A language model put on a learned tokenizer: the checklist's `model.set_tokenizer(tok)`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.factorised_view import attach_factorised, view_of
from tokenkit.models.latents import Method, resize_and_init
from tokenkit.models.load import input_matrix, quiet
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.base import Tokenizer


def set_tokenizer(
    model: PreTrainedModel, tokenizer: Tokenizer, *, method: Method = "decoder", seed: int = 0
) -> ModelView:
    """The model, changed in place, as a view over the tokenizer's ids; its rows are made of the latents anew.

    A compact tokenizer gets a row per id, so `model(ids).logits` is over all of them. An open one gets rows for special
    tokens, bytes and pins, and tables for its codes; then the view is what scores, and `generate` what writes.
    """
    if not isinstance(tokenizer, LearnedTokenizer):
        raise UserError(
            "set_tokenizer: not a learned tokenizer; load the folder of one with tokenkit.load_tokenizer, and for any "
            "other use `tokenkit transfer`"
        )
    if not tokenizer.codec.layout.num_codes:
        resize_and_init(model, tokenizer, method=method, seed=seed)
        return view_of(model)
    fixed = tokenizer.codec.layout.open_base
    if len(input_matrix(model)) != fixed:
        with torch.random.fork_rng([]), quiet():
            model.resize_token_embeddings(fixed, mean_resizing=False)
    return attach_factorised(model, tokenizer, method=method, seed=seed)


@torch.no_grad()
def logits_of(view: ModelView, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    """Logits over all ids at every position; UserError where an open tokenizer has too many of them."""
    return view.leaves({"logits"}, ids, ids)["logits"]
