"""Real vocabularies extended and pruned: bytes per token, dead tokens, ids equal to plain BPE, as Markdown tables.

Extension is set beside the usual two ways: the commonest words appended without merges, and a tokenizer learnt from
the same text alone of which the tokens that are new are appended with their merges. One core, some minutes.
Usage: python benchmarks/vocabulary_surgery.py [extend] [prune] [check]
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gzip
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import tokenizers

from tokenkit.config import build
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.pieces import Definition, is_byte_level, model_vocabulary
from tokenkit.tokenizers.surgery.bpe import MergeList, merge_pairs, written
from tokenkit.tokenizers.surgery.extend import extend
from tokenkit.tokenizers.surgery.library import backend, count_ids
from tokenkit.tokenizers.surgery.prune import prune
from tokenkit.tokenizers.surgery.reachable import Reach, reachability
from tokenkit.verbs.vocabulary.prune import VocabularyPruneRun, unwanted_ids

SHARED = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
FOLDER, CORPORA = SHARED / "data/tokenizers", SHARED / "data/corpora"
NAMES = ("gpt2", "llama2", "llama3", "qwen2", "gemma3", "mistral_v1", "smollm2")
NEW = 1000


def rows(path: str) -> list[dict[str, str]]:
    """The objects of a file of JSON lines."""
    with gzip.open(CORPORA / path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def news(language: str, split: str) -> list[str]:
    """Sentences of NTREX-128."""
    return [row[language] for row in rows(f"ntrex/{split}.jsonl.gz")]


def code(split: str) -> list[str]:
    """Prompts and tests of MultiPL-E: every fifth is held out."""
    every = [row["prompt"] + row["tests"] for row in rows("code/multipl_e_humaneval.jsonl.gz")]
    return [text for place, text in enumerate(every) if (place % 5 == 0) == (split == "valid")]


def load(name: str) -> HFTokenizer:
    """A tokenizer of the shared folder."""
    return load_tokenizer(str(FOLDER / name))


def tokens(tokenizer: HFTokenizer, texts: list[str]) -> int:
    """Tokens that spell the texts."""
    return int(count_ids(tokenizer.definition, texts, tokenizer.vocab_size).sum())


def plain_bpe(definition: Definition) -> Callable[[str], list[int]]:
    """Encodes by the definition of byte-pair encoding, slowly; words are those of the library's pre-tokenizer."""
    library, vocabulary = backend(definition), model_vocabulary(definition)
    ranks = {pair: rank for rank, pair in enumerate(merge_pairs(definition))}
    known: dict[str, list[int]] = {}

    def word_ids(word: str) -> list[int]:
        if definition["model"].get("ignore_merges") and word in vocabulary:
            return [vocabulary[word]]
        symbols: list[str] = []
        for character in word:
            symbols += [character] if character in vocabulary else [f"<0x{b:02X}>" for b in character.encode()]
        while ranked := [(ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks]:
            _, place = min(ranked)
            symbols = [*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :]]
        return [vocabulary[symbol] for symbol in symbols]

    def encode(text: str) -> list[int]:
        normalised = library.normalizer.normalize_str(text) if library.normalizer else text
        pre_tokenizer = library.pre_tokenizer
        words = [normalised] if pre_tokenizer is None else [w for w, _ in pre_tokenizer.pre_tokenize_str(normalised)]
        for word in words:
            if word not in known:
                known[word] = word_ids(word)
        return [i for word in words for i in known[word]]

    return encode


def equal_share(tokenizer: HFTokenizer, texts: list[str]) -> str:
    """Texts whose ids are those of plain BPE, of all."""
    encode = plain_bpe(tokenizer.definition)
    same = sum(tokenizer.encode(text).ids.tolist() == encode(text) for text in texts)
    return f"{same} / {len(texts)}"


def appended(tokenizer: HFTokenizer, pieces: list[str], merges: list[tuple[str, str]]) -> tuple[HFTokenizer, range]:
    """With pieces behind the last id, and with these merges behind its own, as far as their pieces are there."""
    definition, size = tokenizer.definition, tokenizer.vocab_size
    vocabulary = model_vocabulary(definition) | {piece: size + place for place, piece in enumerate(pieces)}
    fitting = [(a, b) for a, b in merges if a in vocabulary and b in vocabulary and a + b in vocabulary]
    merged = written(merge_pairs(definition) + fitting, definition)
    model = {**definition["model"], "vocab": vocabulary, "merges": merged}
    return HFTokenizer({**definition, "model": model}, tokenizer.config), range(size, size + len(pieces))


def learnt_alone(tokenizer: HFTokenizer, texts: list[str], size: int) -> list[tuple[str, str]]:
    """Merges of a tokenizer that is trained on the texts from nothing, with the same pre-tokens."""
    library = backend(tokenizer.definition)
    fresh = tokenizers.Tokenizer(tokenizers.models.BPE())
    if library.normalizer is not None:
        fresh.normalizer = library.normalizer
    marked = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    fresh.pre_tokenizer = library.pre_tokenizer if is_byte_level(tokenizer.definition) else marked
    fresh.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=size, show_progress=False))
    return merge_pairs(json.loads(fresh.to_str()))


