"""Vectors of tokens, learnt from text in seconds: who stands beside whom, and which bytes a token is spelled with.

Positive pointwise mutual information of tokens in a window, factorised: what skip-gram training approximates (Levy and
Goldberg 2014, NeurIPS; Levy+ 2015, TACL 3). Byte n-grams predict the vectors of rare tokens, as fastText's do
(Bojanowski+ 2017, TACL 5); the n-gram vectors are a ridge regression of the tokens' own. fastText itself, which FOCUS
and WECHSEL were published with, is no longer maintained and has to be compiled.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64
from numpy import ndarray
from torch import Tensor

from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.evidence import Texts
from tokenkit.transfer.mixture import ranges
from tokenkit.transfer.plan import TransferPlan
from tokenkit.transfer.rows import BLOCK_BYTES

SMOOTHING = 0.75  # power of the contexts' counts; without it PPMI favours rare contexts (Levy+ 2015)
BLOCK_TOKENS = 1 << 21  # of text whose pairs are counted together
NGRAM_BYTES = range(2, 7)
PRIOR = 10.0  # occurrences that the vector predicted by a token's bytes counts for beside its own
RIDGE = 1.0
ROUNDS = 30  # of conjugate gradients
WORD = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]+|_+")
MAX_WORDS = 50_000


@dataclass(frozen=True, eq=False)
class Stream:
    """All texts as one row of ids, with the number of the document that each stands in."""

    ids: Int32[ndarray, "T"]
    documents: Int32[ndarray, "T"]
    spellings: Sequence[bytes]
    """Of every id."""

    def counts(self) -> Int64[ndarray, "V"]:
        """How often each id occurs."""
        return np.bincount(self.ids, minlength=len(self.spellings)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class TokenVectors:
    """A vector of length 1 per id, and zeros for an id that is not `known`."""

    vectors: Float[Tensor, "V E"]
    counts: Int64[ndarray, "V"]

    @property
    def known(self) -> Bool[ndarray, "V"]:
        """Ids that have a vector."""
        return self.vectors.any(1).numpy()


@dataclass(frozen=True)
class Learning:
    """How vectors are learnt."""

    dimensions: int
    window_tokens: int
    """On either side; a neighbour at distance d counts 1/d."""
    min_count: int
    """Fewer occurrences give no vector."""
    seed: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """The options that must be positive."""
        return {name: self.__dict__[name] for name in ("dimensions", "window_tokens", "min_count")}


def vectors_of_tokens(texts: Texts, tokenizer: Tokenizer, how: Learning) -> TokenVectors:
    """Vectors of the tokens that occur in the texts as the tokenizer cuts them; made once."""

    def make() -> TokenVectors:
        stream = _token_stream(texts, tokenizer)
        counts = stream.counts()
        own = _factorised(stream, counts, how)
        seen = np.flatnonzero(counts >= how.min_count)
        spelled = Spelled([stream.spellings[i] for i in seen.tolist()], own[seen], counts[seen])
        blended = torch.zeros_like(own)
        blended[seen] = spelled.blended()
        return TokenVectors(unit(blended), counts)

    return texts.once((tokenizer.fingerprint, how), make)


def vectors_by_bytes(texts: Texts, tokenizers: Sequence[Tokenizer], how: Learning) -> list[Float[Tensor, "V E"]]:
    """Vectors of length 1 of all tokens of these tokenizers in one space, by the words of the texts that share byte
    n-grams with them; zeros where none does. Tokens of the same bytes have the same vector."""

    def make() -> "Spelled":
        stream = _word_stream(texts)
        counts = stream.counts()
        return Spelled(stream.spellings, _factorised(stream, counts, how), counts)

    spelled = texts.once(("words", how), make)
    return [unit(spelled.of(tokenizer.token_bytes)) for tokenizer in tokenizers]


class Spelled:
    """Vectors of byte strings, and of their n-grams such that the mean over a string's n-grams is near its own."""

    def __init__(self, spellings: Sequence[bytes], vectors: Float[Tensor, "N E"], counts: Int64[ndarray, "N"]) -> None:
        self.vectors, self.counts = vectors, counts
        self.place = {spelling: i for i, spelling in enumerate(spellings)}
        self.spellings = spellings
        used = Counter(ngram for spelling in spellings for ngram in dict.fromkeys(_ngrams(spelling)))
        common = (ngram for ngram, strings in used.items() if strings > 1)  # others tell of no other string
        self.ngrams = {ngram: i for i, ngram in enumerate(common)}
        means = self._means(spellings)
        self.parts = _ridge(means, vectors, torch.from_numpy(counts).to(vectors.dtype).sqrt())
        self._predicted = means @ self.parts if len(self.ngrams) else torch.zeros_like(vectors)

    def blended(self) -> Float[Tensor, "N E"]:
        """The strings' own vectors, each drawn towards what its bytes predict by as much as it is rare."""
        trust = torch.from_numpy(self.counts / (self.counts + PRIOR)).to(self.vectors.dtype)[:, None]
        return trust * self.vectors + (1 - trust) * self._predicted

    def of(self, spellings: Sequence[bytes]) -> Float[Tensor, "M E"]:
        """The vectors of any byte strings: those of strings that are known, else what the n-grams predict, else 0."""
        found = self._means(spellings) @ self.parts
        known = [(i, self.place[s]) for i, s in enumerate(spellings) if s in self.place]
        if known:
            to, of = (list(part) for part in zip(*known, strict=True))
            found[to] = self.blended()[of]
        return found

    def _means(self, spellings: Sequence[bytes]) -> Float[Tensor, "M G"]:
        """A sparse matrix whose product with the n-gram vectors is the mean over the known n-grams of each string."""
        lists = [[self.ngrams[n] for n in _ngrams(spelling) if n in self.ngrams] for spelling in spellings]
        lengths = np.array([len(one) for one in lists], np.int64)
        rows = np.repeat(np.arange(len(lists)), lengths)
        columns = np.fromiter((g for one in lists for g in one), np.int64, int(lengths.sum()))
        return _sparse(rows, columns, 1 / np.repeat(lengths, lengths), (len(lists), len(self.ngrams)))


