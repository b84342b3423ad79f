"""Named tensors in safetensors files, one for each process that holds parts of them; read again by any number of them.

A single process writes `PART.safetensors`, as anyone would. Several write `PART-00001-of-00004.safetensors` and so on,
each with the pieces that it holds, and where in the whole tensors they belong; a piece that many hold is written once.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tokenkit.config import UserError
from tokenkit.train.parallel import DATA, MODEL, leads, ranks

PIECES = "pieces"  # the key of a file's metadata under which it says where its pieces belong


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and the file that holds it."""

    file: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def write_part(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> Path | None:
    """Writes what this process holds of some tensors, which may be spread; its file, None if that is nothing."""
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count == 1:
        path = folder / f"{part}.safetensors"
        save_file({name: _local(tensor) for name, tensor in tensors.items()}, path)
        return path
    held, places = {}, {}
    for name, tensor in tensors.items():
        if _is_ours(tensor):
            held[name] = _local(tensor)
            places[name] = {"offsets": _offsets(tensor), "shape": list(tensor.shape)}
    if not held:
        return None
    path = folder / f"{part}-{dist.get_rank() + 1:05d}-of-{count:05d}.safetensors"
    save_file(held, path, {PIECES: json.dumps(places)})
    return path


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _offsets(tensor: Tensor) -> list[int]:
    if not isinstance(tensor, DTensor):
        return [0] * tensor.ndim
    return list(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def _is_ours(tensor: Tensor) -> bool:
    """Whether this process writes its piece: of those that hold the same one, the first does."""
    if not isinstance(tensor, DTensor):
        return leads()
    mesh = tensor.device_mesh
    names, place = mesh.mesh_dim_names or (), mesh.get_coordinate() or ()
    alike = [at for at, placement in zip(place, tensor.placements, strict=True) if placement.is_replicate()]
    whole = ranks().mesh
    if whole is not None and names == (DATA,):  # held by each process along `model` as well
        alike.append(whole[MODEL].get_local_rank())
    return not any(alike) and tensor.to_local().numel() > 0


class Shards(Mapping[str, Tensor]):
    """The tensors of a part, each put together when it is asked for."""

    def __init__(self, folder: Path, part: str):
        """UserError where there is no file of this part."""
        self.pieces: dict[str, list[Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        files = sorted([*folder.glob(f"{part}.safetensors"), *folder.glob(f"{part}-*-of-*.safetensors")])
        if not files:
            raise UserError(f"{folder}: no {part}.safetensors inside")
        for file in files:
            with safe_open(file, "pt") as opened:
                said: dict[str, Any] = json.loads((opened.metadata() or {}).get(PIECES, "{}"))
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    own = tuple(opened.get_slice(name).get_shape())
                    place = said.get(name, {"offsets": [0] * len(own), "shape": own})
                    self.shapes[name] = tuple(place["shape"])
                    self.pieces.setdefault(name, []).append(Piece(file, tuple(place["offsets"]), own))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        pieces, shape = self.pieces[name], self.shapes[name]
        if sum(_size(piece.shape) for piece in pieces) != _size(shape):
            raise UserError(f"{pieces[0].file.parent}: pieces of {name} are missing")
        if len(pieces) == 1:
            return _read(pieces[0], name)
        found: Tensor | None = None
        for piece in pieces:
            values = _read(piece, name)
            found = torch.empty(shape, dtype=values.dtype) if found is None else found
            box = found
            for dim, (start, length) in enumerate(zip(piece.offsets, piece.shape, strict=True)):
                box = box.narrow(dim, start, length)
            box.copy_(values)
        assert found is not None
        return found


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _read(piece: Piece, name: str) -> Tensor:
    with safe_open(piece.file, "pt") as opened:
        return opened.get_tensor(name)
