"""Continuations of prompts, as text: ids drawn by `sample`, ended by ids or by stop strings, whole or as they come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from tokenkit.config import UserError, build
from tokenkit.models.factorised_view import FactorisedView, view_of
from tokenkit.models.load import head_matrix
from tokenkit.models.sample import DrawConfig, Drawing, drawn, empty_ids, positions_of, sequence_key
from tokenkit.models.speculative import Draft, Tally, speculated
from tokenkit.models.stopping import TextSoFar
from tokenkit.models.temperature import TemperatureConfig
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.base import Tokenizer

OF_CODES = ("max_new_tokens", "temperature", "top_p", "stop")  # what a model with tables of codes can be told


class WritingConfig(DrawConfig):
    """How a text is written."""

    max_new_tokens: int = Field(64, ge=1)
    """Also the horizon of the temperature's schedule. A text ends earlier where the model's positions do."""
    min_new_tokens: int = Field(0, ge=0)
    """Before so many tokens none that ends the text is drawn."""
    temperature: TemperatureConfig = TemperatureConfig(start=0.0)
    """A number (0 takes the likeliest token), or a schedule over the new tokens."""
    repetition_penalty: float = Field(1.0, gt=0)
    """What positive logits of ids in prompt and text are divided by, and negative ones multiplied. 1909.05858."""
    no_repeat_ngram: int = Field(0, ge=0)
    """No run of so many tokens stands twice in prompt and text; 0: any may."""
    stop: tuple[str, ...] = ()
    """Strings that end a text and are no part of it."""


@dataclass(frozen=True)
class Written:
    """A continuation: its text, its ids (the one that ended it among them), and what ended it.

    `logp` is the log-probability of the ids at temperature 1, in nats, of the model before penalties and filters; nan
    where it was not asked for.
    """

    text: str
    ids: list[int]
    logp: float
    ended: Literal["end", "stop", "length"]
    """An id that ends texts; a stop string; or neither came."""


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    batch_size: int = 16,
    **how: Any,
) -> list[str]:
    """One continuation per prompt, without the prompt, up to the end-of-text token; greedy unless `how` says otherwise.

    `how`: the keys of `WritingConfig`, as in `temperature=0.7, top_p=0.9, stop=["\\n"]`. A text is begun by the start
    token, ids are taken as they are. `stop_ids` end a continuation too. What is written for a prompt depends on `seed`
    and its place among the prompts, not on the batch; the process's random state is left as it was. Of a model with
    tables of codes, temperature and top_p hold for every part of an id.
    """
    config = build(WritingConfig, {"max_new_tokens": max_new_tokens, **how, "stop": tuple(how.get("stop", ()))})
    options = {"seed": seed, "stop_ids": stop_ids, "batch_size": batch_size}
    return [written.text for written in write(model, tokenizer, prompts, config, **options)]


def write(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    config: WritingConfig,
    *,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    batch_size: int = 16,
    scored: bool = False,
    draft: Draft | None = None,
    tally: Tally | None = None,
) -> list[Written]:
    """As `generate`, with all that is known of each continuation; `scored` asks for the log-probabilities.

    With a `draft`, whose guesses the model checks, prompts are continued one at a time, and `tally` counts.
    """
    task = _Task.of(model, tokenizer, prompts, config, stop_ids)
    if isinstance(task.view, FactorisedView):
        assert draft is None, "a draft guesses ids, not their parts"
        return _of_codes(task, seed)
    for _ in task.pieces(seed, batch_size, scored=scored, draft=draft, tally=tally):
        pass
    return [task.written(place) for place in range(len(prompts))]


def stream(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    config: WritingConfig,
    *,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    batch_size: int = 16,
    draft: Draft | None = None,
    tally: Tally | None = None,
) -> Iterator[tuple[int, str]]:
    """(number of the prompt, next piece of its text), as they are written; joined, the texts that `write` gives.

    A piece is never empty, ends with a whole character, and holds nothing that may still become a stop string. Of a
    model with tables of codes, each text comes in one piece.
    """
    task = _Task.of(model, tokenizer, prompts, config, stop_ids)
    if isinstance(task.view, FactorisedView):
        yield from ((place, one.text) for place, one in enumerate(_of_codes(task, seed)) if one.text)
        return
    yield from task.pieces(seed, batch_size, scored=False, draft=draft, tally=tally)


class _Task:
    """Some prompts and what is written after them."""

    def __init__(
        self, view: Any, tokenizer: Tokenizer, rows: list[list[int]], config: WritingConfig, stops: list[int]
    ) -> None:
        self.view, self.tokenizer, self.rows, self.config, self.stops = view, tokenizer, rows, config, stops
        self.texts = [TextSoFar(config.stop) for _ in rows]
        self.ids: list[list[int]] = [[] for _ in rows]
        self.logp = [0.0] * len(rows)

    @staticmethod
    def of(
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        prompts: Sequence[str | list[int]],
        config: WritingConfig,
        stop_ids: Sequence[int],
    ) -> "_Task":
        texts = iter(tokenizer.encode_batch([prompt for prompt in prompts if isinstance(prompt, str)]))
        rows = [[tokenizer.start_id(), *next(texts).ids.tolist()] if isinstance(p, str) else p for p in prompts]
        stops = list(dict.fromkeys([*declared_ends(model, tokenizer), *stop_ids]))
        return _Task(view_of(model), tokenizer, rows, config, stops)

    def pieces(
        self, seed: int, batch_size: int, *, scored: bool, draft: Draft | None, tally: Tally | None
    ) -> Iterator[tuple[int, str]]:
        """Writes, and gives out the pieces of text."""
        model, given = self.view.model, [0] * len(self.rows)
        drawing, keys = self._drawing(model), [sequence_key(seed, number) for number in range(len(self.rows))]
        limits = self._limits(model)
        options = {"limits": limits, "enough": self._add, "scored": scored}
        if draft is None:
            ids = drawn(model, self.rows, drawing, keys, batch_size=batch_size, **options)
        else:
            own = self._drawing(draft.model)
            ids = speculated(model, draft, self.rows, (drawing, own), keys, tally=tally or Tally(), **options)
        for place, _, said in ids:
            self.logp[place] += said
            text = self.texts[place]
            if len(self.ids[place]) == limits[place] or self.ids[place][-1] in self.stops:
                text.finish()
            if len(text.text) > given[place]:
                piece, given[place] = text.text[given[place] :], len(text.text)
                yield place, piece

    def written(self, place: int) -> Written:
        text, ids = self.texts[place], self.ids[place]
        ended = "stop" if text.stopped else "end" if ids and ids[-1] in self.stops else "length"
        return Written(text.text, ids, self.logp[place], ended)

    def _add(self, place: int, i: int) -> bool:
        self.ids[place].append(i)
        if i in self.stops:
            return True
        self.texts[place].add(self.tokenizer.token_bytes[i])
        return self.texts[place].stopped

    def _drawing(self, model: PreTrainedModel) -> Drawing:
        config = self.config
        return Drawing(
            config,
            config.temperature.over(config.max_new_tokens),
            config.max_new_tokens,
            config.min_new_tokens,
            frozenset(self.stops),
            tuple(empty_ids(self.tokenizer, len(head_matrix(model)))),
            config.repetition_penalty,
            config.no_repeat_ngram,
        )

    def _limits(self, model: PreTrainedModel) -> list[int]:
        """New tokens of each row: as many as were asked for, or as the model has positions for."""
        positions = positions_of(model)
        longest = max(map(len, self.rows), default=0)
        if positions is not None and longest > positions:
            raise UserError(f"prompt: {longest} tokens, but the model has {positions} positions; shorten it")
        room = [self.config.max_new_tokens if positions is None else positions + 1 - len(row) for row in self.rows]
        return [min(self.config.max_new_tokens, more) for more in room]


def _of_codes(task: _Task, seed: int) -> list[Written]:
    """What a model with tables of codes writes, which draws its ids part by part."""
    view, tokenizer, config = task.view, task.tokenizer, task.config
    assert isinstance(tokenizer, LearnedTokenizer), "tables of codes belong to a learned tokenizer"
    _check_of_codes(config)
    if not task.rows:
        return []
    training = view.model.training
    view.model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            options = {"temperature": config.temperature.start, "top_p": config.top_p, "stop_ids": task.stops}
            found = view.continued(task.rows, max_new_tokens=config.max_new_tokens, **options)
    finally:
        view.model.train(training)
    written = []
    for ids in found:
        text = TextSoFar(config.stop)
        text.add(tokenizer.codec.decode_bytes(ids))
        text.finish()
        ended = "stop" if text.stopped else "end" if len(ids) < config.max_new_tokens else "length"
        written.append(Written(text.text, ids, float("nan"), ended))
    return written


def _check_of_codes(config: WritingConfig) -> None:
    fields = WritingConfig.model_fields
    foreign = [key for key in fields if key not in OF_CODES and getattr(config, key) != fields[key].default]
    if config.temperature.kind != "constant":
        foreign.append("temperature.kind")
    if foreign:
        raise UserError(f"{foreign[0]}: a model with open codes draws its ids part by part; leave it out")


def declared_ends(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The tokenizer's end of text first, then the further ends that the model declares (chat models have several)."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return list(dict.fromkeys(i for i in (tokenizer.eos_id, *declared) if i is not None))