Sums = tuple[Int64[ndarray, "R"], Int64[ndarray, "R"], Int32[ndarray, "Q"], Float32[ndarray, "Q"]]


def sums_of(blocks: Sequence[tuple[Int64[ndarray, "_"], Float[Tensor, "_ _"], Int64[ndarray, "_ _"]]]) -> Sums:
    """For `Mixture.replaced`, of target ids with weights and source ids each: what has no weight is left out."""
    if not blocks:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    rows = np.concatenate([rows for rows, _, _ in blocks])
    used = [weights.numpy() > 0 for _, weights, _ in blocks]
    lengths = np.concatenate([one.sum(1) for one in used])
    ids = np.concatenate([ids[one] for one, (_, _, ids) in zip(used, blocks, strict=True)]).astype(np.int32)
    weights = np.concatenate([weights.numpy()[one] for one, (_, weights, _) in zip(used, blocks, strict=True)])
    order = np.argsort(rows, kind="stable")
    places = ranges((np.cumsum(lengths) - lengths)[order], lengths[order])
    return rows[order], lengths[order], ids[places], weights[places].astype(np.float32)


def known_sources(vectors: Float[Tensor, "V E"], source: Tokenizer, plan: TransferPlan) -> Int64[ndarray, "S"]:
    """Ids of ordinary source tokens that have a row and a vector."""
    ordinary = np.array([len(spelling) > 0 for spelling in source.token_bytes[: plan.source_vocab]], bool)
    return np.flatnonzero(ordinary & vectors[: plan.source_vocab].any(1).numpy())


