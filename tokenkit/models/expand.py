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

MAX_BYTES = 16
BREAK = 256  # the first id that is no byte: no old token goes across it
BASE = BREAK + 1


class LongestSuffix:
    """Old tokens by their bytes; of a batch of byte ids, the longest that ends at every position.

    A token's key is the polynomial of its bytes modulo 2^64, last byte first, so that one more byte to the left adds
    one product. Keys of one length are sorted and searched; a hit is compared byte by byte, so a collision cannot lie.
    """

    def __init__(self, token_bytes: Sequence[bytes]):
        first: dict[bytes, int] = {}
        for i, spelling in enumerate(token_bytes):
            if 0 < len(spelling) <= MAX_BYTES:
                first.setdefault(spelling, i)  # of two tokens with the same bytes the first
        self.levels: list[tuple[Tensor, Tensor, Tensor]] = []
        for length in range(1, MAX_BYTES + 1):
            spellings = [s for s in first if len(s) == length]
            ids = torch.tensor([first[s] for s in spellings], dtype=torch.long)
            text = torch.tensor([list(reversed(s)) for s in spellings], dtype=torch.long).view(-1, length)
            key = torch.zeros(len(spellings), dtype=torch.long)
            for column in range(length):
                key += text[:, column] * _power(column)
            assert len(key.unique()) == len(key), "two tokens of a vocabulary share a key"
            order = key.argsort()
            self.levels.append((key[order], ids[order], text[order]))

    def __call__(self, ids: Int[Tensor, "B T"], before: Int[Tensor, "B W"] | None = None) -> Int[Tensor, "B T"]:
        """The old token's id at each position, -1 where none ends there; `before` are the ids that came first."""
        window = ids if before is None else torch.cat([before.to(ids), ids], 1)
        window = window.clamp_max(BREAK)  # every special token is a break
        rows, total = window.shape
        reversed_bytes = window.new_full((rows, total, MAX_BYTES), BREAK)
        for back in range(min(MAX_BYTES, total)):
            reversed_bytes[:, back:, back] = window[:, : total - back]
        reversed_bytes = reversed_bytes[:, total - ids.shape[1] :]
        found = torch.full_like(ids, -1)
        key = torch.zeros_like(found)
        for length, (keys, tokens, text) in enumerate(self._on(ids.device), 1):
            key = key + reversed_bytes[..., length - 1] * _power(length - 1)
            if not len(keys):
                continue
            place = torch.searchsorted(keys, key).clamp_max(len(keys) - 1)
            hit = (keys[place] == key) & (text[place] == reversed_bytes[..., :length]).all(-1)
            found = torch.where(hit, tokens[place], found)
        return found

    def _on(self, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
        if self.levels[0][0].device != device:
            self.levels = [(keys.to(device), tokens.to(device), text.to(device)) for keys, tokens, text in self.levels]
        return self.levels


def _power(exponent: int) -> int:
    """BASE^exponent modulo 2^64, as the signed number that int64 arithmetic wraps to."""
    value = pow(BASE, exponent, 1 << 64)
    return value - (1 << 64) if value >= 1 << 63 else value


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
