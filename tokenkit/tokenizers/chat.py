"""Conversations as tokens: the same places in every family, so that two renderings of one conversation align.

A rendered conversation is a list of pieces. What people or models wrote is a text piece with byte spans; everything
else is template: out of band, zero-width. Every piece has a place (a segment of the encoding) that does not depend on
the family: the header of message 3 is the header of message 3 in Llama's words and in Gemma's.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64
from numpy import ndarray

from tokenkit.tokenizers.base import Encoding, Tokenizer
from tokenkit.tokenizers.conversation import Message, Part, as_messages, parts_of
from tokenkit.tokenizers.infer import infer_roles
from tokenkit.tokenizers.offsets import byte_positions, code_points
from tokenkit.tokenizers.roles import Roles, family_roles
from tokenkit.tokenizers.template import Template, Tools, Written, write

TrainOn = Literal["assistant", "last_assistant", "all"]
HEADER_PLACES = 4  # what stands between turns, start of header, name of role, end of header
PART_PLACES = 8  # what opens a part, its text, and texts that differ from it (escaped, other spacing)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation; `place` orders and pairs stretches across families."""

    text: str
    place: int
    start: int = 0  # first byte among the bytes of all parts of the conversation; template stands between bytes
    template: bool = True
    trained: bool = False


@dataclass(frozen=True, slots=True)
class ChatEncoding:
    """The tokens of a rendered conversation, and which of them a model is trained to write."""

    encoding: Encoding
    trained: Bool[ndarray, "T"]

    @property
    def num_bytes(self) -> int:
        """Bytes of the text that trained tokens stand for."""
        return int((self.encoding.ends - self.encoding.starts)[self.trained].sum())

    def first(self, count: int) -> "ChatEncoding":
        """The first tokens."""
        one = self.encoding
        columns = (column[:count] for column in (one.ids, one.starts, one.ends, one.special, one.segment))
        return ChatEncoding(Encoding(*columns), self.trained[:count])


def render(
    tokenizer: Tokenizer,
    messages: object,
    *,
    tools: Tools = None,
    prompt: bool = False,
    train_on: TrainOn = "assistant",
    template_options: Mapping[str, Any] | None = None,
) -> list[Piece]:
    """The conversation as the tokenizer's family writes it; with `prompt`, up to where the assistant answers.

    By the tokenizer's own chat template where it has one, else by the roles of its family. Turns that a family lacks
    (system, tools) are written into turns that it has. Trained are what an assistant wrote, its calls and its end of
    turn. `template_options` are variables of the template (`enable_thinking`, `date_string`, ...).
    """
    canonical = as_messages(messages)
    roles = roles_of(tokenizer)
    family = template_of(tokenizer, template_options) or Template(roles.jinja(), ())
    written = write(family, tokenizer.name, canonical, tools, prompt=prompt)
    return _Places(canonical, roles, train_on).pieces(written)


def template_of(tokenizer: Tokenizer, options: Mapping[str, Any] | None = None) -> Template | None:
    """The tokenizer's own chat template; None where it has none."""
    if tokenizer.chat_template is None:
        return None
    literals = {index: text for text, index in tokenizer.special_tokens.items()}
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    tokens = tuple((f"{role}_token", literals[index]) for role, index in roles.items() if index is not None)
    return Template(tokenizer.chat_template, tokens, tuple(sorted((options or {}).items())))


def roles_of(tokenizer: Tokenizer) -> Roles:
    """The roles of the tokenizer's family: read from its chat template, else known by its special tokens."""
    template = template_of(tokenizer)
    return family_roles(tokenizer) if template is None else infer_roles(template, tokenizer.name)


