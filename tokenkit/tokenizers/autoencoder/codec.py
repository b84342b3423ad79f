"""Bytes ⇄ ids in three tiers: pinned strings, codes that were checked, bytes. Lossless whatever the network says."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.cache import DEFAULT_SIZE, ChunkTable, Spelling
from tokenkit.tokenizers.autoencoder.chunkers import MAX_CHUNK, Chunker, cut, escaped, to_bytes, to_text
from tokenkit.tokenizers.autoencoder.ids import IdLayout
from tokenkit.tokenizers.autoencoder.pins import DEAREST, TOKEN_COST, PinTable
from tokenkit.tokenizers.autoencoder.table import PinModel

if TYPE_CHECKING:  # torch; a compact tokenizer does without
    from tokenkit.tokenizers.autoencoder.open_codes import OpenCodes

LEAST_GAIN = 3  # ids that a span must take otherwise, for a spelling by two codes to be worth a try
OPEN_COST = TOKEN_COST + DEAREST  # of equally many ids, those without codes win


class Codec:
    """The ids of any bytes, and back. Pure but for its caches, so threads may share it."""

    def __init__(
        self,
        pins: PinTable,
        chunker: Chunker,
        *,
        first_regular_id: int,
        open_codes: "OpenCodes | None" = None,
        names: tuple[str, ...] = (),
        cache_size: int = DEFAULT_SIZE,
        warm: Mapping[str, Spelling] | None = None,
        max_chunk: int = MAX_CHUNK,
    ) -> None:
        """`warm` are chunks with their ids, as `spell` gives them, that are never forgotten."""
        num_codes = open_codes.num_codes if open_codes else 0
        self.layout = IdLayout(len(pins), num_codes, first_regular_id, names)
        self.pins, self.chunker, self.open_codes, self.max_chunk = pins, chunker, open_codes, max_chunk
        self._model = PinModel(pins, self.layout.byte_base)
        self._bytes = [b""] * self.layout.byte_base + [bytes([b]) for b in range(256)] + list(pins.pieces)
        self._lengths = np.fromiter(map(len, self._bytes), np.int64, len(self._bytes))
        self._table = ChunkTable(self.spell, {} if warm is None else warm, cache_size)
        self._spans: dict[bytes, Spelling | None] = {}
        self._runs: dict[Spelling, bytes] = {}
        self._most_kept = max(cache_size, 1)

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process begins with empty caches."""
        return self.__dict__ | {"_spans": {}, "_runs": {}}

    @property
    def cache(self) -> ChunkTable:
        """Chunks that need not be spelled again."""
        return self._table

    @property
    def fixed_bytes(self) -> list[bytes]:
        """The bytes of every id that is no code of the auto-encoder; b"" for special tokens."""
        return self._bytes

    def encode(self, text: str) -> list[int]:
        """Ids of a text; half a surrogate pair becomes the three bytes that would stand for it."""
        return self.encode_chunks(self.split(text))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes; `decode_bytes` gives exactly these back."""
        return self.encode_chunks(self.chunker.split(to_text(data)))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text; the network is asked once for what is new in all of them."""
        split = [self.split(text) for text in texts]
        if self.open_codes:
            self._prepare(chain.from_iterable(split))
        look_up = self._table.__getitem__
        return [list(chain.from_iterable(map(look_up, chunks))) for chunks in split]

    def split(self, text: str) -> list[str]:
        """The chunks of a text, for `encode_chunks`."""
        return self.chunker.split(escaped(text))

    def encode_chunks(self, chunks: Sequence[str]) -> list[int]:
        """Ids of chunks, one after the other."""
        if self.open_codes:
            self._prepare(chunks)
        return list(chain.from_iterable(map(self._table.__getitem__, chunks)))

    def spell(self, chunk: str) -> Spelling:
        """Ids of one chunk, computed anew: the fewest, then the likeliest."""
        data = to_bytes(chunk)
        if len(data) <= self.max_chunk:
            return self.spell_piece(data) if self.open_codes else self._model.spell(data)
        pieces = cut(data, self.max_chunk)
        spelled = {piece: self.spell_piece(piece) for piece in {*pieces}}  # a long chunk is one piece again and again
        return tuple(chain.from_iterable(map(spelled.__getitem__, pieces)))

    def spell_piece(self, piece: bytes) -> Spelling:
        """Ids of at most `max_chunk` bytes that stand for themselves."""
        plain = self._model.spell(piece)
        if self.open_codes is None or len(plain) < LEAST_GAIN:
            return plain
        spans = self._worthy_spans(piece, plain)
        runs = self._check_spans([piece[a:b] for a, b in spans])
        edges = {}
        for a, b in spans:
            spelled = runs[piece[a:b]]
            if spelled is not None:
                edges[a, b] = (len(spelled) * OPEN_COST, spelled)
        return self._model.search(piece, edges) if edges else plain

    def _worthy_spans(self, piece: bytes, plain: Spelling) -> list[tuple[int, int]]:
        """From every place where the table's own spelling has a border, the longest part that codes may be cheaper for.

        Borders inside a character are left out. More parts would save few ids and cost a look of the network each.
        """
        longest = self.open_codes.max_bytes if self.open_codes else 0
        ends = [0, *np.cumsum([len(self._bytes[index]) for index in plain]).tolist()]
        whole = [n for n, end in enumerate(ends) if end == len(piece) or piece[end] & 0xC0 != 0x80]
        spans = []
        for number, first in enumerate(whole):
            last = max(n for n in whole[number:] if ends[n] - ends[first] <= longest)
            if last - first >= LEAST_GAIN:
                spans.append((ends[first], ends[last]))
        return spans

    def _prepare(self, chunks: Iterable[str]) -> None:
        """Asks the network, in one go, about every span of the chunks that are new."""
        if len(self._spans) > self._most_kept * 16:
            self._spans = {}
        new = [chunk for chunk in {*chunks} if not self._table.knows(chunk)]
        pieces = {piece for chunk in new for piece in cut(to_bytes(chunk), self.max_chunk)}
        spans: set[bytes] = set()
        for piece in pieces:
            plain = self._model.spell(piece)
            if len(plain) >= LEAST_GAIN:
                spans.update(piece[a:b] for a, b in self._worthy_spans(piece, plain))
        self._check_spans(sorted(spans))

    def _check_spans(self, strings: Sequence[bytes]) -> dict[bytes, Spelling | None]:
        """The run of codes of every string, or None; the network is asked about those that are new."""
        if self.open_codes is None:
            return {}
        known = self._spans  # it only grows, so another thread that begins a new one takes nothing from us
        found = {string: known[string] for string in strings if string in known}
        new = [string for string in dict.fromkeys(strings) if string not in found]
        base, codes = self.layout.open_base, self.layout.num_codes
        for string, run in zip(new, self.open_codes.spell(new)):
            spelled = None if run is None else (*(base + code for code in run[:-1]), base + codes + run[-1])
            found[string] = known[string] = spelled
            if run is not None:
                self._runs[run] = string  # the decoder has just said so
        return found

    def decode_bytes(self, ids: Sequence[int], *, strict: bool = False) -> bytes:
        """The bytes of ids; special tokens spell nothing. Any sequence of ids has bytes, an id out of range has none.

        A run of codes that ends too early is read as it stands, or with `strict` left out.
        """
        table = self._bytes
        try:
            if ids and min(ids) < 0:
                raise IndexError
            return b"".join(map(table.__getitem__, ids))
        except IndexError:
            return b"".join(self.token_strings(ids, strict=strict))

    def decode(self, ids: Sequence[int], *, strict: bool = False) -> str:
        """The text of ids; what is no UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids, strict=strict).decode("utf-8", "replace")

    def token_strings(self, ids: Sequence[int], *, strict: bool = False) -> list[bytes]:
        """The bytes that each id adds to the text; a run of codes adds all of its with the last one."""
        ids, base, table = [int(index) for index in ids], self.layout.open_base, self._bytes
        if ids and not (min(ids) >= 0 and max(ids) < self.layout.vocab_size):
            odd = next(index for index in ids if not 0 <= index < self.layout.vocab_size)
            raise UserError(f"id {odd}: this tokenizer has ids 0 .. {self.layout.vocab_size - 1}")
        found = [table[index] if index < base else b"" for index in ids]
        runs = self._code_runs(ids)
        spelled = self._read_runs([run for _, run, _ in runs])
        for (last, _, whole), text in zip(runs, spelled):
            found[last] = text if whole or not strict else b""
        return found

    def _code_runs(self, ids: Sequence[int]) -> list[tuple[int, Spelling, bool]]:
        """Place of the last id, codes, and whether it ends as a run should, of every run of codes."""
        base, codes, runs = self.layout.open_base, self.layout.num_codes, []
        run: list[int] = []
        last = -1
        most = self.open_codes.groups if self.open_codes else 0
        for place in [place for place, index in enumerate(ids) if index >= base]:
            if run and place != last + 1:
                runs.append((last, tuple(run), False))
                run = []
            final, code = divmod(ids[place] - base, codes)
            run.append(code)
            last = place
            if final or len(run) == most:
                runs.append((place, tuple(run), bool(final)))
                run = []
        if run:
            runs.append((last, tuple(run), False))
        return runs

    def _read_runs(self, runs: list[Spelling]) -> list[bytes]:
        if self.open_codes is None:
            return []
        if len(self._runs) > self._most_kept * 16:
            self._runs = {}
        known = self._runs
        new = [run for run in dict.fromkeys(runs) if run not in known]
        known.update(zip(new, self.open_codes.read(new)))
        return [known[run] for run in runs]

    def lengths(self, ids: Sequence[int]) -> Int64[ndarray, "T"]:
        """How many bytes each id adds to the text."""
        array = np.asarray(ids, np.int64)
        if self.open_codes is None or not (array >= self.layout.open_base).any():
            return self._lengths[array]
        return np.fromiter(map(len, self.token_strings(ids)), np.int64, len(array))
