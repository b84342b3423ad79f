"""A checkpoint as one file: an uncompressed zip of safetensors and one JSON text, whole or not there at all.

Nothing is unpickled and nothing is unpacked: members have fixed names, are stored as they are, and so can never be
larger than the file that holds them.
"""

import json
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig
from tokenkit.tokenizers.whole_file import sync

MEMBERS = {"model": "model.safetensors", "optimizer": "optim.safetensors", "state": "task.safetensors"}
STATE = "state.json"
MAX_STATE_BYTES = 16 << 20
EMA = "task.ema."  # begins the names of averaged weights among what the task remembers


def write_bundle(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Writes the file under a temporary name beside it, syncs and renames it; OSError leaves what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                archive.writestr(zipfile.ZipInfo(STATE), json.dumps(dict(state), indent=1))
                for part, name in MEMBERS.items():
                    archive.writestr(zipfile.ZipInfo(name), save(dict(tensors.get(part, {}))))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_state(path: Path) -> dict[str, Any]:
    """What the JSON text of a checkpoint says; UserError for another kind of file."""
    with _opened(path) as archive:
        return _state(archive)


def read_bundle(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors of every part, and what the JSON text says; UserError for a damaged file or another kind of file."""
    with _opened(path) as archive:
        tensors = {part: load(archive.read(name)) for part, name in MEMBERS.items()}
        return tensors, _state(archive)


def read_network(path: Path) -> AutoEncoder:
    """The auto-encoder of a checkpoint, with averaged weights where it has them, ready for evaluation."""
    tensors, state = read_bundle(path)
    memories = tensors["state"]
    averaged = {name.removeprefix(EMA): value for name, value in memories.items() if name.startswith(EMA)}
    try:
        network = AutoEncoder(NetworkConfig.model_validate(state["network"]))
        network.load_state_dict(averaged or tensors["model"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: holds no auto-encoder ({str(error).splitlines()[0]})") from None
    return network.eval()


def _state(archive: zipfile.ZipFile) -> dict[str, Any]:
    state = json.loads(archive.read(STATE))
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{STATE} has no step")
    return state


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive with its members checked; whatever is wrong with it or inside becomes one line."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            _check(archive, file)
            yield archive
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, where a checkpoint file is expected") from None
    except (zipfile.BadZipFile, SafetensorError, ValueError, EOFError, struct.error) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a whole checkpoint of a tokenizer ({what}); give another one") from None


def _check(archive: zipfile.ZipFile, file: BinaryIO) -> None:
    members = archive.infolist()
    names = [member.filename for member in members]
    if sorted(names) != sorted([STATE, *MEMBERS.values()]):
        raise ValueError(f"holds {', '.join(names[:4]) or 'nothing'}")
    if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 or m.compress_size != m.file_size for m in members):
        raise ValueError("its members are compressed or encrypted")
    size = os.fstat(file.fileno()).st_size
    if sum(member.file_size for member in members) > size or archive.getinfo(STATE).file_size > MAX_STATE_BYTES:
        raise ValueError("its members are larger than it may hold")
