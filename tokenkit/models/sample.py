"""Token ids drawn from a language model through its own forward passes and key-value cache, a batch at a time.

A draw is a race: every id gets its logit and a random number of its own times the temperature, and the largest sum wins
(Gumbel, 1954; the same distribution as softmax(logits / temperature), with no division). The random number is a hash of
(seed, sequence, token, id). So what is drawn depends on no generator, no other sequence of the batch and no order; a
sequence can be drawn again, alone, later, on another device. What remains is the model: its logits may differ in the
last bits with the size of the batch, and then a race of two ids that close (about one in a million) may end otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import Config, UserError
from tokenkit.models.expand import expansion_of
from tokenkit.models.generate import empty_ids
from tokenkit.models.load import head_matrix
from tokenkit.models.temperature import Temperature, TemperatureConfig
from tokenkit.models.view import ModelView
from tokenkit.quantities import at_least_float32
from tokenkit.tokenizers.base import Tokenizer

GOLDEN, MIX_A, MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64
POSITIONS = ("max_position_embeddings", "n_positions")  # what config.json calls them, by family
Until = Callable[[list[int]], bool]


class DrawConfig(Config):
    """How the next token is chosen."""

    temperature: TemperatureConfig = TemperatureConfig(start=1.0)
    """A number (0 takes the likeliest token), or a schedule over the new tokens."""
    top_k: int | None = Field(None, ge=1)
    """Among so many likeliest ids only."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Among the fewest likeliest ids that hold this much of the mass at the temperature."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Among ids at least this likely, of the likeliest one's probability at the temperature."""


class SamplingConfig(DrawConfig):
    """How a sequence is drawn."""

    max_new_tokens: int = Field(256, ge=1)
    """Also the horizon of the temperature's schedule."""
    min_new_tokens: int = Field(1, ge=0)
    """Before so many tokens none that ends the text is drawn."""
    end_of_text: Literal["stop", "keep", "forbid"] = "stop"
    """The end-of-text token ends the sequence and is its last id; or stands in it as any other; or is never drawn."""


@dataclass(frozen=True)
class Drawing:
    """How sequences are drawn from one vocabulary: what `SamplingConfig` says, in ids."""

    config: DrawConfig
    temperature: Temperature
    max_new_tokens: int
    min_new_tokens: int
    stop_ids: frozenset[int]
    forbidden: tuple[int, ...]


@dataclass(frozen=True)
class Sampled:
    """New ids, the one that ended the sequence among them, and their log-probability at temperature 1, in nats."""

    ids: list[int]
    logp: float
    ended: bool


def drawing_of(config: SamplingConfig, tokenizer: Tokenizer, rows: int, ends: Sequence[int] = ()) -> Drawing:
    """How sequences are drawn from a head of `rows` rows; `ends` are further ids that close a text.

    Never drawn are ids that spell nothing: holes, padding rows and special tokens other than those that end a text.
    """
    closing = {i for i in (tokenizer.eos_id, *ends) if i is not None}
    special = tokenizer.special_ids - (set() if config.end_of_text == "forbid" else closing)
    return Drawing(
        config,
        config.temperature.over(config.max_new_tokens),
        config.max_new_tokens,
        config.min_new_tokens,
        frozenset(closing if config.end_of_text == "stop" else ()),
        tuple(sorted({*empty_ids(tokenizer, rows), *(i for i in special if i < rows)})),
    )


def sequence_key(seed: int, number: int, stream: int = 0) -> int:
    """The 64 bits from which every random number of a sequence follows, as a signed number."""
    word = np.random.SeedSequence([seed, number, stream]).generate_state(1, np.uint64)[0]
    return _signed(int(word))


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    drawing: Drawing,
    keys: Sequence[int],
    *,
    batch_size: int = 16,
    limits: Sequence[int] | None = None,
    until: Until | None = None,
) -> list[Sampled]:
    """One continuation per prompt, in the order of the prompts, in evaluation mode; no random state is touched.

    Prompts of one length are read together, so nothing is padded and the model needs neither mask nor positions.
    `limits` are new tokens at most, per prompt; `until` says of a row's new ids that they are enough.
    """
    limits = [drawing.max_new_tokens] * len(prompts) if limits is None else limits
    check_positions(model, max((len(p) + limit for p, limit in zip(prompts, limits, strict=True)), default=0))
    found: dict[int, Sampled] = {}
    training = model.training
    model.eval()
    try:
        for places in _batches(prompts, batch_size):
            ids = torch.tensor([list(prompts[place]) for place in places], device=model.device)
            chosen = [limits[place] for place in places], torch.tensor([keys[place] for place in places])
            found |= dict(zip(places, _continued(model, ids, drawing, *chosen, until), strict=True))
    finally:
        model.train(training)
    return [found[place] for place in range(len(prompts))]


def check_positions(model: PreTrainedModel, length: int) -> None:
    """UserError where sequences of `length` tokens are more than the model has positions for."""
    config = model.config.get_text_config().to_dict()
    positions = next((config[key] for key in POSITIONS if config.get(key) is not None), None)
    if positions is not None and length - 1 > positions:  # the last token is not read
        raise UserError(
            f"max_new_tokens: {length} tokens with the prompt, but the model has {positions} positions; write "
            f"{length - positions - 1} less, or shorten the prompt"
        )


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    for _, places in sorted(by_length.items()):
        yield from (places[start : start + size] for start in range(0, len(places), size))


