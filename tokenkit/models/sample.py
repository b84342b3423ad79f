"""Token ids drawn from a language model through its own forward passes and key-value cache, a batch at a time.

A draw is a race: every id gets its logit and a random number of its own times the temperature, and the largest sum wins
(Gumbel, 1954; the same distribution as softmax(logits / temperature), with no division). The random number is a hash of
(seed, sequence, token, id). So what is drawn depends on no generator, no other sequence of the batch and no order; a
sequence can be drawn again, alone, later, on another device. What remains is the model: its logits may differ in the
last bits with the size of the batch, and then a race of two ids that close (about one in a million) may end otherwise.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import Config, UserError
from tokenkit.models.reader import Reader
from tokenkit.models.repetition import Repetition
from tokenkit.models.temperature import Temperature, TemperatureConfig
from tokenkit.tokenizers.base import Tokenizer

GOLDEN, MIX_A, MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64
POSITIONS = ("max_position_embeddings", "n_positions")  # what config.json calls them, by family
Until = Callable[[list[int]], bool]
Enough = Callable[[int, int], bool]


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
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def barred(self, n: int) -> Int64[Tensor, "M"]:
        """The ids that are never the n-th new one."""
        return self._early if n < self.min_new_tokens else self._always

    @cached_property
    def _always(self) -> Int64[Tensor, "M"]:
        return torch.tensor(self.forbidden, dtype=torch.long)

    @cached_property
    def _early(self) -> Int64[Tensor, "M"]:
        return torch.tensor([*self.forbidden, *sorted(self.stop_ids)], dtype=torch.long)

    def repetition(self, rows: Sequence[Sequence[int]], vocab_rows: int, device: torch.device) -> Repetition | None:
        """What the rows hold, where their logits depend on it."""
        if self.repetition_penalty == 1 and not self.no_repeat_ngram:
            return None
        options = {"penalty": self.repetition_penalty, "no_repeat_ngram": self.no_repeat_ngram, "device": device}
        return Repetition(rows, vocab_rows, **options)


@dataclass(frozen=True)
class Sampled:
    """New ids, the one that ended the sequence among them, and their log-probability at temperature 1, in nats.

    The log-probability is the model's own, before penalties and filters; nan where it was not asked for.
    """

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


def empty_ids(tokenizer: Tokenizer, rows: int) -> list[int]:
    """The ids below `rows` that stand for nothing: holes in the tokenizer's id range, and padding rows beyond it."""
    spelled = {i for i, spelling in enumerate(tokenizer.token_bytes) if spelling} | tokenizer.special_ids
    return [i for i in range(rows) if i not in spelled]


def sequence_key(seed: int, number: int, stream: int = 0) -> int:
    """The 64 bits from which every random number of a sequence follows, as a signed number."""
    word = np.random.SeedSequence([seed, number, stream]).generate_state(1, np.uint64)[0]
    return _signed(int(word))


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    drawing: Drawing,
    keys: Sequence[int],
    *,
    batch_size: int = 16,
    limits: Sequence[int] | None = None,
    until: Until | None = None,
    scored: bool = True,
) -> list[Sampled]:
    """One continuation per prompt, in the order of the prompts, in evaluation mode; no random state is touched.

    `limits` are new tokens at most, per prompt; `until` says of a row's new ids that they are enough; without
    `scored` no log-probabilities are computed.
    """
    limits = [drawing.max_new_tokens] * len(prompts) if limits is None else limits
    check_positions(model, max((len(p) + limit for p, limit in zip(prompts, limits, strict=True)), default=0))
    rows: list[list[int]] = [[] for _ in prompts]
    logp = [0.0] * len(prompts)

    def enough(place: int, i: int) -> bool:
        rows[place].append(i)
        return until is not None and until(rows[place])

    options = {"batch_size": batch_size, "limits": limits, "enough": enough, "scored": scored}
    for place, _, said in drawn(model, prompts, drawing, keys, **options):
        logp[place] += said
    return [Sampled(row, value, bool(row) and row[-1] in drawing.stop_ids) for row, value in zip(rows, logp)]


