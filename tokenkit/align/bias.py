"""Tokenisation bias of two tokenizers as a sparse table: two probability masses per pair of tokens. ALM, 2503.20083."""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer

BIAS_FILE = "bias.safetensors"


@dataclass(frozen=True)
class PairBias:
    """Bias of every pair of tokens of which one spells a suffix of the other, sorted by (teacher id, student id).

    `bias1` is the unigram probability of what the teacher's token rules out as a continuation and the student's does
    not; `bias2` the other way round. A pair that is not listed has none.
    """

    teacher_ids: Int32[ndarray, "P"]
    student_ids: Int32[ndarray, "P"]
    bias1: Float32[ndarray, "P"]
    bias2: Float32[ndarray, "P"]
    shape: tuple[int, int]  # ids of the teacher, ids of the student

    def __len__(self) -> int:
        return len(self.bias1)

    @functools.cached_property
    def _keys(self) -> Int64[ndarray, "P"]:
        return self.teacher_ids.astype(np.int64) * self.shape[1] + self.student_ids

    def at(
        self, teacher_ids: Int[ndarray, "K"], student_ids: Int[ndarray, "K"]
    ) -> tuple[Float32[ndarray, "K"], Float32[ndarray, "K"]]:
        """Both biases of K pairs of tokens; 0 for a pair that is not listed and for ids outside `shape`."""
        teacher, student = teacher_ids.astype(np.int64), student_ids.astype(np.int64)
        inside = (teacher >= 0) & (teacher < self.shape[0]) & (student >= 0) & (student < self.shape[1])
        found = np.zeros((2, len(teacher)), np.float32)
        if len(self):
            wanted = teacher * self.shape[1] + student
            place = np.minimum(np.searchsorted(self._keys, wanted), len(self) - 1)
            listed = inside & (self._keys[place] == wanted)
            found[:, listed] = self.bias1[place[listed]], self.bias2[place[listed]]
        return found[0], found[1]


def write_whole_with(path: Path, write: Callable[[Path], object]) -> None:
    """A file there whole or not at all, written by a function; of bytes at hand, `whole_file.write_whole` does it."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")  # numpy appends a missing .npz
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_bias(folder: Path, bias: PairBias, teacher: Tokenizer, student: Tokenizer) -> None:
    """Writes bias.safetensors, which names the pair it belongs to."""
    about = {"shape": bias.shape, "teacher": teacher.fingerprint, "student": student.fingerprint}
    tensors = {
        "teacher_id": bias.teacher_ids,
        "student_id": bias.student_ids,
        "bias1": bias.bias1,
        "bias2": bias.bias2,
    }
    # One metadata entry: the library writes several in an order that changes from run to run.
    write_whole_with(folder / BIAS_FILE, lambda path: path.write_bytes(save(tensors, {"tokenkit": json.dumps(about)})))


def save_bias_npz(folder: Path, bias: PairBias) -> None:
    """Writes bias1_matrix.npz and bias2_matrix.npz, which `scipy.sparse.load_npz` reads."""
    layout = {"row": bias.teacher_ids, "col": bias.student_ids, "format": np.array(b"coo"), "shape": bias.shape}
    for name, values in (("bias1", bias.bias1), ("bias2", bias.bias2)):
        write_whole_with(folder / f"{name}_matrix.npz", lambda path, data=values: np.savez(path, data=data, **layout))


def load_bias(folder: Path, teacher: Tokenizer, student: Tokenizer) -> PairBias:
    """The bias of this pair; UserError where the folder holds none or that of other tokenizers."""
    path = Path(folder) / BIAS_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {BIAS_FILE} here; make it with tokenkit tokenizer-info teacher=... student=...")
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {}).get("tokenkit", "{}"))
            columns = [file.get_tensor(name) for name in ("teacher_id", "student_id", "bias1", "bias2")]
    except (SafetensorError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a bias file ({reason}); make it again with tokenkit tokenizer-info") from None
    for side, tokenizer in (("teacher", teacher), ("student", student)):
        if about.get(side) != tokenizer.fingerprint:
            raise UserError(
                f"{path}: made for another {side} than {tokenizer.name}; run tokenkit tokenizer-info for this pair"
            )
    return PairBias(*columns, shape=tuple(about["shape"]))
