"""What a teacher said about a corpus, on disk: two floats per token, good for a student of any tokenizer.

A row of the corpus (a window of text or a conversation) is tokenised by the teacher alone, so nothing of the student
enters. For each token after the first, which is given, a shard holds its log-probability and the log-mass of the tokens
that begin after a boundary, right after it; where asked for also the best ids of the distribution that predicts it, and
the last hidden state of every token. The text's ids are not stored: they are computed again and compared by a checksum.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt16
from numpy import ndarray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from tokenkit.align.bias import write_whole_with
from tokenkit.align.boundary import boundary_tokens
from tokenkit.config import Config, UserError, build
from tokenkit.data.example import Row, Side, Window
from tokenkit.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
HOLDS = ("label_logp", "boundary_logp")
TOP = ("top_logp", "top_ids", "tail_logp")
HIDDEN = "hidden"
Identity = dict[str, str | int]
Store = Literal["float32", "float16"]


def positions(name: str, scored: int) -> slice:
    """Where in a row of `scored` + 1 tokens the recorded values of a leaf stand, one row of values each."""
    # a token is predicted one position before its own, its boundary mass follows it, a hidden state is at the token
    return slice(1 if name == "boundary_logp" else 0, scored if name in ("label_logp", *TOP) else scored + 1)


class Shard(Config):
    """One file of a record, and the rows it holds."""

    file: str = Field(pattern=r"^shard_\d+\.safetensors$")
    first_row: int
    rows: int
    tokens: int
    """Tokens of the teacher, those that begin a row among them."""
    bytes: int
    sha256: str


class Manifest(Config):
    """What a record is of, and what it is made of."""

    format: Literal[1] = 1
    complete: bool = False
    holds: tuple[str, ...] = HOLDS
    teacher: str
    text: str
    identity: Identity
    """What must be the same where the record is read, by name."""
    rows: int
    tokens: int = 0
    bytes_per_token: float = 0.0
    """Bytes of all shards, over the teacher's tokens."""
    teacher_bits_per_byte: float | None = None
    top_k: int | None = None
    """How many of the teacher's best ids stand at each position, where they are recorded."""
    hidden_width: int | None = None
    """Channels of the teacher's hidden states, where they are recorded."""
    store: Store = "float32"
    """Type of `top_logp` and `hidden`; every other float is float32."""
    evaluated_on: str | None = None
    """Fingerprint of the held-out text and the context it was read with."""
    shards: tuple[Shard, ...] = ()

    @property
    def layout(self) -> Identity:
        """What is recorded of a token, by the run-file key that decides it."""
        return {"top_k": self.top_k or 0, "hidden": self.hidden_width is not None, "store": self.store}


def sha256_of(parts: Iterable[bytes]) -> str:
    """sha256 of byte strings and of where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def rows_identity(
    rows: Sequence[Row], tokenizer: Tokenizer, *, format: str, window_bytes: int, template_options: Mapping[str, Any]
) -> Identity:
    """What decides which tokens a teacher reads: how the corpus is cut, the corpus, tokenizer and template."""
    found: Identity = {"data.format": format, "data.window_bytes": window_bytes}
    if format == "chat":
        found["data.template_options"] = json.dumps(dict(template_options), sort_keys=True, ensure_ascii=False)
        found["chat template"] = sha256_of([json.dumps(tokenizer.chat_template).encode()])
    found["corpus"] = sha256_of(_row_bytes(row) for row in rows)
    found["teacher tokenizer"] = tokenizer.fingerprint
    found["boundary tokens"] = sha256_of([np.packbits(boundary_tokens(tokenizer)).tobytes()])
    return found


def _row_bytes(row: Row) -> bytes:
    if isinstance(row, Window):
        return f"{row.document} {row.start_byte} {row.ends_document} ".encode() + row.text.encode()
    return json.dumps([row.document, row.messages, row.tools], ensure_ascii=False, sort_keys=True).encode()


def check_identity(folder: Path, recorded: Identity, wanted: Identity) -> None:
    """UserError for the first thing in which a record differs from what is wanted of it."""
    for name, value in wanted.items():
        if recorded.get(name) != value:
            there, here = recorded.get(name), value
            if isinstance(value, str) and not name.startswith("data."):
                there, here = str(there)[:12], value[:12]  # the beginning of a checksum will do
            raise UserError(
                f"{folder}: recorded with another {name} ({there!r} there, {here!r} here); write what was recorded, or "
                "record again"
            )


def row_checksum(ids: Int[ndarray, "T"]) -> int:
    """Sixteen bits that tell one tokenisation of a row from another."""
    return zlib.crc32(ids.astype("<i4").tobytes()) & 0xFFFF


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a record; UserError where there is none, or a damaged one."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; write the folder that `tokenkit record` wrote") from None
    except ValueError:
        raise UserError(f"{path}: damaged, not JSON; record again") from None
    if not isinstance(values, dict) or values.get("format") != 1:
        raise UserError(f"{path}: not a record of format 1; record again with this version")
    written = values.pop("sha256", None)
    if written != sha256_of([json.dumps(values).encode()]):
        raise UserError(f"{path}: damaged, it does not have the checksum it was written with; record again")
    return build(Manifest, values)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    values = manifest.model_dump(mode="json")
    text = json.dumps({**values, "sha256": sha256_of([json.dumps(values).encode()])}, indent=1) + "\n"
    write_whole_with(folder / MANIFEST, lambda path: path.write_text(text, "utf-8"))


def find_damage(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard; None if it is as it was written."""
    path = folder / shard.file
    if not path.is_file():
        return f"{shard.file} is missing"
    if path.stat().st_size != shard.bytes:
        return f"{shard.file} has {path.stat().st_size:,} bytes of {shard.bytes:,}"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return f"{shard.file} does not have the checksum it was written with"
    return None


