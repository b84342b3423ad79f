"""What a teacher said about a corpus, on disk: two floats per token, good for a student of any tokenizer.

A row of the corpus (a window of text or a conversation) is tokenised by the teacher alone, so nothing of the student
enters. For each token after the first, which is given, a shard holds its log-probability and the log-mass of the tokens
that begin after a boundary, right after it. Ids are not stored: they are computed again and compared by a checksum.
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
from jaxtyping import Float32, Int, UInt16
from numpy import ndarray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from tokenkit.align.bias import write_whole
from tokenkit.align.boundary import boundary_tokens
from tokenkit.config import Config, UserError, build
from tokenkit.data.example import Row, Side, Window
from tokenkit.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
HOLDS = ("label_logp", "boundary_logp")
Identity = dict[str, str | int]


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
    hidden_width: int | None = None
    """Channels of the teacher's hidden states, where they are recorded."""
    evaluated_on: str | None = None
    """Fingerprint of the held-out text and the context it was read with."""
    shards: tuple[Shard, ...] = ()


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
            if not name.startswith("data."):
                there, here = str(there)[:12], str(here)[:12]  # the beginning of a checksum will do
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
    write_whole(folder / MANIFEST, lambda path: path.write_text(text, "utf-8"))


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
    """The teacher's ids of a row, and for each but the first its log-probability and the boundary mass after it."""

    ids: Int[ndarray, "T"]
    label_logp: Float32[ndarray, "S"]
    boundary_logp: Float32[ndarray, "S"]


class Recording:
    """A record while it is written: shards in any order, each there whole or not at all, the manifest after each."""

    def __init__(self, folder: Path, blank: Manifest):
        self.folder, self._blank = folder, blank
        self._shards: dict[str, Shard] = {}
        for leftover in folder.glob(".*.tmp*"):  # of a recording that was killed while it wrote
            leftover.unlink()
        if (folder / MANIFEST).is_file():
            kept = read_manifest(folder)
            check_identity(folder, kept.identity, blank.identity)
            self._shards = {s.file: s for s in kept.shards if self._whole(s)}
        self._write()

    def has(self, number: int) -> bool:
        """Whether a shard is on disk, whole."""
        return _name(number) in self._shards

    def add(self, number: int, first_row: int, rows: Sequence[RowScores]) -> None:
        """Writes one shard, then the manifest that lists it."""
        counts = np.array([len(row.label_logp) for row in rows], np.uint32)
        tensors = {
            "label_logp": np.concatenate([row.label_logp for row in rows]),
            "boundary_logp": np.concatenate([row.boundary_logp for row in rows]),
            "counts": counts.astype(np.uint16) if counts.max() < 1 << 16 else counts,
            "checks": np.array([row_checksum(row.ids) for row in rows], np.uint16),
        }
        raw, name = save(tensors), _name(number)
        write_whole(self.folder / name, lambda path: path.write_bytes(raw))
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

    def check_needs(self, needs: Iterable[str], losses: Iterable[str]) -> None:
        """UserError where losses ask for tensors of the teacher that were not recorded."""
        missing = sorted(set(needs) - set(self.manifest.holds))
        if missing:
            raise UserError(
                f"losses ({', '.join(losses)}): need the teacher's {', '.join(missing)}, but {self.folder} holds "
                f"{' and '.join(self.manifest.holds)} only; use alm (boundary=space), or a live teacher without record"
            )

    def leaves(self, rows: Sequence[int], sides: Sequence[Side], width: int) -> dict[str, Tensor]:
        """`teacher_label_logp` and `teacher_boundary_logp` of rows, as a live teacher yields them; 0 in the padding."""
        label, boundary = (np.zeros((len(rows), width), np.float32) for _ in range(2))
        for place, (row, side) in enumerate(zip(rows, sides, strict=True)):
            scored = len(side.ids) - 1
            logp, mass = self._row(row, side.ids)
            label[place, :scored] = np.where(side.trained[1:], logp, 0)
            boundary[place, 1 : scored + 1] = mass
        return {"teacher_label_logp": torch.from_numpy(label), "teacher_boundary_logp": torch.from_numpy(boundary)}

    def _row(self, row: int, ids: Int[ndarray, "T"]) -> tuple[ndarray, ndarray]:
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
        return shard.read(int(shard.ends[place]), scored)


class _OpenShard:
    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, "np")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        counts = self._file.get_tensor("counts")
        self.ends: Int[ndarray, "R1"] = np.append(0, np.cumsum(counts, dtype=np.int64))
        self.checks: UInt16[ndarray, "R"] = self._file.get_tensor("checks")

    def read(self, start: int, count: int) -> tuple[ndarray, ndarray]:
        if not count:  # the library refuses an empty range at the end of a tensor
            return np.empty(0, np.float32), np.empty(0, np.float32)
        label, boundary = (self._file.get_slice(name)[start : start + count] for name in HOLDS)
        return label, boundary
