"""Token maps: for every token of one vocabulary a token of another, by equal bytes, shared prefix or edit distance."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64, UInt8
from numpy import ndarray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tokenkit.align.bias import write_whole_with
from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.pieces import byte_alphabet

MapKind = Literal["mined", "exact", "prefix"]
NONE = -1
CELLS = 1 << 22  # distances held at one time: 8 MiB
LONGEST = 0x7FFF  # bytes of a token: what a distance in a packed rank has room for
EDITS: Any = Levenshtein.distance  # the stubs of the library do not fit one another
UNKNOWN = np.int64(np.iinfo(np.int64).max)


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Per student id a teacher id and how many bytes must be edited to spell it; both -1 where there is none."""

    teacher_id: Int32[ndarray, "V"]
    distance: Int32[ndarray, "V"]

    def describe(self) -> dict[str, int | float]:
        """How many ids have a counterpart, an equal one, and the mean and largest distance in bytes."""
        found = self.distance[self.distance >= 0]
        return {
            "ids": len(self.teacher_id),
            "mapped": len(found),
            "equal": int((found == 0).sum()),
            "mean_distance": float(found.mean()) if len(found) else 0.0,
            "largest_distance": int(found.max(initial=0)),
        }


def map_vocabulary(kind: MapKind, student: Tokenizer, teacher: Tokenizer, *, workers: int = 0) -> TokenMap:
    """The map of that kind, with the distances of its pairs."""
    if kind == "mined":
        return mined_map(student, teacher, workers=workers)
    if kind == "exact":
        found = exact_map(student, teacher)
        return TokenMap(found, np.minimum(found, 0))
    found = prefix_map(student, teacher)
    left, right = (np.array([len(s) for s in side.token_bytes], np.int32) for side in (student, teacher))
    return TokenMap(found, np.where(found == NONE, NONE, left - right[found]).astype(np.int32))


def exact_map(tokens: Tokenizer, onto: Tokenizer) -> Int32[ndarray, "V"]:
    """Per id of `tokens` the id of `onto` with the same bytes; a special token's is that of the same literal; else -1.

    Where several ids of `onto` have the same bytes it is the one that `onto` itself uses.
    """
    found = np.full(tokens.vocab_size, NONE, np.int32)
    in_use = ids_in_use(onto)
    for index, spelling in enumerate(tokens.token_bytes):
        if spelling:
            found[index] = in_use.get(spelling, NONE)
    for literal, index in tokens.special_tokens.items():
        found[index] = onto.special_tokens.get(literal, NONE)
    return found


def prefix_map(tokens: Tokenizer, onto: Tokenizer) -> Int32[ndarray, "V"]:
    """Per id of `tokens` the longest token of `onto` that its bytes begin with, else -1; special tokens as `exact_map`.

    With the sides swapped: which of `tokens` every token of `onto` begins with. Neither follows from the other.
    """
    found = exact_map(tokens, onto)
    in_use = ids_in_use(onto)
    longest = max(map(len, in_use), default=0)
    for index in np.flatnonzero(found == NONE).tolist():
        spelling = tokens.token_bytes[index]
        for length in range(min(len(spelling), longest), 0, -1):
            if spelling[:length] in in_use:
                found[index] = in_use[spelling[:length]]
                break
    return found


def mined_map(student: Tokenizer, teacher: Tokenizer, *, workers: int = 0) -> TokenMap:
    """Per student token the teacher token of least Levenshtein distance in bytes. Wan+ 2024, 2401.10491 (MinED).

    Of several at that distance the one that shares the longest prefix with the student's token, then the one of lowest
    id. A special token counts as its literal; every id of a doubled spelling gets a counterpart. `workers` are threads,
    0 for one per core.
    """
    literals = {index: literal.encode() for literal, index in student.special_tokens.items()}
    spelled = [literals.get(index, spelling) for index, spelling in enumerate(student.token_bytes)]
    candidates = {literal.encode(): index for literal, index in teacher.special_tokens.items()} | ids_in_use(teacher)
    if max(map(len, [*spelled, *candidates]), default=0) > LONGEST:
        raise UserError(f"token map: a token of more than {LONGEST} bytes; is this a tokenizer?")
    exact = exact_map(student, teacher)
    wanted = dict.fromkeys(s for s, index in zip(spelled, exact.tolist()) if s and index == NONE)
    near = nearest(list(wanted), candidates, workers=workers)
    distance = np.where(exact == NONE, NONE, 0).astype(np.int32)
    for index, spelling in enumerate(spelled):
        if exact[index] == NONE and spelling in near:
            exact[index], distance[index] = near[spelling]
    return TokenMap(exact, distance)


BEFORE = ("\n", "a", "")  # behind the first two stands no dummy space; what is spelled may join with either of them