@dataclass(frozen=True)
class RowScores:
    """The teacher's ids of a row, and what it said of them: leaves by name, each at its `positions`."""

    ids: Int[ndarray, "T"]
    said: Mapping[str, ndarray]


class Recording:
    """A record while it is written: shards in any order, each there whole or not at all, the manifest after each."""

    def __init__(self, folder: Path, blank: Manifest):
        self.folder, self._blank = folder, blank
        self._shards: dict[str, Shard] = {}
        for leftover in folder.glob(".*.tmp*"):  # of a recording that was killed while it wrote
            leftover.unlink()
        if (folder / MANIFEST).is_file():
            kept = read_manifest(folder)
            check_identity(folder, kept.identity | kept.layout, blank.identity | blank.layout)
            self._shards = {s.file: s for s in kept.shards if self._whole(s)}
        self._write()

    def has(self, number: int) -> bool:
        """Whether a shard is on disk, whole."""
        return _name(number) in self._shards

    def add(self, number: int, first_row: int, rows: Sequence[RowScores]) -> None:
        """Writes one shard, then the manifest that lists it."""
        counts = np.array([len(row.ids) - 1 for row in rows], np.uint32)
        tensors = {name: np.concatenate([row.said[name] for row in rows]) for name in self._blank.holds}
        tensors["counts"] = counts.astype(np.uint16) if counts.max() < 1 << 16 else counts
        tensors["checks"] = np.array([row_checksum(row.ids) for row in rows], np.uint16)
        raw, name = save(tensors), _name(number)
        write_whole_with(self.folder / name, lambda path: path.write_bytes(raw))
        self._shards[name] = Shard(
            file=name,
            first_row=first_row,
            rows=len(rows),
            tokens=int(counts.sum()) + len(rows),
            bytes=len(raw),
            sha256=hashlib.sha256(raw).hexdigest(),
        )
        self._write()

    def finish(self, teacher_bits_per_byte: float | None = None, evaluated_on: str | None = None) -> Manifest:
        """Marks the record as complete."""
        about = {"teacher_bits_per_byte": teacher_bits_per_byte, "evaluated_on": evaluated_on}
        return self._write({"complete": True, **about})

    def _whole(self, shard: Shard) -> bool:
        damage = find_damage(self.folder, shard)
        if damage is not None:
            log.warning("%s: %s; this shard is recorded again", self.folder, damage)
        return damage is None

    def _write(self, update: Mapping[str, Any] = {}) -> Manifest:
        shards = tuple(sorted(self._shards.values(), key=lambda shard: shard.first_row))
        tokens = sum(shard.tokens for shard in shards)
        size = {"bytes_per_token": round(sum(shard.bytes for shard in shards) / max(1, tokens), 6), "tokens": tokens}
        manifest = self._blank.model_copy(update={"shards": shards, **size, **update})
        _write_manifest(self.folder, manifest)
        return manifest


def _name(number: int) -> str:
    return f"shard_{number:06d}.safetensors"


@dataclass(frozen=True)
class Wanted:
    """The leaves that losses ask of a teacher (without the side), and how many best ids the largest of them reads."""

    names: frozenset[str] = frozenset(HOLDS)
    top_k: int | None = None


BY_ALM = Wanted()


