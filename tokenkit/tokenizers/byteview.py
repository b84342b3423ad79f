"""A tokenizer.json seen as bytes: ids of the Rust library, spans in the UTF-8 text."""

import json
from itertools import chain, pairwise

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32, Int64
from numpy import ndarray

from tokenkit.config import UserError
from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding, utf8
from tokenkit.tokenizers.changes import TOLERATED, find_changes
from tokenkit.tokenizers.offsets import Texts, Uncovered, common_bytes, tiled_ends
from tokenkit.tokenizers.pieces import (
    BYTE_FALLBACK,
    Definition,
    model_type,
    parts,
    space_mark,
    token_table,
    unknown_id,
    without_first_space,
)


class ByteView:
    """What a tokenizer.json makes of plain text. Literals of special tokens inside a text are text."""

    def __init__(self, definition: Definition, special_ids: frozenset[int], name: str) -> None:
        self.name = name
        self.token_bytes = token_table(definition, special_ids)
        self._lengths = np.fromiter(map(len, self.token_bytes), np.int64, len(self.token_bytes))
        self._mark, self._unknown_id = space_mark(definition), unknown_id(definition)
        self._has_charsmap = any(part["type"] == "Precompiled" for part in parts(definition.get("normalizer")))
        self._suffix = definition["model"].get("end_of_word_suffix") or ""
        added = {token["id"] for token in definition.get("added_tokens") or []}
        # Between these the library treats the text piece by piece; unknown tokens spell nothing of it.
        self._barriers = self._marked((added - special_ids) | {self._unknown_id})
        self._forbidden = self._marked(special_ids - {self._unknown_id})
        self._start = self._inside = self._backend(definition, special_ids)
        other = without_first_space(definition)
        if other is not None:
            self._inside = self._backend(other, special_ids)
        self.adds_space = self._adds_space(self._start)
        self._adds_space_inside = self._adds_space(self._inside)
        begins_with_space = np.fromiter((spelled[:1] == b" " for spelled in self.token_bytes), np.bool_)
        self._spaced = begins_with_space & (self.adds_space or self._adds_space_inside)
        self.changes = find_changes(definition, self.token_bytes, self._spell_known)
        self.lossless = TOLERATED.issuperset(self.changes)

    def encode_batch(self, texts: list[str], continued: bool) -> list[Encoding]:
        """One encoding per text; `continued` texts stand after a special token."""
        backend = self._inside if continued else self._start
        library = backend.encode_batch_fast if self.lossless else backend.encode_batch  # the fast one has no offsets
        try:
            found = library(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                utf8(text, self.name)  # raises where the library cannot say why
            raise
        if self.lossless:
            return [self._spelled_out(text, one.ids, continued) for text, one in zip(texts, found)]
        return self._by_offsets(texts, found)

    def decode_by_library(self, ids: list[int]) -> str:
        """The text that the tokenizer's own decoder makes: it puts white space where tokens hold none."""
        text = self._start.decode(ids, skip_special_tokens=True)
        return text.replace(self._suffix, " ").strip() if self._suffix else text

    def _spelled_out(self, text: str, ids: list[int], continued: bool) -> Encoding:
        """Spans by what the tokens spell, where that is the text as it was written."""
        raw, array = text.encode(), np.array(ids, np.int32)
        spelled = b"".join(map(self.token_bytes.__getitem__, ids))
        if spelled == raw:
            return _encoding(array, np.cumsum(self._lengths[array]))
        if spelled[:1] == b" " and spelled[1:] == raw and self.adds_space:
            return _encoding(array, np.cumsum(self._lengths[array]) - 1)
        found = (self._inside if continued else self._start).encode(text, add_special_tokens=False)
        place = self._lost_place(text, array, _offsets([found]), continued)
        if place is not None:
            raise self._refusal(text, place, "is spelled by no token")
        return self._by_offsets([text], [found])[0]

    def _by_offsets(self, texts: list[str], found: list[tokenizers.Encoding]) -> list[Encoding]:
        """Spans by the library's offsets, all texts at once; UserError where a character has no token."""
        counts = np.fromiter(map(len, found), np.int64, len(found))
        ids = np.fromiter(chain.from_iterable(one.ids for one in found), np.int32, counts.sum())
        for text, count in zip(texts, counts.tolist()):
            if text and not count:
                raise self._refusal(text, 0, "leaves the text without any token")
            # Behind a character that a charsmap deletes at the beginning, the library's offsets are too low.
            if self._has_charsmap and text and not text[0].isprintable() and not self._normalise(text[0]):
                raise self._refusal(text, 0, "belongs to no token")
        joined, offsets = Texts(texts), _offsets(found)
        offsets += np.repeat(joined.begins[:-1], counts)[:, None]
        if not len(ids):
            return [_encoding(ids, np.zeros(0, np.int64)) for _ in texts]
        forbidden = np.flatnonzero(self._forbidden[ids])
        if len(forbidden):
            raise self._refusal_at(texts, joined, int(offsets[forbidden[0], 0]), "becomes a special token")
        lengths = self._lengths[ids]
        if self._unknown_id is not None:
            lengths[ids == self._unknown_id] = 1  # spells nothing but stands for its characters
        try:
            ends = tiled_ends(offsets, lengths, self._spaced[ids], joined, self._normalise)
        except Uncovered as error:
            raise self._refusal_at(texts, joined, error.place, "belongs to no token") from None
        return _split(ids, ends, counts, joined.positions[joined.begins])

    def _lost_place(
        self, text: str, ids: Int32[ndarray, "T"], offsets: Int64[ndarray, "T 2"], continued: bool
    ) -> int | None:
        """The first character that the tokens lose; None where they spell all that the normalizer made of the text.

        Text between added and unknown tokens is compared piece by piece, as the library tokenised it.
        """
        begin, first, adds = 0, 0, self._adds_space_inside if continued else self.adds_space
        for index in [*np.flatnonzero(self._barriers[ids]).tolist(), len(ids)]:
            end = int(offsets[index, 0]) if index < len(ids) else len(text)
            wanted = self._normalise(text[begin:end])
            wanted = (wanted.replace(self._mark, " ") if self._mark else wanted).encode()
            spelled = b"".join([self.token_bytes[i] for i in ids[first:index].tolist()])
            # The library adds a dummy space to a piece, or none where it normalised the whole text before it cut it.
            if spelled != wanted and not (adds and (spelled == b" " + wanted or b" " + spelled == wanted)):
                return begin + len(wanted[: common_bytes(wanted, spelled)].decode(errors="ignore"))
            if index < len(ids):
                begin, first, adds = int(offsets[index, 1]), index + 1, self._adds_space_inside
        return None

    def _refusal(self, text: str, place: int, what: str) -> UserError:
        place = min(place, len(text) - 1)
        return UserError(
            f"{self.name}: cannot give byte spans: character {place}, {text[place]!r} (U+{ord(text[place]):04X}) in "
            f"{text[max(place - 10, 0) : place + 10]!r}, {what}; leave such texts out or use another tokenizer"
        )

    def _refusal_at(self, texts: list[str], joined: Texts, place: int, what: str) -> UserError:
        index = int(np.searchsorted(joined.begins, place, "right")) - 1
        return self._refusal(texts[index], place - int(joined.begins[index]), what)

    def _normalise(self, text: str) -> str:
        normalizer = self._start.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _marked(self, ids: set[int | None] | frozenset[int]) -> Bool[ndarray, "V"]:
        marked = np.zeros(len(self.token_bytes), np.bool_)
        marked[[index for index in ids if index is not None]] = True
        return marked

    def _adds_space(self, backend: tokenizers.Tokenizer) -> bool:
        ids = backend.encode("a", add_special_tokens=False).ids
        return b"".join([self.token_bytes[index] for index in ids]) == b" a"

    def _spell_known(self, text: str) -> bytes | None:
        ids = self._start.encode(text, add_special_tokens=False).ids
        return None if self._unknown_id in ids else b"".join([self.token_bytes[index] for index in ids])

    def _backend(self, definition: Definition, special_ids: frozenset[int]) -> tokenizers.Tokenizer:
        """The library's tokenizer for text alone: no template, truncation or padding, and no special token matched."""
        added = definition.get("added_tokens") or []
        hidden = [{**token, "special": token["id"] in special_ids} for token in added]
        definition = {**definition, "added_tokens": hidden}
        if model_type(definition) == "Unigram":
            definition["model"] = _shielded(definition["model"], special_ids)
        try:
            backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises nothing more special
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.name}: the tokenizers library cannot read this tokenizer.json ({reason})") from None
        for token in added:
            index = backend.token_to_id(token["content"])
            if index != token["id"]:  # the library numbers added tokens itself
                raise UserError(
                    f"{self.name}: the added token {token['content']!r} has id {token['id']} in tokenizer.json, where "
                    f"the tokenizers library gives it {index}; number added tokens one by one"
                )
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend


