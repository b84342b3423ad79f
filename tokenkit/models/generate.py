"""Continuations of prompts, as text: our tokenizer's ids through the model's own generation."""

import codecs
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from tokenkit.models.expand import expansion_of
from tokenkit.models.factorised_view import FactorisedView, view_of
from tokenkit.models.load import input_matrix, quiet
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.base import Tokenizer


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> list[str]:
    """One continuation per prompt, without the prompt, up to the end-of-text token; greedy at temperature 0.

    A text is begun by the start token, ids are taken as they are. The prompts are one left-padded batch. `stop_ids` end
    a continuation too. The process's random state is left as it was. Of a model with tables of codes, temperature and
    top_p hold for every part of an id.
    """
    if not prompts:
        return []
    start = tokenizer.start_id()
    texts = iter(tokenizer.encode_batch([prompt for prompt in prompts if isinstance(prompt, str)]))
    lists = [[start, *next(texts).ids.tolist()] if isinstance(p, str) else p for p in prompts]
    stops = list(dict.fromkeys([*_stop_ids(model, tokenizer), *stop_ids]))
    view = view_of(model)
    if isinstance(view, FactorisedView):
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "stop_ids": stops}
        return _of_codes(view, tokenizer, lists, seed, **options)
    rows = [torch.tensor(ids) for ids in lists]
    device = input_matrix(model).device
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, start, padding_side="left").to(device)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, padding_side="left")
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else start,
        suppress_tokens=empty_ids(tokenizer, len(input_matrix(model))) or None,
    )
    expansion = expansion_of(model)
    memory = expansion.running() if expansion else nullcontext()
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), quiet(), memory:
            torch.manual_seed(seed)
            output = model.generate(  # pyrefly: ignore [not-callable] (nn.Module's __getattr__ hides the method)
                ids, attention_mask=mask.to(device), generation_config=settings
            )
    finally:
        model.train(training)
    return [_text(tokenizer, row, stops) for row in output[:, ids.shape[1] :].tolist()]


def _of_codes(
    view: FactorisedView, tokenizer: Tokenizer, rows: list[list[int]], seed: int, **options: Any
) -> list[str]:
    assert isinstance(tokenizer, LearnedTokenizer), "tables of codes belong to a learned tokenizer"
    training = view.model.training
    view.model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = view.continued(rows, **options)
    finally:
        view.model.train(training)
    return [_whole_characters(tokenizer.codec.decode_bytes(ids)) for ids in found]


def empty_ids(tokenizer: Tokenizer, rows: int) -> list[int]:
    """The ids below `rows` that stand for nothing: holes in the tokenizer's id range, and padding rows beyond it."""
    spelled = {i for i, spelling in enumerate(tokenizer.token_bytes) if spelling} | tokenizer.special_ids
    return [i for i in range(rows) if i not in spelled]


def _stop_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The tokenizer's end of text first, then the further ends that the model declares (chat models have several)."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return list(dict.fromkeys(i for i in (tokenizer.eos_id, *declared) if i is not None))


def _text(tokenizer: Tokenizer, ids: list[int], stops: list[int]) -> str:
    """The text of the ids before the first stop; a character cut off by the length limit is left out."""
    end = next((position for position, i in enumerate(ids) if i in stops), len(ids))
    return _whole_characters(b"".join(tokenizer.token_bytes[i] for i in ids[:end]))


def _whole_characters(spelled: bytes) -> str:
    return codecs.getincrementaldecoder("utf-8")("replace").decode(spelled)
