"""Language models of equal size on equal text in four tokenizations: learned, BPE, words, bytes. Bits per byte.

The word tokenizer loses case, white space and unknown words. What it takes to put these back is counted: symbols that
describe each word's spacing and case, and unknown words letter by letter, under adaptive models of the training text.
Robustness: bits per byte, and bytes per token, of the same text with 1 % and 5 % of its letters replaced.

Usage: python benchmarks/learned_tokenizer_lm.py CORPORA OUTPUT [--steps 2000] [--seeds 1] [--pins 4096] [--json FILE]
CORPORA is what benchmarks/tokenizer_corpora.py wrote; it writes it where there is none. Models stay in
OUTPUT/NAME_SEED/model.
"""

import argparse
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.data.batch import Batches
from tokenkit.data.chunks import count_chunks
from tokenkit.data.example import cut
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.export.huggingface import export_huggingface
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.report.claims import Row, make_claim, measured, own_command, save_claim
from tokenkit.tokenizers.autoencoder.chunkers import MAX_CHUNK, make_chunker
from tokenkit.tokenizers.autoencoder.chunkers import cut as pieces
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import package_of, save_with_fast
from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding, Tokenizer, framed
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.train import train_tokenizer
from tokenkit.tokenizers.word import BOS, EOS, PAD, WORDS, WordTokenizer
from tokenkit.tokenizers.word_config import WordConfig
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.train.loop import train
from tokenkit.train.schema import TrainConfig
from tokenkit.train.tasks.distill import TextTask

WINDOW, BATCH = 256, 16
PARAMETERS = 1_200_000
NOISE = (0.01, 0.05)
TEST_BYTES = 100_000


class WordView:
    """The word tokenizer as the training loop wants one: a token covers the white space before it too."""

    name = "word"
    changes = ("loses case, white space and unknown words",)
    lossless = True  # of what is trained on; what is lost is counted apart
    bos_id, eos_id, pad_id = BOS, EOS, PAD

    def __init__(self, words: WordTokenizer) -> None:
        self.words = words
        self.vocab_size = words.vocab_size
        self.token_bytes = [b""] * 6 + [word.encode() for word in words.words]
        self.special_ids = frozenset(range(6))

    def start_id(self) -> int:
        """The id that begins every document."""
        return BOS

    def encode(self, text: str, *, special: bool = False) -> Encoding:
        """Ids of words; spans tile the text."""
        found = list(WORDS.finditer(text))
        ids = np.array([self.words.encode(match[0], False)[0] for match in found], np.int32)
        places = np.cumsum([0, *(len(c.encode()) for c in text)])
        ends = np.array([places[match.end()] for match in found], np.int64)
        if len(ends):
            ends[-1] = places[-1]
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends
        segment = np.full(len(ids), TEXT_SEGMENT, np.int32)
        encoding = Encoding(ids, starts, ends, np.zeros(len(ids), np.bool_), segment)
        return framed(encoding, BOS) if special else encoding

    def encode_batch(self, texts: list[str], *, special: bool = False, continued: bool = False) -> list[Encoding]:
        """One encoding per text."""
        return [self.encode(text, special=special) for text in texts]


