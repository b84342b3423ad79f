"""Strings read off embedding rows: what keeps rows near the latents that they were made of while a model is trained.

A linear map takes a row to grid values, and a copy of the auto-encoder's decoder says the bytes. Rows, map and this
copy are what moves. The encoder, the quantiser, the byte vectors and the tokenizer's own decoder stay: so do all ids.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from safetensors.torch import save
from torch import Tensor, nn

from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, scored_positions, symbols_of
from tokenkit.tokenizers.whole_file import write_whole

BATCH = 2048
RIDGE = 1e-3  # of the rows' mean square


class Speller(nn.Module):
    """Rows of bytes and pins → logits of their first bytes, as many as the auto-encoder reads."""

    def __init__(self, network: AutoEncoder, codec: Codec, rows: Float[Tensor, "V D"]) -> None:
        """Begins with the linear map that takes these rows closest to the grid values of their strings."""
        super().__init__()
        self.network = copy.deepcopy(network).to(rows.device).requires_grad_(False)
        self.network.decoder.requires_grad_(True)
        self.first = codec.layout.byte_base
        strings = codec.fixed_bytes[self.first :]
        self.symbols = symbols_of([string[: network.max_bytes] for string in strings], network.max_bytes)
        self.map = nn.Linear(rows.shape[1], self.network.latent.out_features, device=rows.device)
        self._fit(rows.detach()[self.first : self.first + len(strings)])

    def forward(self, rows: Float[Tensor, "U D"]) -> Float[Tensor, "U T S"]:
        """Logits of the 256 bytes and the end, at every position."""
        return self.network.logits(self._values(rows.to(self.map.weight.dtype)))

    def labels(self, ids: Int[ndarray, "U"]) -> Int[Tensor, "U T"]:
        """The symbols of ids that stand for bytes; below 0 where nothing is scored."""
        symbols = self.symbols[torch.from_numpy(ids) - self.first]
        return symbols.masked_fill(~scored_positions(symbols), -1)

    def speaks(self, ids: Int[ndarray, "*n"]) -> Bool[ndarray, "*n"]:
        """Which ids are bytes or pins."""
        return (ids >= self.first) & (ids < self.first + len(self.symbols))

    @torch.no_grad()
    def exact(self, rows: Float[Tensor, "V D"]) -> float:
        """Share of bytes and pins whose first bytes are read off their rows without a mistake."""
        right = 0
        for start in range(0, len(self.symbols), BATCH):
            symbols = self.symbols[start : start + BATCH].to(rows.device)
            said = self(rows[self.first + start : self.first + start + len(symbols)]).argmax(-1)
            right += int(((said == symbols) | ~scored_positions(symbols)).all(1).sum())
        return right / len(self.symbols)

    def learnt(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save(self, path: Path) -> None:
        """Writes what is trained as one safetensors file."""
        write_whole(path, save({name: p.detach().cpu().contiguous() for name, p in self.learnt().items()}))

    def _values(self, rows: Float[Tensor, "U D"]) -> Float[Tensor, "U G d"]:
        return self.map(rows).unflatten(-1, (self.network.groups, self.network.quantizer.num_dimensions))

    @torch.no_grad()
    def _fit(self, rows: Float[Tensor, "N D"]) -> None:
        blocks = [self.network.digits(block.to(rows.device)) for block in self.symbols.split(BATCH)]
        values = self.network.quantizer.dequantize(torch.cat(blocks)).flatten(1).double()
        middle, target = rows.double().mean(0), values.mean(0)
        centred = rows.double() - middle
        gram = centred.T @ centred
        gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
        weight = torch.linalg.solve(gram, centred.T @ (values - target)).T
        self.map.weight.copy_(weight)
        self.map.bias.copy_(target - weight @ middle)


def drawn_ids(
    seen: Sequence[Int[ndarray, "*n"]], speller: Speller, most: int, seed: Sequence[int]
) -> Int[ndarray, "U"]:
    """At most `most` of the distinct bytes and pins among ids, in rising order."""
    ids = np.unique(np.concatenate([part.ravel() for part in seen]))
    ids = ids[speller.speaks(ids)]
    return ids if len(ids) <= most else np.sort(np.random.default_rng(seed).choice(ids, most, replace=False))
