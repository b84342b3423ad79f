"""What a teacher's features look like over a text: measured once, kept on disk, read by every later run.

One file for each layer, named after everything that decides the numbers: the teacher's weights, what is taken from its
layers, the data. Two such runs with other layers share the files of those they have in common.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenkit.align.bias import write_whole_with
from tokenkit.config import UserError, digest
from tokenkit.models.whitening import Moments

SCHEMA = 1
Batches = Iterable[tuple[Float[Tensor, "_ _ _ _"], Bool[Tensor, "_ _"]]]  # rows, positions, layers, channels


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over the names, types and bits of all parameters and buffers: what a model computes follows from it."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def teacher_statistics(
    folder: Path, identity: Mapping[str, Any], layers: Sequence[int], read: Callable[[list[int]], Batches]
) -> list[Moments]:
    """Moments of each of the layers, in their order; a layer may be asked for twice.

    `identity` is plain values: the teacher's weights (`weights_fingerprint`), what is taken from a layer, the data.
    `read(missing)` gives batches with the states of those layers along the third axis, and which positions count; it is
    called only if some layer is not stored yet, once, and what comes of it is stored.
    """
    wanted = list(dict.fromkeys(layers))
    paths = {layer: _path(folder, identity, layer) for layer in wanted}
    missing = [layer for layer in wanted if not paths[layer].is_file()]
    if missing:
        for layer, moments in zip(missing, measure(read(missing), len(missing)), strict=True):
            save_moments(paths[layer], moments, {**identity, "layer": layer})
    found = {layer: load_moments(paths[layer], {**identity, "layer": layer}) for layer in wanted}
    return [found[layer] for layer in layers]


def measure(batches: Batches, layers: int) -> list[Moments]:
    """Moments of each layer over all positions that count."""
    found: list[Moments | None] = [None] * layers
    for states, mask in batches:
        for i, before in enumerate(found):
            here = Moments.of(states[:, :, i], mask)
            found[i] = here if before is None else before.merged(here)
    measured = [moments for moments in found if moments is not None and moments.count > 1]
    if len(measured) < layers:
        raise UserError("norm: the teacher's statistics need two positions of text at least; give more data")
    return measured


def save_moments(path: Path, moments: Moments, identity: Mapping[str, Any]) -> None:
    """Writes a file that says what it was measured of, whole or not at all."""
    about = {"schema": SCHEMA, "count": moments.count, "identity": dict(identity)}
    content = save({"mean": moments.mean, "scatter": moments.scatter}, {"tokenkit": json.dumps(about, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole_with(path, lambda temporary: temporary.write_bytes(content))


def load_moments(path: Path, identity: Mapping[str, Any]) -> Moments:
    """What `save_moments` wrote; UserError where it is damaged or was measured of something else."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("tokenkit", "{}"))
            tensors = [file.get_tensor(name) for name in ("mean", "scatter")]
    except (SafetensorError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a file of statistics ({reason}); delete it, and it is measured again") from None
    if about.get("schema") != SCHEMA or about.get("identity") != json.loads(json.dumps(dict(identity))):
        raise UserError(f"{path}: measured of another teacher, layer or text; delete it, and it is measured again")
    return Moments(about["count"], *tensors)


def _path(folder: Path, identity: Mapping[str, Any], layer: int) -> Path:
    return folder / f"{digest({**identity, 'layer': layer})}.safetensors"