class Restorer:
    """Bits that put back what the word tokenizer loses, under counts of the training text."""

    def __init__(self, words: WordTokenizer, texts: Sequence[str]) -> None:
        self.known = {*words.words}
        self.counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for text in texts:
            for context, symbol in self._symbols(text):
                self.counts[context][symbol] += 1

    def bits(self, text: str) -> float:
        """Bits of spacing, case and unknown words of a text."""
        total = 0.0
        for context, symbol in self._symbols(text):
            counts = self.counts[context]
            share = (counts[symbol] + 0.05) / (counts.total() + 0.05 * (len(counts) + 50))
            total -= math.log2(share)
        return total

    def _symbols(self, text: str):
        before, sort = 0, "start"
        for match in WORDS.finditer(text):
            word, space = match[0], text[before : match.start()]
            kind = "word" if word[0].isalnum() else word
            yield ("space", sort, kind), space if space in ("", " ", "\n", "\n\n") else "other"
            if space not in ("", " ", "\n", "\n\n"):
                yield from self._letters("white", space)
            lower = word.lower()
            if lower != word or lower.upper() != word:
                case = "lower" if word == lower else "title" if word == word.capitalize() else "upper"
                case = case if word in (lower, word.capitalize(), word.upper()) else "mixed"
                yield ("case", sort), case
                if case == "mixed":
                    yield from ((("letter",), str(c.isupper())) for c in word)
            if lower not in self.known:
                yield from self._letters("unknown", lower)
            before, sort = match.end(), "word" if word[0].isalnum() else word
        yield from self._letters("end", text[before:])

    @staticmethod
    def _letters(kind: str, text: str):
        context = ""
        for letter in [*text, ""]:
            yield (kind, context[-2:]), letter
            context += letter


def size_of(vocabulary: int) -> LlamaConfig:
    """A Llama with about PARAMETERS weights, whatever the vocabulary takes: the rest goes to the inner width."""
    width, layers = (128, 4) if vocabulary > 1000 else (160, 4)
    other = vocabulary * width + layers * (4 * width * width + 2 * width) + width
    inner = max(32, round((PARAMETERS - other) / (layers * 3 * width)))
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def tokenizers_of(texts: list[str], output: Path, pins: int) -> dict[str, Tokenizer]:
    """The four, made of the training text; the learned one in its compact form."""
    folder = output / "learned_tokenizer"
    size = 320 + pins
    if not folder.exists():
        counts = count_chunks(texts, make_chunker("joined"))
        table = select_pins(cut_counts(counts), pins)
        save_with_fast(package_of(None, table), folder)
        train_tokenizer(texts, "bpe", size).save(output / "bpe_tokenizer")
    words = WordTokenizer.train(texts, WordConfig(vocab_size=size))
    return {
        "learned": load_tokenizer(str(folder)),
        "bpe": load_tokenizer(str(output / "bpe_tokenizer")),
        "word": WordView(words),  # pyrefly: ignore
        "byte": ByteTokenizer(),
    }


def cut_counts(counts: Counter[bytes]) -> dict[bytes, int]:
    """Counts of the pieces that chunks of more than 16 bytes are cut into."""
    found: Counter[bytes] = Counter()
    for chunk, count in counts.items():
        for piece in pieces(chunk, MAX_CHUNK):
            found[piece] += count
    return found


