"""How fast a learned tokenizer is beside others: CPU time of one thread, every subject in turn in every round."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.open_codes import OpenCodes
from tokenkit.tokenizers.autoencoder.package import Package
from tokenkit.tokenizers.factory import ChecklistTokenizer
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import model_type, parts

SHORT_BYTES = 16
REPEATS = 3  # of what is timed; the quickest counts
LIMITS = {  # of the checklist, in milliseconds and per second
    "chunk_milliseconds": 0.5,
    "open_id_milliseconds": 1.0,
    "open_ids_per_second": 10_000.0,
    "pinned_ids_per_second": 1_000_000.0,
    "megabytes": 100.0,
}
Functions = tuple[Callable[[str], Sequence[int]], Callable[[Sequence[int]], str]]


@dataclass(frozen=True)
class Subject:
    """A tokenizer to time: `fresh` gives its two functions as they are before they have seen any text."""

    name: str
    fresh: Callable[[], Functions]

    @classmethod
    def of(cls, name: str, tokenizer: ChecklistTokenizer) -> "Subject":
        """A tokenizer that remembers nothing."""
        return cls(name, lambda: (lambda text: tokenizer.encode(text, False), tokenizer.decode))

    @classmethod
    def learned(cls, name: str, package: Package) -> "Subject":
        """A learned tokenizer whose cache holds what it was shipped with."""

        def fresh() -> Functions:
            codec = package.codec()
            return codec.encode, codec.decode

        return cls(name, fresh)

    @classmethod
    def tiktoken(cls, name: str, tokenizer: HFTokenizer) -> "Subject":
        """The same byte-level BPE run by tiktoken; UserError where that is not installed or it is no such BPE."""
        try:
            import tiktoken
        except ImportError:
            raise UserError("tiktoken: not installed; pip install tiktoken, or leave it out") from None
        patterns = [
            part["pattern"]["Regex"] for part in parts(tokenizer.definition["pre_tokenizer"]) if "pattern" in part
        ]
        if len(patterns) != 1 or model_type(tokenizer.definition) != "BPE":
            raise UserError(f"{tokenizer.name}: no byte-level BPE with one pattern, which tiktoken could run")
        ranks = {spelled: index for index, spelled in enumerate(tokenizer.token_bytes) if spelled}
        encoding = tiktoken.Encoding(name, pat_str=patterns[0], mergeable_ranks=ranks, special_tokens={})
        return cls(name, lambda: (encoding.encode_ordinary, encoding.decode))


def speeds(subjects: Sequence[Subject], texts: Sequence[str], repeats: int = 5) -> dict[str, dict[str, float]]:
    """Per subject: bytes per id, and seconds of CPU for a first pass over the texts, a second one, and decoding."""
    found: dict[str, dict[str, list[float]]] = {s.name: {"cold": [], "warm": [], "decode": []} for s in subjects}
    num_bytes, num_ids = sum(len(text.encode()) for text in texts), {}
    for _ in range(repeats):
        for subject in subjects:
            encode, decode = subject.fresh()
            cold, ids = _timed(encode, texts)
            warm, ids = _timed(encode, texts)
            back, _ = _timed(decode, ids)
            for name, seconds in (("cold", cold), ("warm", warm), ("decode", back)):
                found[subject.name][name].append(seconds)
            num_ids[subject.name] = sum(map(len, ids))
    return {
        name: {kind: statistics.median(values) for kind, values in kinds.items()}
        | {"bytes_per_id": num_bytes / max(1, num_ids[name])}
        for name, kinds in found.items()
    }


def ratios(times: Mapping[str, Mapping[str, float]], baseline: str) -> dict[str, dict[str, float]]:
    """The times of every subject over those of one, and its bytes per id."""
    base = times[baseline]
    kinds = ("cold", "warm", "decode")
    return {
        name: {kind: values[kind] / base[kind] for kind in kinds} | {"bytes_per_id": values["bytes_per_id"]}
        for name, values in times.items()
    }


def latencies(package: Package, chunks: Sequence[bytes]) -> dict[str, float]:
    """What single chunks and ids cost without any cache, in milliseconds and per second of CPU.

    Chunks are 16 bytes, spelled one by one; open ids are decoded one run at a time and in batches.
    """
    short = [chunk[:SHORT_BYTES] for chunk in chunks]
    codec, compact = package.codec(cache_size=0), package.codec("compact")
    fixed = [index for chunk in short for index in compact.encode_bytes(chunk)] * 50
    one = min(_timed(codec.encode_bytes, short)[0] for _ in range(REPEATS))
    pinned = min(_timed(compact.decode_bytes, [fixed])[0] for _ in range(REPEATS))
    found = {"chunk_milliseconds": one / len(short) * 1e3, "pinned_ids_per_second": len(fixed) / pinned}
    return found | (_open_latencies(package.open_codes()) if package.network is not None else {})


def _open_latencies(codes: OpenCodes) -> dict[str, float]:
    step = max(1, codes.num_codes // 4099)
    runs = [tuple((step * (7 * n + g) + n) % codes.num_codes for g in range(codes.groups)) for n in range(2048)]
    batch = min(_timed(codes.read, [runs])[0] for _ in range(REPEATS))
    single = min(_timed(codes.read, [[run] for run in runs[:64]])[0] for _ in range(REPEATS))
    return {
        "open_ids_per_second": len(runs) * codes.groups / batch,
        "open_id_milliseconds": single / (64 * codes.groups) * 1e3,
    }


def met(found: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Each of the checklist's limits that was measured, the value, and whether it is met."""
    rows = {}
    for name, limit in LIMITS.items():
        if name in found:
            good = found[name] >= limit if name.endswith("per_second") else found[name] <= limit
            rows[name] = {"value": found[name], "limit": limit, "met": good}
    return rows


def _timed(action: Callable[[Any], Any], arguments: Sequence[Any]) -> tuple[float, list[Any]]:
    """CPU seconds of an action on every argument, and what came out; collecting garbage waits, as in `timeit`."""
    collects = gc.isenabled()
    gc.disable()
    try:
        began = time.process_time()
        results = [action(argument) for argument in arguments]
        return time.process_time() - began, results
    finally:
        if collects:
            gc.enable()