class Record:
    """A finished record, verified when opened and read through memory maps."""

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, read_manifest(folder)
        if not self.manifest.complete:
            raise UserError(f"{folder}: an unfinished record; finish it with `tokenkit record RUN.YAML --resume`")
        for shard in self.manifest.shards:
            damage = find_damage(folder, shard)
            if damage is not None:
                raise UserError(f"{folder}: {damage}; `tokenkit record RUN.YAML --resume` records that shard again")
        self._firsts = [shard.first_row for shard in self.manifest.shards]
        self._open: dict[int, _OpenShard] = {}

    def check(self, wanted: Identity) -> None:
        """UserError where the record is not of the rows, tokenizer and teacher that are wanted."""
        check_identity(self.folder, self.manifest.identity, wanted)

    def check_needs(self, wanted: Wanted, losses: Iterable[str]) -> None:
        """UserError where losses ask for tensors of the teacher, or for more best ids, than were recorded."""
        who, known = f"losses ({', '.join(losses)})", self.manifest
        missing = wanted.names - set(known.holds)
        if missing:
            *most, last = known.holds
            raise UserError(
                f"{who}: need the teacher's {', '.join(sorted(missing))}, but {self.folder} holds {', '.join(most)} "
                f"and {last} only; {_instead(missing, wanted.top_k)}"
            )
        if wanted.names & {*TOP} and (wanted.top_k or 0) > (known.top_k or 0):
            raise UserError(
                f"{who}: read the teacher's {wanted.top_k} best ids, but {self.folder} holds {known.top_k}; write "
                f"{known.top_k} or less as top_k of the losses, or record again with top_k={wanted.top_k}"
            )

    def leaves(
        self, rows: Sequence[int], sides: Sequence[Side], width: int, wanted: Wanted = BY_ALM
    ) -> dict[str, Tensor]:
        """The `teacher_` leaves of rows that are wanted, as a live teacher yields them; 0 in the padding."""
        best = min(wanted.top_k or self.manifest.top_k or 0, self.manifest.top_k or 0)
        depth = {"top_logp": (best,), "top_ids": (best,), HIDDEN: (self.manifest.hidden_width or 0,)}
        found = {
            name: np.zeros((len(rows), width, *depth.get(name, ())), np.int64 if name == "top_ids" else np.float32)
            for name in sorted(wanted.names)
        }
        for place, (row, side) in enumerate(zip(rows, sides, strict=True)):
            shard, at = self._place(row, side.ids)
            scored = len(side.ids) - 1
            for name, values in found.items():
                span = positions(name, scored)
                if span.start < span.stop:  # the library refuses an empty range at the end of a tensor
                    values[place, span] = shard.read(name, at, span.stop - span.start, best)
            if "label_logp" in found:
                found["label_logp"][place, :scored][~side.trained[1:]] = 0
        return {f"teacher_{name}": torch.from_numpy(values) for name, values in found.items()}

    def _place(self, row: int, ids: Int[ndarray, "T"]) -> tuple["_OpenShard", int]:
        """The shard of a row, and which of its rows it is; UserError where the row has other tokens."""
        number = int(np.searchsorted(self._firsts, row, "right")) - 1
        if number not in self._open:
            self._open[number] = _OpenShard(self.folder / self.manifest.shards[number].file)
        shard, place, scored = self._open[number], row - self._firsts[number], len(ids) - 1
        recorded = int(shard.ends[place + 1] - shard.ends[place])
        # a student may cut a conversation shorter: what the teacher said up to there does not depend on the rest
        cut = scored < recorded and self.manifest.identity["data.format"] == "chat"
        if not cut and (scored != recorded or row_checksum(ids) != shard.checks[place]):
            raise UserError(
                f"{self.folder}: row {row} was recorded with other tokens of the teacher ({recorded + 1} there, "
                f"{len(ids)} here); does its template write the date? record again"
            )
        return shard, place


def _instead(missing: Iterable[str], top_k: int | None) -> str:
    """What to write where a record does not hold what losses need."""
    never = sorted(set(missing) - {*TOP, HIDDEN, *HOLDS})
    if never:
        return f"only a live teacher has {', '.join(never)}: leave record out, or use alm (boundary=space) or top_k_kl"
    keys = [f"top_k={top_k or 64}"] if set(missing) & {*TOP} else []
    return f"record again with {' '.join([*keys, *(['hidden=true'] if HIDDEN in missing else [])])}"


class _OpenShard:
    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, "np")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        counts = self._file.get_tensor("counts")
        self.ends: Int[ndarray, "R1"] = np.append(0, np.cumsum(counts, dtype=np.int64))
        self.checks: UInt16[ndarray, "R"] = self._file.get_tensor("checks")

    def read(self, name: str, place: int, count: int, best: int) -> ndarray:
        """The first `count` values of a row; ids after the `best` first are part of the tail."""
        start = int(self.ends[place]) + (place if name == HIDDEN else 0)  # each row before has one state more
        rows, values = slice(start, start + count), self._file.get_slice(name)
        if name in ("top_logp", "top_ids"):
            return values[rows, :best]
        if name == "tail_logp" and best < self._file.get_slice("top_logp").get_shape()[1]:
            further = self._file.get_slice("top_logp")[rows, best:].astype(np.float32)
            return np.logaddexp(values[rows], np.logaddexp.reduce(further, 1))
        return values[rows]
