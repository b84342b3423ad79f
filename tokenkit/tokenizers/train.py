"""A new tokenizer from text: byte-level BPE, or Unigram with byte fallback. Equal texts give equal tokenizers."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenkit.config import UserError
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import BYTE_FALLBACK, byte_alphabet

# Words with one leading space or mark, digits by three, runs of other marks, white space: the split of Llama 3.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNKNOWN, MARK = "<unk>", "▁"
WORDS = r"\n+|[^\S\n]+(?=[^\S\n])|[^\S\n]?\S+|\s+"  # with one leading space; runs of white space, as indentation has
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
DEFAULT_SPECIALS = {"bos": END_OF_TEXT, "eos": END_OF_TEXT, "pad": PAD}
LONGEST_PIECE = 16  # characters
NUM_WORDS = 200_000  # most frequent words that a Unigram vocabulary is estimated on
SHRINK = 0.75  # share of the Unigram pieces that survives one round of pruning


def train_tokenizer(
    texts: Iterable[str],
    kind: Literal["bpe", "unigram"],
    vocab_size: int,
    specials: dict[str, str] | None = None,
) -> HFTokenizer:
    """A tokenizer with exactly this many ids if the texts hold enough distinct pieces, else fewer.

    `specials` names the bos, eos and pad tokens; by default `<|endoftext|>` begins and ends a text and `<|pad|>` pads.
    """
    roles = DEFAULT_SPECIALS if specials is None else specials
    tokens = list(dict.fromkeys(roles.values()))
    fixed = list(dict.fromkeys([UNKNOWN, *tokens, *BYTE_FALLBACK]))
    least = 256 + len(tokens) if kind == "bpe" else len(fixed) + len(_required(fixed))
    if vocab_size < least:
        raise UserError(f"vocab_size {vocab_size}: too small for the bytes and special tokens; write {least} or more")
    if kind == "bpe":
        backend = _train_bpe(texts, vocab_size, tokens)
    elif kind == "unigram":
        backend = _train_unigram(texts, vocab_size, fixed)
    else:
        raise UserError(f"tokenizer kind {kind!r}: write bpe or unigram")
    config = {f"{role}_token": content for role, content in roles.items()}
    return HFTokenizer(json.loads(backend.to_str()), config, f"{kind}-{vocab_size}")


def _train_bpe(texts: Iterable[str], vocab_size: int, tokens: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=tokens, initial_alphabet=sorted(byte_alphabet()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_unigram(texts: Iterable[str], vocab_size: int, fixed: list[str]) -> tokenizers.Tokenizer:
    """Unigram (Kudo 2018, 1804.10959) estimated with best segmentations instead of expectations.

    Counts of best segmentations are integers, so the result does not depend on the order of a sum; the library's own
    trainer iterates over a randomly seeded hash map and gives different scores on every call.
    """
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    metaspace = pre_tokenizers.Sequence([split, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)])
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in metaspace.pre_tokenize_str(text))
    ranked = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:NUM_WORDS]
    scores = _prune(_seed_pieces(ranked), ranked, vocab_size - len(fixed), fixed)
    # The entries of bytes and special tokens are dearer than any spelling of their literals, which hence stay text.
    floor = min(scores.values()) - 1e4
    vocabulary = [(piece, floor) for piece in fixed] + sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = metaspace
    backend.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([piece for piece in fixed if piece not in BYTE_FALLBACK])
    return backend


def _seed_pieces(ranked: list[tuple[str, int]]) -> Counter[str]:
    """How often every substring of the words occurs, up to LONGEST_PIECE characters."""
    found: Counter[str] = Counter()
    for word, count in ranked:
        for start in range(len(word)):
            for end in range(start + 1, min(start + LONGEST_PIECE, len(word)) + 1):
                found[word[start:end]] += count
    return found


def _required(fixed: list[str]) -> list[str]:
    """The space and the characters of the fixed entries' literals, which these characters spell."""
    return sorted({MARK, *"".join(fixed)})


def _prune(seeds: Counter[str], ranked: list[tuple[str, int]], size: int, fixed: list[str]) -> dict[str, float]:
    """Log-probabilities of `size` pieces, or fewer: re-estimated and cut by a quarter until they fit."""
    kept = dict.fromkeys(_required(fixed))  # and then the most frequent characters
    kept |= dict.fromkeys(_heaviest({p: c for p, c in seeds.items() if len(p) == 1}, size - len(kept)))
    longer = {p: c * len(p) for p, c in seeds.items() if len(p) > 1 and c > 1 and p not in fixed}
    counts = {piece: seeds[piece] for piece in [*kept, *_heaviest(longer, max(10 * size, 10_000))]}
    while True:
        for _ in range(2):
            counts = _segment_counts(counts, ranked)
        if len(counts) <= size:
            break
        target = max(size, int(len(counts) * SHRINK))
        logs = _log_probabilities(counts)
        loss = {p: _loss(p, count, logs) for p, count in counts.items() if p not in kept}
        survivors = sorted(loss, key=lambda piece: (-loss[piece], piece))[: target - len(kept)]
        counts = {piece: counts[piece] for piece in [*kept, *survivors]}
    return _log_probabilities(counts)


def _heaviest(weights: dict[str, int], number: int) -> list[str]:
    return sorted(weights, key=lambda piece: (-weights[piece], piece))[:number]


def _log_probabilities(counts: dict[str, int]) -> dict[str, float]:
    total = math.log(sum(counts.values()) + len(counts))
    return {piece: round(math.log(count + 1) - total, 6) for piece, count in counts.items()}


def _segment_counts(counts: dict[str, int], ranked: list[tuple[str, int]]) -> dict[str, int]:
    """How often every piece occurs in the best segmentations of the words."""
    model = models.Unigram([("<unk>", -100.0), *_log_probabilities(counts).items()], unk_id=0)
    backend = tokenizers.Tokenizer(model)
    found = backend.encode_batch_fast([word for word, _ in ranked])
    ids = [one.ids for one in found]
    weights = np.repeat(np.array([count for _, count in ranked], np.int64), [len(one) for one in ids])
    flat = np.fromiter((index for one in ids for index in one), np.int64, len(weights))
    total = np.zeros(len(counts) + 1, np.int64)
    np.add.at(total, flat, weights)
    return dict(zip(counts, total[1:].tolist()))


def _loss(piece: str, count: int, logs: dict[str, float]) -> float:
    """What the text's log-likelihood loses without this piece: its count times the gap to its best other spelling."""
    best = [0.0] + [-math.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for start in range(end):
            part = piece[start:end]
            if part in logs and part != piece:
                best[end] = max(best[end], best[start] + logs[part])
    return count * (logs[piece] - best[-1])
