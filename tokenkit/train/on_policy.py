"""Rows whose text goes on as the student, or the teacher, writes it: a student is taught where it will stand.

GKD (Agarwal+ 2024, 2306.13649): in a share of the rows, what follows a prompt is drawn from the student as it is at
that step, and the teacher is asked about that. Drawn from the teacher it is sequence-level distillation (Kim, Rush
2016, 1606.07947). A draw follows from (seed, step, row) and the weights, so a resumed run draws the same, and however a
step is cut into microbatches, its rows are the same. Both sides must have one tokenizer: the ids that were drawn are
what both read, and no text is tokenised again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray
from pydantic import Field, model_validator

from tokenkit.config import UserError
from tokenkit.data.ahead import Around
from tokenkit.data.batch import Batch, Batches, collate, parts_of
from tokenkit.data.example import Example, Reading, Side, make_examples
from tokenkit.data.messages import Dialogue
from tokenkit.data.stream import StreamedRows
from tokenkit.models.sample import DrawConfig, Drawing, SamplingConfig, drawing_of, sample, sequence_key
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import end_of_turn_ids

STREAM = 7  # apart from whatever else is drawn of the run's seed


class OnPolicyConfig(DrawConfig):
    """Which rows go on as a model writes them, and how it does."""

    share: float = Field(ge=0, le=1)
    """Of the rows of a step, on average; 0 is the run without, bit for bit."""
    who: Literal["student", "teacher"] = "student"
    prompt_tokens: int = Field(16, ge=0)
    """Tokens of a window that stay, after its start token and what is not learnt. Of a conversation everything stays
    up to its last answer."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Tokens that are drawn at most, and the horizon of the temperature; null: as many as the row had there."""
    batch_size: int = Field(16, ge=1)
    """Rows that are drawn together."""

    @model_validator(mode="after")
    def _horizon(self) -> "OnPolicyConfig":
        if self.max_new_tokens is None and self.temperature.kind != "constant":
            raise UserError(
                f"on_policy.max_new_tokens: missing; a temperature of kind {self.temperature.kind} is laid out over it"
            )
        return self


