"""How fast a learned tokenizer is beside the word tokenizer, and how much memory it takes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.package import Kind
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer
from tokenkit.tokenizers.word import WordTokenizer

CHUNK_CHARACTERS = 16
STATM = Path("/proc/self/statm")
CHILD = """
import os, sys
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer
if sys.argv[2] == "open":
    import tokenkit.tokenizers.autoencoder.open_codes
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
tokenizer = AutoEncoderTokenizer.load(sys.argv[1], sys.argv[2])
tokenizer.decode(tokenizer.encode("The quick brown fox jumps over the lazy dog 1234 !?"))
print(resident() - before)
"""


@dataclass(frozen=True)
class Amount:
    """How much is measured, and how often."""

    characters: int
    chunks: int
    repeats: int


FAST, SLOW = Amount(500_000, 2000, 5), Amount(20_000, 100, 2)  # of a table, and of a network that is asked


def speeds(tokenizer: AutoEncoderTokenizer, documents: Sequence[str]) -> dict[str, float]:
    """CPU times, the best of a few: milliseconds per chunk and id without a cache, rates, and warm against words."""
    size = SLOW if tokenizer.codec.open_codes else FAST
    texts = _at_most(documents, size.characters)
    pieces = [text[i : i + CHUNK_CHARACTERS] for text in texts for i in range(0, len(text), CHUNK_CHARACTERS)]
    pieces = pieces[: size.chunks]

    def uncached() -> Codec:
        return tokenizer.package.codec(tokenizer.kind, 0)

    def same() -> Codec:
        return tokenizer.codec

    fresh = _best(lambda codec: codec.encode_batch(pieces), uncached, size.repeats)
    rows = tokenizer.codec.encode_batch(pieces)
    ids = [index for row in rows for index in row]
    fresh_decode = _best(lambda codec: codec.decode_bytes(ids), uncached, size.repeats)
    warm = _best(lambda codec: codec.encode_batch(texts), same, size.repeats)
    words = WordTokenizer.train(texts)
    old = _best(lambda _: words.encode_batch(texts, add_special_tokens=False), same, size.repeats)
    decoded = _best(lambda codec: codec.decode_bytes(ids), same, size.repeats)
    return {
        "encode_ms_per_chunk": 1000 * fresh / max(1, len(pieces)),
        "decode_ms_per_id": 1000 * fresh_decode / max(1, len(ids)),
        "encode_characters_per_second": sum(map(len, texts)) / max(warm, 1e-9),
        "decode_ids_per_second": len(ids) / max(decoded, 1e-9),
        "encode_over_word_tokenizer": warm / max(old, 1e-9),
    }


def resident_bytes(model: Path, kind: Kind) -> int | None:
    """What loading and using the tokenizer adds to a new process of its own; None where the system does not say."""
    if not STATM.is_file():
        return None
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(model), kind]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def disk_bytes(model: Path) -> int:
    """The files of a package, or the one of a checkpoint."""
    files = [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _best(act: Callable[[Codec], object], prepare: Callable[[], Codec], repeats: int) -> float:
    """CPU seconds of the fastest of a few runs, each on what `prepare` makes, which is not counted."""
    times = []
    for _ in range(repeats):
        codec = prepare()
        began = time.process_time()
        act(codec)
        times.append(time.process_time() - began)
    return min(times)


def _at_most(texts: Sequence[str], characters: int) -> list[str]:
    kept, left = [], characters
    for text in texts:
        if left <= 0:
            break
        kept.append(text[:left])
        left -= len(text)
    return kept