def _shielded(model: Definition, special_ids: frozenset[int]) -> Definition:
    """A Unigram model that never prefers the literal of a special token or byte to its spelling by other pieces."""
    floor = min((score for _, score in model["vocab"]), default=0.0) - 1e4
    special = special_ids | {i for i, (piece, _) in enumerate(model["vocab"]) if piece in BYTE_FALLBACK}
    return {**model, "vocab": [[p, floor if i in special else s] for i, (p, s) in enumerate(model["vocab"])]}


def _offsets(found: list[tokenizers.Encoding]) -> Int64[ndarray, "T 2"]:
    pairs = chain.from_iterable(one.offsets for one in found)
    return np.fromiter(chain.from_iterable(pairs), np.int64).reshape(-1, 2)


def _split(
    ids: Int32[ndarray, "T"], ends: Int64[ndarray, "T"], counts: Int64[ndarray, "N"], begins: Int64[ndarray, "N1"]
) -> list[Encoding]:
    """One encoding per text, which has so many tokens and begins at that byte of all texts joined."""
    ends[np.cumsum(counts)[counts > 0] - 1] = begins[1:][counts > 0]
    base = np.repeat(begins[:-1], counts)
    starts = np.append(0, ends[:-1]) - base
    ends = ends - base
    plain, segment = np.zeros(len(ids), np.bool_), np.full(len(ids), TEXT_SEGMENT, np.int32)
    cuts = np.cumsum(np.append(0, counts)).tolist()
    parts = [slice(begin, end) for begin, end in pairwise(cuts)]
    return [Encoding(ids[part], starts[part], ends[part], plain[part], segment[part]) for part in parts]


def _encoding(ids: Int32[ndarray, "T"], ends: Int64[ndarray, "T"]) -> Encoding:
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1]
    plain = np.zeros(len(ends), np.bool_)
    return Encoding(ids, starts, ends, plain, np.full(len(ends), TEXT_SEGMENT, np.int32))
