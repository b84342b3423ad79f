"""Input-id expansion of a byte student: at every byte the longest old token that ends there. 2503.20083.

The student's input at a byte is its own row plus the (frozen) row of that token, or plus nothing. Special tokens break
what came before them; bytes of the text are ids 0..255.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.models.load import input_matrix
from tokenkit.models.remote_code.longest_suffix import BREAK as BREAK
from tokenkit.models.remote_code.longest_suffix import MAX_BYTES, LongestSuffix


class InputExpansion(nn.Module):
    """Hangs on an input embedding and adds the old rows, as a change made from outside; no part of the state dict."""

    old_rows: Tensor

    def __init__(self, spellings: Sequence[bytes], old_rows: Float[Tensor, "M D"]):
        super().__init__()
        self.spellings = list(spellings)
        self.match = LongestSuffix(self.spellings)
        self.register_buffer("old_rows", old_rows.detach().clone(), persistent=False)
        self._enabled = True
        self._before: Tensor | None = None

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The hook: the embedding's output and the row of the longest old token that ends there."""
        if not self._enabled:
            return output
        ids = inputs[0]
        token = self.match(ids, self._before)
        rows = self.old_rows.to(output)[token.clamp_min(0)]
        return output + rows.masked_fill((token < 0).unsqueeze(-1), 0.0)

    @contextmanager
    def after(self, before: Int[Tensor, "B W"] | None) -> Iterator[None]:
        """Inside, the ids of a call follow these, which a key-value cache stands for; None: they follow nothing."""
        self._before = None if before is None else before[:, 1 - MAX_BYTES :]
        try:
            yield
        finally:
            self._before = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is what it would be without."""
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True


@torch.no_grad()
def old_inputs(model: PreTrainedModel, token_bytes: Sequence[bytes]) -> tuple[list[bytes], Float[Tensor, "M D"]]:
    """Spellings of up to 16 bytes and what the model's embedding makes of them, its own scale included."""
    first: dict[bytes, int] = {}
    for i, spelling in enumerate(token_bytes):
        if 0 < len(spelling) <= MAX_BYTES:
            first.setdefault(spelling, i)
    embedding = model.get_input_embeddings()
    return list(first), embedding(torch.tensor(list(first.values()), device=input_matrix(model).device))


def attach_expansion(model: PreTrainedModel, spellings: Sequence[bytes], old_rows: Float[Tensor, "M D"]) -> None:
    """Adds the old rows to the inputs of a byte-level model from now on."""
    embedding = model.get_input_embeddings()
    expansion = InputExpansion(spellings, old_rows.to(input_matrix(model).device))
    embedding.add_module("expansion", expansion)
    embedding.register_forward_hook(expansion.add)


def expansion_of(model: PreTrainedModel) -> InputExpansion | None:
    """What hangs on the model's input embedding, if something does."""
    return next((module for module in model.modules() if isinstance(module, InputExpansion)), None)


def save_expansion(expansion: InputExpansion, path: Path) -> None:
    """One safetensors file: the rows, and the spellings one behind the other."""
    flat = torch.frombuffer(bytearray(b"".join(expansion.spellings)), dtype=torch.uint8)
    lengths = torch.tensor([len(s) for s in expansion.spellings], dtype=torch.uint8)
    save_file({"rows": expansion.old_rows.cpu().contiguous(), "bytes": flat, "lengths": lengths}, path)


def load_expansion(model: PreTrainedModel, path: Path) -> None:
    """Attaches what `save_expansion` wrote."""
    found = load_file(path)
    text, at, spellings = found["bytes"].numpy().tobytes(), 0, []
    for length in found["lengths"].tolist():
        spellings.append(text[at : at + length])
        at += length
    attach_expansion(model, spellings, found["rows"])