class OnPolicyBatches(Around):
    """The batches of a run, some rows of which go on as the student or the teacher writes them."""

    def __init__(
        self, batches: Batches, config: OnPolicyConfig, student: ModelView, teacher: ModelView | None = None
    ) -> None:
        """`teacher` is needed where it writes; UserError where the two sides do not read the same ids."""
        super().__init__(batches)
        self.rows, self.config = batches, config
        _check(batches, config, teacher)
        view = teacher if config.who == "teacher" and teacher is not None else student
        self.view, self.model, self.tokenizer = view, view.model, batches.student
        self._drawings = {
            chat: _drawing(config, self.tokenizer, view.vocab_rows, chat=chat) for chat in _kinds(batches)
        }

    def at(self, step: int, num_microbatches: int = 1, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The microbatches of a step, together always the same rows."""
        own = self.rows
        if self.config.share == 0:
            return own.at(step, num_microbatches, rank, ranks)
        numbers = own.rows(step)
        parts = parts_of(len(numbers), num_microbatches, rank, ranks)
        # processes that share a model read it together, and so all draw all rows
        mine = [place for part in parts for place in part] if ranks == 1 else [*range(len(numbers))]
        rows = {place: own.single(numbers[place])[0] for place in mine}
        made = make_examples(list(rows.values()), own.student, own.teacher, own.reading)
        examples = dict(zip(mine, made, strict=True))
        chosen = [place for place in self._chosen(step, len(numbers)) if place in rows]
        for chat, drawing in self._drawings.items():
            places = [place for place in chosen if isinstance(rows[place], Dialogue) == chat]
            more = 0 if chat else self.config.prompt_tokens
            self.view.whole(partial(self._go_on, examples, places, drawing, step, more))
        return [collate([examples[i] for i in part], [numbers[i] for i in part], None, own.wanted) for part in parts]

    def _chosen(self, step: int, count: int) -> list[int]:
        """The places of a step whose rows go on: those of a smaller share are among those of a larger one."""
        draws = np.random.default_rng([self.rows.seed, step, STREAM]).random(count)
        return np.flatnonzero(draws < self.config.share).tolist()

    def _go_on(
        self, examples: dict[int, Example], places: Sequence[int], drawing: Drawing, step: int, more: int
    ) -> None:
        """Replaces what follows the prompts, `more` tokens longer than they must be, of some examples."""
        lengths = {place: prompt_length(examples[place], more) for place in places}
        room = {place: len(examples[place].student.ids) - length for place, length in lengths.items()}
        places = [place for place in places if room[place] > 0]
        prompts = [examples[place].student.ids[: lengths[place]].tolist() for place in places]
        first = step * self.rows.batch_size
        found = sample(
            self.model,
            prompts,
            drawing,
            [sequence_key(self.rows.seed, first + place, STREAM) for place in places],
            batch_size=self.config.batch_size,
            limits=[min(room[place], self.config.max_new_tokens or room[place]) for place in places],
        )
        for place, drawn in zip(places, found, strict=True):
            examples[place] = continued(examples[place], lengths[place], drawn.ids, self.tokenizer, self.rows.reading)


def _check(batches: Batches, config: OnPolicyConfig, teacher: ModelView | None) -> None:
    other = batches.teacher
    if batches.record is not None:
        raise UserError("on_policy: a recorded teacher has not read what is drawn; leave record out")
    if other is not None and other.fingerprint != batches.student.fingerprint:
        raise UserError("on_policy: student and teacher read other ids; leave target_tokenizer out, or on_policy")
    if batches.packing:
        raise UserError("on_policy: rows that are packed cannot go on; write data.packing=false")
    if batches.reading.mode is not None:
        raise UserError("on_policy: data.chunks are joined over text that is not there yet; write unconstrained")
    if config.who == "teacher" and (teacher is None or teacher.tables or not teacher.adapters):
        raise UserError(
            "on_policy.who: this teacher is the student's own body with other tables; write teacher={source: ...}"
        )


def _kinds(batches: Batches) -> list[bool]:
    """Whether there are windows (False), conversations (True) or both among the rows."""
    rows = batches.windows[:1] if isinstance(batches.windows, StreamedRows) else batches.windows
    return sorted({isinstance(row, Dialogue) for row in rows})


def _drawing(config: OnPolicyConfig, tokenizer: Tokenizer, rows: int, *, chat: bool) -> Drawing:
    keys = {key: value for key, value in config if key in DrawConfig.model_fields}
    whole = SamplingConfig(**keys, max_new_tokens=config.max_new_tokens or 1)
    return drawing_of(whole, tokenizer, rows, end_of_turn_ids(tokenizer) if chat else ())


def prompt_length(example: Example, tokens: int) -> int:
    """How many ids of a row stay: up to the last stretch that is learnt, and so many more."""
    trained = example.student.trained.copy()
    trained[:1] = False  # the first token is given
    starts = np.flatnonzero(trained & ~np.append(False, trained[:-1]))
    return len(trained) if not len(starts) else int(starts[-1]) + tokens


def continued(example: Example, length: int, ids: Sequence[int], tokenizer: Tokenizer, reading: Reading) -> Example:
    """The example with other ids, all of them learnt, after its first `length`; each is a chunk on both sides."""
    old, new = example.student, np.array(ids, example.student.ids.dtype)
    first = int(old.chunk[:length].max(initial=-1)) + 1
    compared = ~_left_out(new, tokenizer, reading)
    chunk = np.where(compared, first + np.cumsum(compared) - 1, -1).astype(old.chunk.dtype)
    trained = np.append(old.trained[:length], np.ones(len(new), np.bool_))
    side = Side(np.append(old.ids[:length], new), np.append(old.chunk[:length], chunk), trained)
    return Example(
        side,
        None if example.teacher is None else side,
        first + int(compared.sum()),
        _num_bytes(side, tokenizer),
        None if example.space_after is None else _space_after(example, side, first, tokenizer, reading),
    )


def _left_out(ids: Int[ndarray, "T"], tokenizer: Tokenizer, reading: Reading) -> Bool[ndarray, "T"]:
    if reading.special_tokens == "ignore":
        return np.isin(ids, list(tokenizer.special_ids))
    if reading.special_tokens == "ignore_pad" and tokenizer.pad_id is not None:
        return ids == tokenizer.pad_id
    return np.zeros(len(ids), np.bool_)


def _num_bytes(side: Side, tokenizer: Tokenizer) -> int:
    return sum(len(tokenizer.token_bytes[i]) for i in side.ids[side.trained].tolist())


def _space_after(
    example: Example, side: Side, first: int, tokenizer: Tokenizer, reading: Reading
) -> Bool[ndarray, "K"]:
    """As before for the chunks that another one of the prompt follows; for the others by the ids that now follow."""
    assert example.space_after is not None
    assert reading.spaces is not None
    begins = reading.spaces[0][side.ids] & reading.spaces[1][side.ids]
    closed = np.append(begins[1:], False) | np.isin(side.ids, list(tokenizer.special_ids))
    ends = np.flatnonzero(side.chunk >= 0)
    found = np.zeros(side.chunk.max(initial=-1) + 1, np.bool_)
    found[side.chunk[ends]] = closed[ends]  # ascending, so a chunk's last token stays
    kept = max(0, first - 1)
    found[:kept] = example.space_after[:kept]
    return found