def _continued(
    model: PreTrainedModel,
    ids: Int[Tensor, "B T"],
    drawing: Drawing,
    limits: list[int],
    keys: Int64[Tensor, "B"],
    until: Until | None,
) -> list[Sampled]:
    rows: list[list[int]] = [[] for _ in limits]
    logp = torch.zeros(len(limits), dtype=torch.float64)
    active = [limit > 0 for limit in limits]
    expansion = expansion_of(model)
    next_logits, keys = _Reader(model), keys.to(ids.device)
    with expansion.running() if expansion else nullcontext():
        for n in range(max(limits)):
            if not any(active):
                break
            logits = next_logits(ids)
            chosen = draw(logits, keys, n, drawing)
            said = logits.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1).cpu()
            if said.isnan().any():
                raise UserError(
                    f"{model.config.model_type}: its logits are not numbers at new token {n}; mend the model"
                )
            logp += torch.where(torch.tensor(active), said, 0.0)
            for row, i in enumerate(chosen.tolist()):
                if active[row]:
                    rows[row].append(i)
                    over = i in drawing.stop_ids or len(rows[row]) == limits[row]
                    active[row] = not over and not (until is not None and until(rows[row]))
            ids = chosen[:, None]
    return [
        Sampled(row, value, bool(row) and row[-1] in drawing.stop_ids)
        for row, value in zip(rows, logp.tolist(), strict=True)
    ]


class _Reader:
    """The logits that follow the ids read so far; a model without a key-value cache reads all of them again."""

    def __init__(self, model: PreTrainedModel):
        self.body, self.head, self.form = model.base_model, head_matrix(model), ModelView(model).form()
        self.cache: Any = None
        self.seen: Tensor | None = None

    def __call__(self, ids: Int[Tensor, "B T"]) -> Float64[Tensor, "B V"]:
        whole = ids if self.seen is None else torch.cat([self.seen, ids], 1)
        if self.cache is None:
            output = self.body(input_ids=whole, use_cache=True)
        else:
            output = self.body(input_ids=ids, use_cache=True, past_key_values=self.cache)
        self.cache, self.seen = output.get("past_key_values"), whole
        hidden = output.last_hidden_state[:, -1]
        return self.form(at_least_float32(hidden @ self.head.to(hidden.dtype).T)).double()


def draw(logits: Float64[Tensor, "B V"], keys: Int64[Tensor, "B"], n: int, drawing: Drawing) -> Int64[Tensor, "B"]:
    """The n-th new id of each sequence."""
    temperature = drawing.temperature(n)
    stopless = drawing.stop_ids if n < drawing.min_new_tokens else ()
    barred = [*drawing.forbidden, *stopless]
    if barred:
        logits = logits.index_fill(1, torch.tensor(barred, device=logits.device), -torch.inf)
    if temperature == 0:
        return logits.argmax(-1)
    kept = kept_ids(logits, temperature, drawing.config)
    race = logits + temperature * gumbel(keys, n, logits.shape[1])
    return race.masked_fill(~kept, -torch.inf).argmax(-1)


def kept_ids(logits: Float64[Tensor, "B V"], temperature: float, config: DrawConfig) -> Bool[Tensor, "B V"]:
    """The ids that `top_k`, then `top_p`, then `min_p` leave; ids tied for the last of `top_k` all stay."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if config.top_k is not None and config.top_k < logits.shape[1]:
        kept = logits >= logits.topk(config.top_k, -1).values[:, -1:]
    if config.top_p < 1 or config.min_p > 0:
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0: nothing overflows
        mass = scaled.masked_fill(~kept, -torch.inf).softmax(-1)
        if config.top_p < 1:
            best, ids = mass.sort(-1, descending=True)
            inside = best.cumsum(-1) - best < config.top_p
            kept = kept & torch.zeros_like(kept).scatter(1, ids, inside)
        kept = kept & (mass >= config.min_p * mass.amax(-1, keepdim=True))
    return kept


def gumbel(keys: Int64[Tensor, "B"], n: int, rows: int) -> Float64[Tensor, "B V"]:
    """Gumbel noise of every id at token n of each sequence: the splitmix64 stream of the key and n."""
    at = _mixed(keys + _signed((n + 1) * GOLDEN))
    ids = torch.arange(1, rows + 1, device=keys.device) * _signed(GOLDEN)
    bits = (_mixed(at[:, None] + ids) >> 12) & ((1 << 52) - 1)
    uniform: Float[Tensor, "B V"] = (bits.double() + 0.5) * 2.0**-52  # inside (0, 1), exactly
    return -(-uniform.log()).log()


def _mixed(z: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The output function of splitmix64 (Steele, Lea, Flood 2014); int64 products wrap as unsigned ones do."""
    for shift, factor in ((30, MIX_A), (27, MIX_B)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, 31)


def _shifted(z: Int64[Tensor, "..."], by: int) -> Int64[Tensor, "..."]:
    return (z >> by) & ((1 << (64 - by)) - 1)  # a logical shift


def _signed(word: int) -> int:
    """The signed number with the same 64 bits."""
    word %= 1 << 64
    return word - (1 << 64) if word >= 1 << 63 else word