def ids_in_use(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The id of every spelling of ordinary tokens; of doubled ones (`<0x41>` beside `A`) the id that encoding gives."""
    found: dict[bytes, int] = {}
    doubled: dict[bytes, set[int]] = {}
    for index, spelling in enumerate(tokenizer.token_bytes):
        if spelling in found:
            doubled.setdefault(spelling, {found[spelling]}).add(index)
        elif spelling:
            found[spelling] = index
    for spelling, ids in doubled.items():
        for before in BEFORE:
            used = [index for index in _ids_in_text(tokenizer, spelling, before) if index in ids]
            if used:
                found[spelling] = used[-1]
                break
    return found


def nearest(
    spellings: Sequence[bytes], candidates: dict[bytes, int], *, workers: int = 0
) -> dict[bytes, tuple[int, int]]:
    """Id and distance of the candidate nearest to every spelling: least edits, longest common prefix, lowest id.

    Candidates are compared length by length, beginning with the spelling's own: a candidate that is longer or shorter
    by d bytes is at least d edits away, so those beyond the best distance so far are never looked at.
    """
    bands = {length: _Band(group, candidates) for length, group in _by_length(candidates).items()}
    found: dict[bytes, tuple[int, int]] = {}
    for length, group in _by_length(spellings).items():
        reach = max((abs(length - other) for other in bands), default=-1)
        widest = max((len(band.ids) for band in bands.values()), default=1)
        size = max(CELLS // widest, 1)
        for first in range(0, len(group), size):
            block = _Band(group[first : first + size])
            best = np.full(len(block.spellings), UNKNOWN)
            for away in range(reach + 1):
                open_rows = np.flatnonzero(best >> 48 >= away)
                if not len(open_rows):
                    break
                for other in {length - away, length + away} & bands.keys():
                    ranks = _ranks(block.rows(open_rows), bands[other], workers)
                    best[open_rows] = np.minimum(best[open_rows], ranks)
            ids = (best & 0xFFFFFFFF).tolist()
            found |= zip(block.spellings, zip(ids, (best >> 48).tolist())) if reach >= 0 else ()
    return found


class _Band:
    """Spellings of one length, as rows of bytes."""

    def __init__(self, spellings: Sequence[bytes], ids: dict[bytes, int] | None = None) -> None:
        self.spellings = list(spellings)
        self.bytes: UInt8[ndarray, "N L"] = np.frombuffer(b"".join(spellings), np.uint8).reshape(len(spellings), -1)
        self.ids: Int64[ndarray, "N"] = np.array([ids[s] for s in spellings] if ids else [], np.int64)

    def rows(self, chosen: Int64[ndarray, "R"]) -> "_Band":
        """The spellings of the given rows."""
        return self if len(chosen) == len(self.spellings) else _Band([self.spellings[i] for i in chosen.tolist()])


def _ranks(rows: _Band, band: _Band, workers: int) -> Int64[ndarray, "R"]:
    """The least of (distance, missing common prefix, id) over the band, per row, packed into 16 + 16 + 32 bits."""
    distance = cdist(rows.spellings, band.spellings, scorer=EDITS, dtype=np.uint16, workers=workers or -1)
    least = distance.min(axis=1)
    row, column = np.nonzero(distance == least[:, None])
    prefix = np.zeros(len(row), np.int64)
    alike = np.arange(len(row))
    for place in range(min(rows.bytes.shape[1], band.bytes.shape[1])):
        alike = alike[rows.bytes[row[alike], place] == band.bytes[column[alike], place]]
        if not len(alike):
            break
        prefix[alike] += 1
    rank = ((0xFFFF - prefix) << 32) | band.ids[column]
    firsts = np.searchsorted(row, np.arange(len(least)))
    return (least.astype(np.int64) << 48) | np.minimum.reduceat(rank, firsts)


def _by_length(spellings: Iterable[bytes]) -> dict[int, list[bytes]]:
    groups: dict[int, list[bytes]] = defaultdict(list)
    for spelling in spellings:
        groups[len(spelling)].append(spelling)
    return groups


def _ids_in_text(tokenizer: Tokenizer, spelling: bytes, before: str) -> list[int]:
    """How a tokenizer spells the bytes behind a text; nothing if it cannot."""
    try:
        return tokenizer.encode(before + spelling.decode()).ids.tolist()
    except (UnicodeDecodeError, UserError):  # part of a character, or changed by the tokenizer
        return []


def save_map(folder: Path, found: TokenMap, kind: MapKind, student: Tokenizer, teacher: Tokenizer) -> Path:
    """Writes {kind}_mapping.safetensors, which names the pair it belongs to."""
    about = {"kind": kind, "teacher": teacher.fingerprint, "student": student.fingerprint}
    tensors = {"teacher_id": found.teacher_id, "distance": found.distance}
    path = folder / f"{kind}_mapping.safetensors"
    write_whole_with(path, lambda temporary: save_file(tensors, temporary, {"tokenkit": json.dumps(about)}))
    return path


def save_map_npy(folder: Path, found: TokenMap, kind: MapKind, student: Tokenizer) -> None:
    """Writes {kind}_mapping.npy (teacher id per student id) and {kind}_distances.json (per token in byte letters)."""
    letters = byte_alphabet()
    names = {index: literal for literal, index in student.special_tokens.items()}
    spelled = ["".join(letters[byte] for byte in spelling) for spelling in student.token_bytes]
    distances = {
        names.get(index, spelling): distance
        for index, (spelling, distance) in enumerate(zip(spelled, found.distance.tolist(), strict=True))
        if distance >= 0
    }
    write_whole_with(folder / f"{kind}_mapping.npy", lambda path: np.save(path, found.teacher_id))
    write_whole_with(
        folder / f"{kind}_distances.json", lambda path: path.write_text(json.dumps(distances, indent=1), "utf-8")
    )


def load_mined(folder: Path, teacher: Tokenizer, student: Tokenizer, kind: MapKind = "mined") -> TokenMap:
    """The map of this pair; UserError where the folder holds none or that of other tokenizers."""
    path = Path(folder) / f"{kind}_mapping.safetensors"
    make = f"tokenkit mined-mapping teacher=... student=... output={folder} kind={kind}"
    if not path.is_file():
        raise UserError(f"{folder}: no {path.name} here; make it with {make}")
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {}).get("tokenkit", "{}"))
            columns = [file.get_tensor(name) for name in ("teacher_id", "distance")]
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a token map ({str(error).splitlines()[0]}); make it again with {make}") from None
    for side, tokenizer in (("teacher", teacher), ("student", student)):
        if about.get(side) != tokenizer.fingerprint:
            raise UserError(f"{path}: made for another {side} than {tokenizer.name}; make this pair's with {make}")
    return TokenMap(*columns)