def nearest(
    wanted: Float[Tensor, "N E"], among: Float[Tensor, "M E"], count: int
) -> Iterator[tuple[slice, Float[Tensor, "B K"], Int64[ndarray, "B K"]]]:
    """The `count` largest inner products of each wanted vector, falling, and whose they are; a block at a time."""
    step = max(1, BLOCK_BYTES // (4 * max(1, len(among))))
    for begin in range(0, len(wanted) if len(among) else 0, step):
        part = slice(begin, min(begin + step, len(wanted)))
        values, ids = (wanted[part] @ among.T).topk(min(count, len(among)), dim=1)
        yield part, values, ids.numpy()


def _token_stream(texts: Texts, tokenizer: Tokenizer) -> Stream:
    encodings = tokenizer.encode_batch(texts.documents)
    ids = [encoding.ids[~encoding.special] for encoding in encodings]
    return _stream(ids, tokenizer.token_bytes)


def _word_stream(texts: Texts) -> Stream:
    words = [[word.encode() for word in WORD.findall(document)] for document in texts.documents]
    frequent = Counter(word for document in words for word in document).most_common(MAX_WORDS)
    number = {word: i for i, (word, _) in enumerate(frequent)}
    return _stream([[number[w] for w in document if w in number] for document in words], list(number))


def _stream(ids: Sequence[Sequence[int] | ndarray], spellings: Sequence[bytes]) -> Stream:
    lengths = [len(one) for one in ids]
    flat = np.concatenate([np.zeros(0, np.int32), *(np.asarray(one, np.int32) for one in ids)])
    return Stream(flat, np.repeat(np.arange(len(ids), dtype=np.int32), lengths), spellings)


def cooccurrence(stream: Stream, window: int) -> tuple[Int64[ndarray, "P"], Float64[ndarray, "P"]]:
    """Pairs (first id x number of ids + second id) that stand within a window of a document, ascending, both ways
    round, and the sum of one over their distances."""
    size = len(stream.spellings)
    keys, sums = np.zeros(0, np.int64), np.zeros(0)
    for begin in range(0, len(stream.ids), BLOCK_TOKENS):
        ids = stream.ids[begin : begin + BLOCK_TOKENS + window].astype(np.int64)
        document = stream.documents[begin : begin + BLOCK_TOKENS + window]
        for distance in range(1, min(window, len(ids) - 1) + 1):
            left = slice(0, min(BLOCK_TOKENS, len(ids) - distance))
            right = slice(distance, left.stop + distance)
            same = document[left] == document[right]
            first, second = ids[left][same], ids[right][same]
            found, counts = np.unique(
                np.concatenate([first * size + second, second * size + first]), return_counts=True
            )
            keys, place = np.unique(np.concatenate([keys, found]), return_inverse=True)
            sums = np.bincount(place, np.concatenate([sums, counts / distance]))
    return keys, sums


def _factorised(stream: Stream, counts: Int64[ndarray, "V"], how: Learning) -> Float[Tensor, "V E"]:
    """A vector per id that occurs often enough, zeros for the others."""
    size = len(stream.spellings)
    keys, sums = cooccurrence(stream, how.window_tokens)
    frequent = counts >= how.min_count
    first, second = keys // max(size, 1), keys % max(size, 1)
    used = frequent[first] & frequent[second]
    number = np.cumsum(frequent) - 1
    first, second, sums = number[first[used]], number[second[used]], sums[used]
    kept = int(frequent.sum())
    own = np.bincount(first, sums, kept)
    context = own**SMOOTHING
    information = np.log(np.maximum(sums * context.sum() / (own[first] * context[second]), 1))
    positive = information > 0
    matrix = _sparse(first[positive], second[positive], information[positive], (kept, kept))
    found = torch.zeros(size, how.dimensions)
    width = min(how.dimensions, kept)
    if width:
        with torch.random.fork_rng([]):
            torch.manual_seed(how.seed)
            left, values, _ = torch.svd_lowrank(matrix, q=min(width + 10, kept), niter=2)
        found[torch.from_numpy(frequent), :width] = (left * values.sqrt())[:, :width]
    return found


def _ridge(
    means: Float[Tensor, "N G"], vectors: Float[Tensor, "N E"], weights: Float[Tensor, "N"]
) -> Float[Tensor, "G E"]:
    """Minimises the sum over n of weights[n] * |means[n] @ x - vectors[n]|^2 and of RIDGE * |x|^2, nearly."""
    across = means.T.coalesce()

    def normal_equations(x: Tensor) -> Tensor:
        return across @ (weights[:, None] * (means @ x)) + RIDGE * x

    x = torch.zeros(means.shape[1], vectors.shape[1])
    residual = across @ (weights[:, None] * vectors)
    direction, size = residual, residual.square().sum(0)
    for _ in range(ROUNDS):
        image = normal_equations(direction)
        step = size / (direction * image).sum(0).clamp_min(1e-30)
        x, residual = x + step * direction, residual - step * image
        size, before = residual.square().sum(0), size
        direction = residual + size / before.clamp_min(1e-30) * direction
    return x


def _ngrams(spelling: bytes) -> list[bytes]:
    """Byte n-grams of a string; of a single byte that byte."""
    found = [spelling[i : i + n] for n in NGRAM_BYTES for i in range(len(spelling) - n + 1)]
    return found or [spelling] * bool(spelling)


def nearest_mixed(
    rows: Int64[ndarray, "N"],
    wanted: Float[Tensor, "N E"],
    among: Int64[ndarray, "A"],
    given: Float[Tensor, "A E"],
    neighbours: int,
    temperature: float,
) -> "Sums":
    """Each target row as the softmax of cosines / temperature over its nearest source rows; `among` are their ids."""
    found = nearest(wanted, given, neighbours)
    return sums_of([(rows[part], (cosines / temperature).softmax(1), among[ids]) for part, cosines, ids in found])


def _sparse(rows: ndarray, columns: ndarray, values: ndarray, shape: tuple[int, int]) -> Tensor:
    places = torch.from_numpy(np.stack([rows, columns]).astype(np.int64))
    found = torch.sparse_coo_tensor(places, torch.from_numpy(values).float(), shape, check_invariants=False)
    return found.coalesce()


def unit(vectors: Float[Tensor, "V E"]) -> Float[Tensor, "V E"]:
    """Vectors of length 1, those of length 0 excepted."""
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
