"""The folder of a learned tokenizer: what decides ids, sealed by one fingerprint, and what others load it by."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tokenkit.config import Config, UserError, build
from tokenkit.tokenizers.autoencoder.cache import DEFAULT_SIZE, Spelling
from tokenkit.tokenizers.autoencoder.chunkers import DEFAULT as DEFAULT_CHUNKER
from tokenkit.tokenizers.autoencoder.chunkers import MAX_CHUNK, make_chunker, to_text
from tokenkit.tokenizers.autoencoder.codec import LEAST_GAIN, Codec
from tokenkit.tokenizers.autoencoder.ids import FIRST_REGULAR_ID
from tokenkit.tokenizers.autoencoder.pins import PinTable

if TYPE_CHECKING:
    from tokenkit.tokenizers.autoencoder.network import AutoEncoder
    from tokenkit.tokenizers.autoencoder.open_codes import OpenCodes

CONFIG, PINS, WEIGHTS, WARM = "fsq_config.json", "pins.bin", "weights.safetensors", "warm.safetensors"
FINGERPRINT, METRICS = "fingerprint.txt", "metrics.json"
PACKAGE_FILES = (CONFIG, PINS, WEIGHTS, WARM, FINGERPRINT)
ARITHMETIC = 1  # raised when equal files would give other ids than before
Kind = Literal["compact", "open"]


class PackageConfig(Config):
    """What `fsq_config.json` says."""

    format: Literal[1] = 1
    arithmetic: int = ARITHMETIC
    kind: Kind = "compact"
    """compact: pins and bytes; open: codes of the auto-encoder as well."""
    chunker: str = DEFAULT_CHUNKER
    max_chunk: int = Field(MAX_CHUNK, ge=1, le=64)
    """Bytes of the longest pin and of the longest piece that is spelled by itself."""
    first_regular_id: int = Field(FIRST_REGULAR_ID, ge=4, le=1 << 16)
    names: tuple[str, ...] = ()
    """Literals of reserved ids that were given a meaning."""
    network: dict[str, Any] | None = None
    decoder_margin: float = Field(0.05, gt=0)
    encoder_margin: float = Field(1e-4, gt=0)
    repair: bool = False
    """Look for codes beside the encoder's where its own do not decode: ten times slower, and hardly fewer ids."""
    engine: Literal["float32", "int8"] = "float32"
    """Arithmetic of the encoder that the codes are made with: ids of one do not mean anything to the other."""


@dataclass(frozen=True)
class Package:
    """A learned tokenizer in parts."""

    config: PackageConfig
    pins: PinTable
    network: "AutoEncoder | None" = None
    warm: Mapping[str, Spelling] = field(default_factory=dict)
    """Frequent chunks and their ids in compact mode: what a first pass over new text need not compute."""

    def codec(self, kind: Kind | None = None, cache_size: int = DEFAULT_SIZE) -> Codec:
        """The codec of this package, by default of its own kind."""
        kind = kind or self.config.kind
        codes = self.open_codes() if kind == "open" else None
        warm = self.warm if codes is None else {c: ids for c, ids in self.warm.items() if len(ids) < LEAST_GAIN}
        return Codec(
            self.pins,
            make_chunker(self.config.chunker),
            first_regular_id=self.config.first_regular_id,
            open_codes=codes,
            names=self.config.names,
            cache_size=cache_size,
            warm=warm,
            max_chunk=self.config.max_chunk,
        )

    def open_codes(self) -> "OpenCodes":
        """The verified codes of the auto-encoder; UserError where the package has none."""
        from tokenkit.tokenizers.autoencoder.open_codes import OpenCodes

        if self.network is None:
            raise UserError("open codes: this tokenizer has no auto-encoder; train one, or use kind=compact")
        settings, network = self.config, self.network
        if settings.engine == "int8":
            from tokenkit.tokenizers.autoencoder.int8 import with_int8_encoder

            network = with_int8_encoder(network)
        return OpenCodes(
            network,
            decoder_margin=settings.decoder_margin,
            encoder_margin=settings.encoder_margin,
            repair=settings.repair,
        )

    def save(self, folder: Path) -> str:
        """Writes what decides ids, each file whole or not at all; the fingerprint, which is written last."""
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / CONFIG, (json.dumps(self.config.model_dump(mode="json"), indent=1) + "\n").encode())
        self.pins.save(folder / PINS)
        if self.network is not None:
            _save_weights(self.network, folder / WEIGHTS)
        fingerprint = fingerprint_of(folder)
        if self.warm:
            _save_warm(self.warm, folder / WARM, fingerprint)
        else:
            (folder / WARM).unlink(missing_ok=True)  # of what was saved here before
        _write(folder / FINGERPRINT, f"{fingerprint}\n".encode())
        return fingerprint

    @classmethod
    def load(cls, folder: Path, kind: Kind | None = None) -> "Package":
        """What `save` wrote; UserError where something is missing, damaged, or not what the fingerprint says.

        The network is read for open codes only, so a compact tokenizer never imports torch.
        """
        config = read_config(folder)
        sealed = _read(folder / FINGERPRINT).decode("ascii", "replace").strip()
        if fingerprint_of(folder) != sealed:
            raise UserError(f"{folder}: a file was changed since the tokenizer was saved; its ids would differ")
        if config.arithmetic != ARITHMETIC:
            raise UserError(f"{folder}: made for arithmetic {config.arithmetic}, and this version has {ARITHMETIC}")
        network = load_network(folder, config) if (kind or config.kind) == "open" else None
        pins = PinTable.load(folder / PINS)
        warm = _load_warm(folder / WARM, config, pins, sealed) if (folder / WARM).is_file() else {}
        return cls(config, pins, network, warm)


