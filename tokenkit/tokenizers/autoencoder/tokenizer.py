"""`AutoEncoderTokenizer`: the learned tokenizer as the checklist calls it, with plain lists of ids."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.config import UserError, resolved
from tokenkit.tokenizers.autoencoder.cache import DEFAULT_SIZE
from tokenkit.tokenizers.autoencoder.chunkers import DEFAULT, cut, escaped, to_bytes
from tokenkit.tokenizers.autoencoder.config import TokenizerConfig, load_config
from tokenkit.tokenizers.autoencoder.fast import fast_config, fast_definition
from tokenkit.tokenizers.autoencoder.ids import BOS, EOS, UNK, FixedRoles
from tokenkit.tokenizers.autoencoder.metrics import Closeness, closeness
from tokenkit.tokenizers.autoencoder.package import Kind, Package, PackageConfig, is_package
from tokenkit.tokenizers.autoencoder.pins import PinTable
from tokenkit.tokenizers.autoencoder.statistics import Statistics
from tokenkit.tokenizers.autoencoder.stream import DecodeStream, EncodeStream
from tokenkit.tokenizers.hf import HFTokenizer

if TYPE_CHECKING:
    from tokenkit.tokenizers.autoencoder.network import AutoEncoder


@dataclass(frozen=True)
class Reconstruction:
    """What became of a text: by the whole tokenizer, and by network and quantiser alone."""

    original: str
    reconstruction: str
    ids: list[int]
    system: Closeness
    learned_reconstruction: str | None
    learned: Closeness | None
    confidence: dict[str, Any] | None
    """Of the decoder over the positions of the learned reconstruction: average, minimum, how many under one half."""


class AutoEncoderTokenizer(FixedRoles):
    """Pins, then verified codes, then bytes: every string comes back exactly, trained or not.

    Without a configuration it is the preset `small`, untrained and without pins, and spells everything in bytes.
    """

    lossless = True

    def __init__(
        self,
        config: TokenizerConfig | None = None,
        *,
        package: Package | None = None,
        kind: Kind | None = None,
        statistics: bool = False,
    ) -> None:
        """`kind` compact leaves the codes out. `statistics` also counts how often every id was used."""
        self.config = config or TokenizerConfig()
        self.package = package or untrained_package(self.config)
        self.kind = kind or self.package.config.kind
        size = DEFAULT_SIZE if self.config.performance.cache_encodings else 0
        self.codec = self.package.codec(self.kind, size)
        self._statistics = Statistics(statistics)

    @classmethod
    def from_config(cls, path: Path | str) -> "AutoEncoderTokenizer":
        """An untrained tokenizer of a JSON configuration."""
        return cls(load_config(path))

    @classmethod
    def load(cls, path: Path | str, kind: Kind | None = None) -> "AutoEncoderTokenizer":
        """The tokenizer of a package folder, or the one that a training checkpoint stands for (codes, no pins)."""
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: does not exist; write the folder of a learned tokenizer or a checkpoint")
        if path.is_dir():
            if not is_package(path):
                raise UserError(f"{path}: no fsq_config.json in it; write the folder of a learned tokenizer")
            return cls(package=Package.load(path, kind), kind=kind)
        return cls(package=checkpoint_package(path), kind=kind)

    def save(self, folder: Path | str) -> str:
        """Writes the package, with a tokenizer.json for everybody else; the fingerprint."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: a file; write the name of a folder")
        package = replace(self.package, config=self.package.config.model_copy(update={"kind": self.kind}))
        return save_with_fast(package, folder)

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return self.codec.layout.vocab_size

    @property
    def max_chunk_size(self) -> int:
        """Bytes of the longest piece that one spelling covers."""
        return self.codec.max_chunk

    def is_special(self, index: int) -> bool:
        """Whether an id is below the first regular one."""
        return self.codec.layout.is_special(index)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, between begin and end unless that is turned off."""
        began = time.perf_counter()
        chunks = self.codec.split(text)
        ids = self.codec.encode_chunks(chunks)
        if add_special_tokens:
            ids = [BOS, *ids, EOS]
        self._statistics.encoded(len(chunks), len(text), ids, time.perf_counter() - began)
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True, threads: int = 1) -> list[list[int]]:
        """Ids of every text; chunks that are new in all of them are looked at once. `threads` share the texts."""
        if threads > 1:
            parts = [texts[n::threads] for n in range(threads)]
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(lambda part: self.encode_batch(part, add_special_tokens), parts))
            return [found[n % threads][n // threads] for n in range(len(texts))]
        began = time.perf_counter()
        encoded = self.codec.encode_batch(texts)
        if add_special_tokens:
            encoded = [[BOS, *ids, EOS] for ids in encoded]
        seconds = time.perf_counter() - began
        self._statistics.encoded(0, sum(map(len, texts)), [i for ids in encoded for i in ids], seconds)
        return encoded

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; special tokens are left out, or stand in it as their literals."""
        began = time.perf_counter()
        if skip_special_tokens or not any(map(self.is_special, ids)):
            text = self.codec.decode(ids)
        else:
            names = [name.encode() for name in self.codec.layout.special_names]
            names[UNK] = "\ufffd".encode()
            strings = self.codec.token_strings(ids)
            spelled = (names[i] if self.is_special(i) else s for i, s in zip(ids, strings))
            text = b"".join(spelled).decode("utf-8", "replace")
        self._statistics.decoded(len(ids), time.perf_counter() - began)
        return text

    def decode_batch(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of every list of ids."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes, without special tokens."""
        return self.codec.encode_bytes(data)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids."""
        return self.codec.decode_bytes(ids)

    def encode_stream(self) -> EncodeStream:
        """For text that arrives bit by bit."""
        return EncodeStream(self.codec)

    def decode_stream(self) -> DecodeStream:
        """For ids that arrive one by one."""
        return DecodeStream(self.codec)

    def is_canonical(self, ids: Sequence[int]) -> bool:
        """Whether these are the ids that their own bytes encode to."""
        return self.canonicalise(ids) == [*ids]

    def canonicalise(self, ids: Sequence[int]) -> list[int]:
        """The ids of the bytes that ids spell."""
        return self.encode_bytes(self.decode_bytes(ids))

    def learned_bytes(self, text: str) -> bytes:
        """What network and quantiser make of a text, chunk by chunk, unchecked; UserError without a network."""
        codes = self.codec.open_codes or self.package.open_codes()
        pieces = [piece for chunk in self.codec.split(text) for piece in cut(to_bytes(chunk), codes.max_bytes)]
        return b"".join(codes.learned(pieces))

    def test_reconstruction(self, text: str) -> Reconstruction:
        """What becomes of a text; the learned part is None where the package has no network."""
        ids = self.encode(text)
        back = self.decode(ids)
        learned = confidence = None
        if self.package.network is not None:
            learned = self.learned_bytes(text).decode("utf-8", "replace")
            codes = self.codec.open_codes or self.package.open_codes()
            pieces = [p for chunk in self.codec.split(text) for p in cut(to_bytes(chunk), codes.max_bytes)]
            confidence = codes.confidence(pieces)
        original = escaped(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return Reconstruction(
            text,
            back,
            ids,
            closeness(original, back),
            learned,
            None if learned is None else closeness(original, learned),
            confidence,
        )

    def get_stats(self) -> dict[str, Any]:
        """Counts, times per call in milliseconds, what the cache did, and the most used ids if they are counted."""
        return self._statistics.as_json() | {"cache": self.codec.cache.statistics()}

    def reset_stats(self) -> None:
        """Begins to count anew."""
        self._statistics = Statistics(self._statistics.histogram is not None)

    def print_stats(self) -> None:
        """Prints the counts and, where they are counted, the ten most used ids."""
        print(self._statistics.text(self.codec.fixed_bytes))


def untrained_package(config: TokenizerConfig) -> Package:
    """A package of a configuration: its network with random weights, whose codes are not worth a try, and no pins."""
    import torch

    from tokenkit.tokenizers.autoencoder.network import AutoEncoder

    shape = config.network()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoEncoder(shape).eval()
    first = config.special_tokens.first_regular_id
    return package_of(network, kind="compact", chunker=config.chunker, first_regular_id=first)


def checkpoint_package(path: Path) -> Package:
    """The package that a training checkpoint stands for: its network and chunker, and no pins."""
    from tokenkit.tokenizers.autoencoder.bundle import read_network, read_state

    return package_of(read_network(path), chunker=read_state(path).get("chunker", DEFAULT))


def package_of(
    network: "AutoEncoder | None", pins: PinTable | None = None, *, warm: dict[str, Any] | None = None, **settings: Any
) -> Package:
    """A package of a network, with pins or without; `settings` are fields of `PackageConfig`."""
    shape = None if network is None else resolved(network.config)
    kind = settings.pop("kind", "open" if network is not None else "compact")
    config = PackageConfig(kind=kind, network=shape, **settings)
    return Package(config, pins or PinTable((), ()), network, warm or {})


def save_with_fast(package: Package, folder: Path) -> str:
    """Writes a package and the standard files beside it; the fingerprint."""
    codec = package.codec("compact")
    definition = fast_definition(codec)
    folder.mkdir(parents=True, exist_ok=True)
    HFTokenizer(definition, fast_config(), folder.name).save(folder)
    fingerprint = package.save(folder)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(_readme(package, fingerprint), "utf-8")
    return fingerprint


def _readme(package: Package, fingerprint: str) -> str:
    settings = json.dumps(package.config.model_dump(mode="json", exclude={"network"}))
    return (
        f"# A learned tokenizer\n\n{len(package.pins):,} pinned strings, 256 bytes"
        f"{', and verified codes of an auto-encoder' if package.network else ''}. Made by tokenkit.\n\n"
        '`AutoTokenizer.from_pretrained("THIS_FOLDER")` loads tokenizer.json: pins and bytes, the compact form.\n'
        '`tokenkit.load_tokenizer("THIS_FOLDER")` loads the whole.\n\n'
        f"Settings: `{settings}`\n\nFingerprint: `{fingerprint}`\n"
    )