def naive(tokenizer: HFTokenizer, texts: list[str]) -> tuple[str, str]:
    """Dead tokens of the two usual ways, of as many as were appended."""
    library, known = backend(tokenizer.definition), model_vocabulary(tokenizer.definition)
    words: Counter[str] = Counter()
    for text in texts:
        normal = library.normalizer.normalize_str(text) if library.normalizer else text
        split = library.pre_tokenizer.pre_tokenize_str(normal) if is_byte_level(tokenizer.definition) else []
        words.update([word for word, _ in split] or ["▁" + word for word in normal.split("▁") if word])
    common = [word for word, _ in words.most_common() if word not in known and len(word) > 1][:NEW]
    merges = learnt_alone(tokenizer, texts, 6 * NEW)
    pieces = list(dict.fromkeys(a + b for a, b in merges if a + b not in known))[:NEW]
    shares = []
    for new, with_merges in ((common, []), (pieces, merges)):
        found, ids = appended(tokenizer, new, with_merges)
        kinds = reachability(found).kinds[ids.start :]
        shares.append(f"{int((kinds != Reach.REACHED).sum())} / {len(new)}")
    return shares[0], shares[1]


def extension() -> None:
    """One row per tokenizer and text."""
    print("\n| tokenizer | text | new | held-out bytes per token | dead, ours | dead, words appended | dead, merges "
          "learnt alone | texts as plain BPE | CPU s |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    cases = [(n, "German news", news("deu", "train"), news("deu", "valid")) for n in ("gpt2",)]
    cases += [("gpt2", "code in 19 languages", code("train"), code("valid"))]
    cases += [("llama2", "Georgian news", news("kat", "train"), news("kat", "valid"))]
    cases += [("llama3", "Amharic news", news("amh", "train"), news("amh", "valid"))]
    for name, text, train, held in cases:
        tokenizer, begin = load(name), time.process_time()
        found = extend(tokenizer, train, NEW)
        seconds = time.process_time() - begin
        size = sum(len(one.encode()) for one in held)
        before, after = (size / tokens(one, held) for one in (tokenizer, found.tokenizer))
        dead = int((reachability(found.tokenizer).kinds[found.new] != Reach.REACHED).sum())
        words, alone = naive(tokenizer, train)
        same = equal_share(found.tokenizer, held)
        print(f"| {name} | {text} | {len(found.new)} | {before:.3f} → {after:.3f} | {dead} | {words} | {alone} | "
              f"{same} | {seconds:.1f} |", flush=True)  # fmt: skip


def pruning() -> None:
    """One row per tokenizer and way."""
    print("\n| tokenizer | way | ids | rows saved | English, bytes per token | code | dead before | dead after | "
          "texts as plain BPE |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    english, programs = news("eng", "valid"), code("valid")
    train = news("eng", "train") + code("train")
    for name in ("llama3", "qwen2"):
        tokenizer = load(name)
        counts = count_ids(tokenizer.definition, train, tokenizer.vocab_size)
        before = reachability(tokenizer)
        run = build(VocabularyPruneRun, {"output": "none", "scripts": ["Latin"]})
        latin = unwanted_ids(run, tokenizer, counts) | {*before.unreachable.tolist()}
        ways = [("Latin + used in English and code", prune(tokenizer, unwanted=latin))]
        for by in ("leaf_frequency", "frequency", "last"):
            ways.append((f"32,768 left, {by}", prune(tokenizer, size=32_768, by=by, counts=counts)))
        for way, found in ways:
            figures = []
            for texts in (english, programs):
                size = sum(len(one.encode()) for one in texts)
                figures.append(f"{size / tokens(tokenizer, texts):.3f} → {size / tokens(found.tokenizer, texts):.3f}")
            after = len(reachability(found.tokenizer).unreachable)
            saved = tokenizer.vocab_size - found.tokenizer.vocab_size
            same = equal_share(found.tokenizer, [*english, *programs[:100]])
            ids = f"{tokenizer.vocab_size:,} → {found.tokenizer.vocab_size:,}"
            cells = (name, way, ids, f"{saved:,}", *figures, len(before.unreachable), after, same)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def dead_tokens() -> None:
    """One row per tokenizer."""
    kinds = (Reach.REACHED, Reach.WHOLE_WORD, Reach.MERGES, Reach.SHADOWED, Reach.PRETOKENS, Reach.NORMALISED)
    heads = " | ".join(kind.name.lower() for kind in kinds)
    print(f"\n| tokenizer | ids | merges | of these ever used | {heads} |\n|---|---|---|---|" + "---|" * len(kinds))
    for name in NAMES:
        tokenizer = load(name)
        found, merges = reachability(tokenizer).counts(), MergeList.of(tokenizer.definition)
        used = sum(pair is not None for pair in merges.splits.values())
        counts = " | ".join(f"{found.get(kind.name.lower(), 0):,}" for kind in kinds)
        print(f"| {name} | {tokenizer.vocab_size:,} | {len(merges.pairs):,} | {used:,} | {counts} |", flush=True)


if __name__ == "__main__":
    parts = {"extend": extension, "prune": pruning, "check": dead_tokens}
    for part in sys.argv[1:] or parts:
        parts[part]()