def drawn(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    drawing: Drawing,
    keys: Sequence[int],
    *,
    batch_size: int,
    limits: Sequence[int],
    enough: Enough,
    scored: bool,
) -> Iterator[tuple[int, int, float]]:
    """(number of the prompt, new id, its log-probability), one by one as they are drawn.

    `enough(number, new id)` is asked once for each before it is given out, and ends the sequence. Prompts of like
    lengths are read together, padded at the left; a sequence that is over leaves its batch.
    """
    training = model.training
    model.eval()
    try:
        for places in _batches(prompts, limits, batch_size, pads=Reader(model).pads):
            for place, i, said in _continued(
                model,
                [list(prompts[place]) for place in places],
                drawing,
                [keys[place] for place in places],
                [limits[place] for place in places],
                lambda row, i, places=places: enough(places[row], i),
                scored=scored,
            ):
                yield places[place], i, said
    finally:
        model.train(training)


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model reads; None where its configuration names no end."""
    config = model.config.get_text_config().to_dict()
    return next((config[key] for key in POSITIONS if config.get(key) is not None), None)


def check_positions(model: PreTrainedModel, length: int) -> None:
    """UserError where sequences of `length` tokens are more than the model has positions for."""
    positions = positions_of(model)
    if positions is not None and length - 1 > positions:  # the last token is not read
        raise UserError(
            f"max_new_tokens: {length} tokens with the prompt, but the model has {positions} positions; write "
            f"{length - positions - 1} less, or shorten the prompt"
        )


def _batches(prompts: Sequence[Sequence[int]], limits: Sequence[int], size: int, *, pads: bool) -> Iterator[list[int]]:
    places = sorted((place for place, limit in enumerate(limits) if limit > 0), key=lambda place: len(prompts[place]))
    groups = [places] if pads else [list(group) for _, group in groupby(places, lambda place: len(prompts[place]))]
    for group in groups:
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _continued(
    model: PreTrainedModel,
    prompts: list[list[int]],
    drawing: Drawing,
    keys: list[int],
    limits: list[int],
    enough: Enough,
    *,
    scored: bool,
) -> Iterator[tuple[int, int, float]]:
    """As `drawn`, of one batch."""
    batch, rows, n = _Batch(model, prompts, drawing, keys), list(range(len(prompts))), 0
    while rows:
        ids, said = batch.step(n, scored=scored)
        n += 1
        kept = []
        for place, (row, i, value) in enumerate(zip(rows, ids, said, strict=True)):
            over = enough(row, i) or i in drawing.stop_ids or n == limits[row]
            yield row, i, value
            if not over:
                kept.append(place)
        if 0 < len(kept) < len(rows):
            batch.select(kept)
        rows = [rows[place] for place in kept]


class _Batch:
    """Rows that are read together. In inference mode, so no tensor of it may get out."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], drawing: Drawing, keys: list[int]) -> None:
        self.reader, self.prompts, self.drawing = Reader(model), prompts, drawing
        self.ids, self.mask = padded(prompts, model.device)
        self.keys = torch.tensor(keys, device=model.device)
        self.repetition: Repetition | None = None

    @torch.inference_mode()
    def step(self, n: int, *, scored: bool) -> tuple[list[int], list[float]]:
        """The n-th new id of each row, and its log-probability."""
        logits = self.reader(self.ids, self.mask if n == 0 else None)
        if n == 0:
            self.repetition = self.drawing.repetition(self.prompts, logits.shape[1], logits.device)
        changed = logits if self.repetition is None else self.repetition(logits)
        chosen = draw(changed, self.keys, n, self.drawing)
        said, ids = said_of(logits, chosen, scored=scored, n=n), chosen.tolist()
        if self.repetition is not None:
            self.repetition.add(ids)
        self.ids = chosen[:, None]
        return ids, said

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Goes on with these rows."""
        left = torch.tensor(rows, device=self.keys.device)
        self.reader.select(left)
        self.keys, self.ids = self.keys[left], self.ids[left]
        if self.repetition is not None:
            self.repetition.select(rows)


def padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    """The rows, padded at the left with an id of their own, and where they are; None where nothing is padded."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row[:1]] * (longest - len(row)) + [*row] for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return ids, None
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) >= longest - lengths[:, None]


def said_of(logits: Float[Tensor, "B V"], chosen: Int64[Tensor, "B"], *, scored: bool, n: int) -> list[float]:
    """The chosen ids' log-probabilities, nan if they are not asked for; UserError where logits are not numbers."""
    scores = logits.double().log_softmax(-1) if scored else logits
    said = scores.gather(1, chosen[:, None]).squeeze(1).tolist()
    if any(map(math.isnan, said)):
        raise UserError(f"the model's logits are not numbers at new token {n}; mend the model")
    return said if scored else [math.nan] * len(said)


def draw(logits: Float[Tensor, "B V"], keys: Int64[Tensor, "B"], n: int, drawing: Drawing) -> Int64[Tensor, "B"]:
    """The n-th new id of each sequence."""
    temperature, barred = drawing.temperature(n), drawing.barred(n)
    if len(barred):
        logits = logits.index_fill(1, barred.to(logits.device), -torch.inf)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
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