def noisy(text: str, share: float, seed: int) -> str:
    """The text with a share of its ASCII letters replaced by others."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return re.sub(r"[a-zA-Z]", lambda m: rng.choice(letters) if rng.random() < share else m[0], text)


def run(name: str, tokenizer: Tokenizer, texts: list[str], tests: dict[str, list[str]], args, seed: int) -> dict:
    """Trains one model and measures it."""
    folder = args.output / f"{name}_{seed}"
    kept = folder / "measured.json"
    if kept.exists():
        return json.loads(kept.read_text("utf-8"))
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.start_id(), "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    config = size_of(tokenizer.vocab_size)
    config.update(ids)
    model = LlamaForCausalLM(config)
    optimizer = {"learning_rate": 2e-3, "warmup_steps": 100, "schedule": "cosine", "lr_min_ratio": 0.05}
    settings = TrainConfig(steps=args.steps, batch_size=BATCH, seed=seed, optimizer=optimizer, save_every=500)
    task = TextTask(Objective.of(LossesConfig.model_validate({"clm": {}})), ModelView(model), tokenizer)
    windows = cut(texts, WINDOW, None)
    batches = Batches(windows, tokenizer, None, batch_size=BATCH, seed=seed)
    run_folder = RunFolder(folder)
    run_folder.claim({"name": name, "seed": seed, "steps": args.steps}, resume=folder.exists())
    progress = train(task, batches, settings, run_folder, dict, label=f"{name} {seed}")
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": progress.num_bytes,
        "tokens": progress.num_tokens,
    }
    restorer = Restorer(tokenizer.words, texts) if isinstance(tokenizer, WordView) else None
    for test, documents in tests.items():
        measured = bits_per_byte(task.student, tokenizer, documents)
        lost = sum(map(restorer.bits, documents)) / measured.num_bytes if restorer else 0.0
        bits = measured.value + lost
        found[test] = {"bits_per_byte": bits, "lost": lost, "bytes_per_token": measured.bytes_per_token}
    if not isinstance(tokenizer, WordView):
        export_huggingface(model, tokenizer, folder / "model", dtype=torch.float32)
    write_json(kept, found)
    return found


NAMES = {"learned": "learned, compact", "bpe": "BPE", "word": "words, what they lose put back", "byte": "bytes"}


def claim_rows(rows: dict[tuple[str, int], dict], tests: list[str]) -> list[Row]:
    """The learned tokenizer beside each other one: bytes per id, and bits per byte of a model of its ids."""

    def over_seeds(name: str, test: str, key: str) -> list[float]:
        return [found[test][key] for (other, _), found in rows.items() if other == name]

    found = []
    for name in dict.fromkeys(name for name, _ in rows if name != "learned"):
        key = "bytes_per_token"
        sides = (over_seeds(one, "english", key) for one in ("learned", name))
        found.append(measured(NAMES["learned"], NAMES[name], "bytes of an id, English", *sides, better="more"))
        for test in tests:
            sides = (over_seeds(one, test, "bits_per_byte") for one in ("learned", name))
            found.append(measured(NAMES["learned"], NAMES[name], f"bits per byte, {test}", *sides))
    return found


def write_claim(path: Path, rows: list[Row]) -> None:
    """What was found, in the common form."""
    sentence = (
        "A learned tokenizer in its compact form (pins learnt from the text, no network), BPE and a word "
        "tokenizer of as many ids, and language models of equal size trained on equal text in each."
    )
    save_claim(path, make_claim("learned_tokenizer", sentence, own_command(), rows, {}))


def main() -> None:
    """Trains and measures all; prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pins", type=int, default=4096)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--json", type=Path, help="write the claim there")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.corpora / "test/languages.jsonl").exists():
        maker = Path(__file__).with_name("tokenizer_corpora.py")
        subprocess.run([sys.executable, str(maker), str(args.corpora)], check=True)
    texts = read_documents(SourceConfig(path=str(args.corpora / "train/english.jsonl")))
    english = read_documents(SourceConfig(path=str(args.corpora / "test/english.jsonl"), max_bytes=TEST_BYTES))
    wiki = read_documents(SourceConfig(path=str(args.corpora / "test/wikitext2.jsonl"), max_bytes=TEST_BYTES))
    tests = {"english": english, "wikitext2": wiki}
    for share in NOISE:
        tests[f"typos {share:.0%}"] = [noisy(text, share, 0) for text in english]
    rows = {}
    names = args.only or list(NAMES)
    for name, tokenizer in tokenizers_of(texts, args.output, args.pins).items():
        for seed in range(args.seeds):
            if name in names:
                rows[name, seed] = run(name, tokenizer, texts, tests, args, seed)
    if args.json is not None:
        write_claim(args.json, claim_rows(rows, list(tests)))
    print("| tokenizer | seed | weights | bytes/token | " + " | ".join(tests) + " |")
    for (name, seed), found in rows.items():
        values = " | ".join(f"{found[test]['bits_per_byte']:.3f}" for test in tests)
        lost = f" ({found['english']['lost']:.3f} of it put back)" if found["english"]["lost"] else ""
        rate = found["english"]["bytes_per_token"]
        print(f"| {name}{lost} | {seed} | {found['parameters']:,} | {rate:.2f} | {values} |")


if __name__ == "__main__":
    main()