def is_package(folder: Path) -> bool:
    """Whether a folder holds a learned tokenizer."""
    return (folder / CONFIG).is_file()


def read_config(folder: Path) -> PackageConfig:
    """The settings of a package; UserError for a folder without one."""
    values = _read_json(folder)
    if not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG}: holds a {type(values).__name__}; write one JSON object")
    return build(PackageConfig, values)


def _read_json(folder: Path) -> Any:
    try:
        return json.loads(_read(folder / CONFIG))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: not JSON ({error}); save the tokenizer again") from None


def fingerprint_of(folder: Path) -> str:
    """sha256 over everything that decides ids: settings, pins and, where there is one, the network."""
    digest = hashlib.sha256()
    digest.update(json.dumps(_read_json(folder), sort_keys=True, separators=(",", ":")).encode())
    for name in (PINS, WEIGHTS):
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def load_network(folder: Path, config: PackageConfig) -> "AutoEncoder":
    """The auto-encoder of a package; UserError where it has none or the file does not fit."""
    from safetensors.torch import load_file as load_tensors

    from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig

    if config.network is None or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: holds no auto-encoder; use kind=compact, or train one")
    network = AutoEncoder(build(NetworkConfig, config.network))
    try:
        network.load_state_dict(load_tensors(folder / WEIGHTS))
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / WEIGHTS}: not the weights of this network ({reason})") from None
    return network.eval()


def _save_weights(network: "AutoEncoder", path: Path) -> None:
    from safetensors.torch import save as save_tensors

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    _write(path, save_tensors(state))


def _save_warm(warm: Mapping[str, Spelling], path: Path, fingerprint: str) -> None:
    """The ids of the chunks, and how many each has: they spell the chunks."""
    ids = list(warm.values())
    tensors = {
        "ids": np.fromiter((index for one in ids for index in one), np.int32),
        "num_ids": np.fromiter(map(len, ids), np.uint16),
    }
    _write(path, save(tensors, {"fingerprint": fingerprint}))


def _load_warm(path: Path, config: PackageConfig, pins: PinTable, fingerprint: str) -> dict[str, Spelling]:
    """The chunks and their ids; UserError where these are of another tokenizer."""
    strings = [b""] * config.first_regular_id + [bytes([b]) for b in range(256)] + list(pins.pieces)
    try:
        with safe_open(path, "numpy") as file:
            made_for = (file.metadata() or {}).get("fingerprint")
            ids, ends = file.get_tensor("ids"), np.cumsum(file.get_tensor("num_ids"), dtype=np.int64)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole file ({error}); delete it, or save the tokenizer again") from None
    within = not len(ids) or (ids.min() >= 0 and ids.max() < len(strings))
    if made_for != fingerprint or not within or (ends[-1] if len(ends) else 0) != len(ids):
        raise UserError(f"{path}: of another tokenizer; delete it, or save the tokenizer again")
    shared = {index: index for index in ids.tolist()}  # one object per id: a hundred thousand chunks repeat few
    listed, found, start = list(map(shared.__getitem__, ids.tolist())), {}, 0
    for end in ends.tolist():
        spelling = tuple(listed[start:end])
        found[to_text(b"".join(map(strings.__getitem__, spelling)))] = spelling
        start = end
    return found


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); write the folder of a learned tokenizer") from None