def end_of_turn_ids(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that close an assistant's turn: where its answer ends."""
    roles = roles_of(tokenizer)
    pattern, literals = _special_pattern(tokenizer)
    return [literals[found][0] for found in pattern.findall(roles.eot)]


class _Places:
    """Numbers for every place of one conversation, the same whichever family writes it."""

    def __init__(self, messages: list[Message], roles: Roles, train_on: TrainOn) -> None:
        self.messages, self.roles = messages, roles
        self._extra: list[int] = []  # per message and for what follows the last: system prompts, dates, tools
        self._parts: dict[tuple[int, str, int, int], int] = {}  # (message, kind, call, item) -> what opens it
        self._close: list[int] = []  # what ends the last part, then the end of turn
        self._next = 1  # 0 is bos
        by_message: list[list[Part]] = [[] for _ in messages]
        for part in parts_of(messages):
            by_message[part.message].append(part)
        for parts in by_message:
            self._extra.append(self._take(HEADER_PLACES))
            for part in parts:
                self._parts[part.message, part.kind, part.call, part.item] = self._take(PART_PLACES)
            self._close.append(self._take(2))
        self._extra.append(self._take(HEADER_PLACES))
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = {"assistant": assistants, "last_assistant": assistants[-1:], "all": range(len(messages))}
        self._trained = chosen[train_on]

    def _take(self, count: int) -> int:
        self._next += count
        return self._next - count

    def pieces(self, written: list[Written]) -> list[Piece]:
        """The pieces of a rendered conversation, places never falling."""
        found: list[Piece] = []
        before: Part | None = None
        for index, stretch in enumerate(written):
            if stretch.part is None:
                after = written[index + 1].part if index + 1 < len(written) else None
                found += self._template(stretch.text, before, after)
            else:
                before = stretch.part
                found.append(self._text(stretch, before))
        highest = 0
        for index, piece in enumerate(found):
            if piece.place < highest:  # written again, or out of its order: nothing to align with
                found[index] = Piece(piece.text, highest)
            highest = max(highest, piece.place)
        return found

    def _opens(self, part: Part) -> int:
        return self._parts[part.message, part.kind, part.call, part.item]

    def _text(self, stretch: Written, part: Part) -> Piece:
        place = self._opens(part) + 1 + stretch.variant
        # What a family puts in other words (escaped, spaced) has no bytes of the part: it is compared as a whole.
        template = stretch.variant > 0
        return Piece(stretch.text, place, part.start + stretch.skipped, template, part.message in self._trained)

    def _template(self, text: str, before: Part | None, after: Part | None) -> list[Piece]:
        """Template text between two parts, cut into end of turn, what stands between turns, and header."""
        if before is not None and after is not None and before.message == after.message:
            return [Piece(text, self._opens(after), trained=after.message in self._trained)]
        found: list[Piece] = []
        if before is None:
            begin = len(self.roles.bos) if self.roles.bos and text.startswith(self.roles.bos) else 0
            found.append(Piece(text[:begin], 0))
            text = text[begin:]
        else:
            end = self.roles.end_of_turn(self.messages[before.message]["role"])
            at = text.find(end) if end else -1
            close = self._close[before.message]
            trained = before.message in self._trained
            if at >= 0:
                found += [Piece(text[:at], close, trained=trained), Piece(end, close + 1, trained=trained)]
                text = text[at + len(end) :]
            elif after is None:
                found.append(Piece(text, close, trained=trained))
                text = ""
        extra = self._extra[len(self.messages) if after is None else after.message]
        cut = self.roles.find_header(text)
        if cut is None:
            found.append(Piece(text, extra))
        else:
            found += [Piece(part, extra + number) for number, part in enumerate(cut[:HEADER_PLACES])]
            rest = cut[HEADER_PLACES]
            if after is None:
                found.append(Piece(rest, extra + HEADER_PLACES - 1))
            else:
                found.append(Piece(rest, self._opens(after), trained=after.message in self._trained))
        return [piece for piece in found if piece.text]


def encode_chat(tokenizer: Tokenizer, messages: object, **options: Any) -> ChatEncoding:
    """`render`, tokenised: special tokens are made by template text only, literals inside messages stay text."""
    return encode_pieces(tokenizer, render(tokenizer, messages, **options))


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> ChatEncoding:
    """The tokens of a rendered conversation as the tokenizer itself makes them of the whole text.

    A token that begins in the template and ends in a part (two newlines in one token) belongs to the part, its span cut
    to the part's bytes. Template tokens are special: zero-width, in the segment of their place.
    """
    text = "".join(piece.text for piece in pieces)
    stretches = _stretches(tokenizer, pieces, text)
    sections = [text[begin:end] for begin, end, index in stretches if index is None]
    first = int(bool(stretches) and stretches[0][2] is None)  # a dummy space may stand at the beginning only
    tokenised = iter(
        [*tokenizer.encode_batch(sections[:first]), *tokenizer.encode_batch(sections[first:], continued=True)]
    )
    at = byte_positions(code_points(text))
    ids, starts, ends = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for begin, end, index in stretches:
        if index is None:
            encoding = next(tokenised)
            ids.append(encoding.ids)
            starts.append(encoding.starts + at[begin])
            ends.append(encoding.ends + at[begin])
        else:
            ids.append(np.array([index], np.int32))
            starts.append(at[[begin]])
            ends.append(at[[end]])
    return _in_places(pieces, np.concatenate(ids), np.concatenate(starts), np.concatenate(ends))


def _in_places(
    pieces: Sequence[Piece], ids: Int32[ndarray, "T"], starts: Int64[ndarray, "T"], ends: Int64[ndarray, "T"]
) -> ChatEncoding:
    """Tokens with spans in the rendered text, given to pieces: spans in the parts' bytes, places, what is trained."""
    sizes = np.array([len(piece.text.encode()) for piece in pieces], np.int64)
    until = np.cumsum(sizes)
    template = np.array([piece.template for piece in pieces], np.bool_)
    first = np.searchsorted(until, starts, side="right").clip(max=len(pieces) - 1)
    last = np.maximum(np.searchsorted(until, ends, side="left"), first)
    number = np.arange(len(pieces))
    next_text = np.minimum.accumulate(np.where(template, len(pieces), number)[::-1])[::-1]
    piece = np.where(next_text[first] <= last, next_text[first], first)
    special = template[piece]
    begin = np.array([one.start for one in pieces], np.int64)
    done = np.maximum.accumulate(np.where(template, 0, begin + sizes))  # bytes of parts before and within each piece
    low = np.where(special, done[piece], begin[piece] + (starts - (until - sizes)[piece]).clip(min=0))
    high = np.where(special, done[piece], begin[piece] + np.minimum(ends - (until - sizes)[piece], sizes[piece]))
    opens = np.append(True, piece[1:] != piece[:-1])[: len(piece)] & ~special
    low[opens] = begin[piece[opens]]  # bytes that a special token before them swallowed belong to the next token
    place = np.array([one.place for one in pieces], np.int32)[piece]
    trained = np.array([one.trained for one in pieces], np.bool_)[piece]
    return ChatEncoding(Encoding(ids, low, np.maximum(high, low), special, place), trained)


def _stretches(tokenizer: Tokenizer, pieces: Sequence[Piece], text: str) -> list[tuple[int, int, int | None]]:
    """Character ranges in order: special tokens with their id, and the sections between them without.

    Only template text makes special tokens, empty ranges. Some swallow the white space beside them, as in the library.
    """
    pattern, literals = _special_pattern(tokenizer)
    found: list[tuple[int, int, int | None]] = []
    reached = offset = 0
    for run in _template_runs(pieces):
        if isinstance(run, int):
            offset += run
            continue
        for match in pattern.finditer(run):
            index, left, right = literals[match[0]]
            place, end = offset + match.start(), offset + match.end()
            before = max(reached, len(text[:place].rstrip())) if left else place
            if reached < before:
                found.append((reached, before, None))
            found.append((place, place, index))
            reached = len(text) - len(text[end:].lstrip()) if right else end
        offset += len(run)
    if reached < len(text):
        found.append((reached, len(text), None))
    return found


def _template_runs(pieces: Sequence[Piece]) -> Iterator[str | int]:
    """Neighbouring template pieces joined; for text of parts, how many characters it has."""
    for template, run in itertools.groupby(pieces, key=lambda piece: piece.template):
        joined = "".join(piece.text for piece in run)
        yield joined if template else len(joined)


@functools.lru_cache(maxsize=64)
def _special_pattern(tokenizer: Tokenizer) -> tuple[re.Pattern[str], dict[str, tuple[int, bool, bool]]]:
    """What finds special tokens, the longest first, and per literal its id and which white space it swallows."""
    literals = {literal: (index, False, False) for literal, index in tokenizer.special_tokens.items() if literal}
    for token in tokenizer.added_tokens:
        if token["content"] in literals:
            literals[token["content"]] = (token["id"], token["lstrip"], token["rstrip"])
    ordered = sorted(literals, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)"), literals
