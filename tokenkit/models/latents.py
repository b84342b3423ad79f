"""Embedding rows made of what an auto-encoder knows of each string: strings that are spelled alike begin alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.load import head_matrix, input_matrix, output_head, quiet, write_token_ids
from tokenkit.tokenizers.autoencoder.chunkers import cut
from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, symbols_of

Method = Literal["digit_sum", "decoder"]
REACH = 0.5  # of a digit's vectors: how far apart two grid values in [-1, 1] are that have little in common
BATCH = 4096
LOOKED_AT = 4096  # pins, the most used ones, whose neighbours are searched


@dataclass(frozen=True)
class Likeness:
    """Mean cosine of the rows of strings one byte apart, and of random pairs; None where there are no such pairs."""

    neighbours: float | None
    random: float | None
    pairs: int


@dataclass(frozen=True)
class LatentReport:
    """Rows that a model was given: how many, their root mean square before and after, and how alike they are."""

    method: Method
    rows: int
    std: float
    rms: float
    mean: float
    likeness: Likeness


@torch.no_grad()
def latent_rows(
    network: AutoEncoder, codec: Codec, width: int, *, method: Method = "decoder", std: float = 0.02, seed: int = 0
) -> Float[Tensor, "V D"]:
    """A row per id that is no code, each of root mean square `std`, about zero on average.

    Pins: `digit_sum` adds a vector for every digit of every code, and vectors of close digits are alike; `decoder`
    projects what the first block of the decoder makes of the grid values. Bytes: the table of byte vectors, projected.
    Special tokens: normal noise. A pin longer than the network reads is the mean of its parts.
    """
    generator = torch.Generator().manual_seed(seed)
    layout, pieces = codec.layout, codec.pins.pieces
    special = torch.randn(layout.first_regular_id, width, generator=generator) * std
    table = network.encoder.table
    assert isinstance(table, nn.Embedding)
    single = _projected(table.weight[:256].float().cpu(), width, generator)
    parts = [cut(piece, network.max_bytes) for piece in pieces]
    pinned = torch.zeros(0, width)
    if parts:
        flat = [part for several in parts for part in several]
        found = _features(network, flat, width, method, generator)
        lengths = torch.tensor([len(several) for several in parts])
        pinned = torch.segment_reduce(found, "mean", lengths=lengths)
    return torch.cat([special, _scaled(single, std), _scaled(pinned, std)])


def smooth_table(levels: int, width: int, generator: torch.Generator) -> Float[Tensor, "L D"]:
    """A vector of unit-normal entries for every digit: alike for close digits, zero on average over all."""
    place = torch.linspace(-1, 1, levels, dtype=torch.float64)
    kernel = torch.exp(-((place[:, None] - place) / REACH).square() / 2) + 1e-6 * torch.eye(levels, dtype=torch.float64)
    noise = torch.randn(levels, width, generator=generator, dtype=torch.float64)
    table = torch.linalg.cholesky(kernel) @ noise
    table = table - table.mean(0)
    return (table / table.square().mean().sqrt()).float()


def likeness(rows: Float[Tensor, "V D"], codec: Codec, seed: int = 0) -> Likeness:
    """How alike rows of pins are whose strings are one byte apart, and rows of random pins."""
    base, pieces = codec.layout.pin_base, codec.pins.pieces[:LOOKED_AT]
    pairs = _one_byte_apart(pieces)
    if not pairs or len(pieces) < 2:
        return Likeness(None, None, len(pairs))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(pieces), (2, max(1000, len(pairs))), generator=generator)
    drawn = drawn[:, drawn[0] != drawn[1]]
    near = torch.tensor(pairs).T
    own = rows[base : base + len(pieces)].float()
    cosines = [float(torch.cosine_similarity(own[a], own[b]).mean()) for a, b in (near, drawn)]
    return Likeness(cosines[0], cosines[1], len(pairs))


def resize_and_init(
    model: PreTrainedModel, tokenizer: LearnedTokenizer, *, method: Method = "decoder", seed: int = 0
) -> LatentReport:
    """Gives the model, in place, one row per id of a compact tokenizer, in the scale of the rows that it had.

    A tied model stays tied; otherwise the head gets rows of the same make, drawn anew.
    """
    if tokenizer.codec.layout.num_codes:
        raise UserError(f"{tokenizer.name}: its codes have no rows; attach the factorised tables, or take kind=compact")
    network, size = tokenizer.network(), tokenizer.vocab_size
    embedding, head = input_matrix(model), head_matrix(model)
    tied, bias = head is embedding, output_head(model).bias

    def made(old: Tensor, seed: int) -> Float[Tensor, "V D"]:
        rows = latent_rows(network, tokenizer.codec, old.shape[1], method=method, std=rms(old), seed=seed)
        added = torch.randn(size - len(rows), old.shape[1], generator=torch.Generator().manual_seed(seed)) * rms(old)
        return torch.cat([rows, added])

    std, new_input, new_head = rms(embedding), made(embedding, seed), None if tied else made(head, seed + 1)
    with torch.random.fork_rng([]), quiet(), torch.no_grad():
        model.resize_token_embeddings(size, mean_resizing=False)
        input_matrix(model).copy_(new_input)
        if new_head is not None:
            head_matrix(model).copy_(new_head)
        if bias is not None:
            output_head(model).bias.zero_()
    write_token_ids(model, tokenizer)
    found = likeness(new_input, tokenizer.codec, seed)
    return LatentReport(method, size, std, rms(new_input), float(new_input.mean()), found)


def rms(rows: Float[Tensor, "V D"]) -> float:
    """Root mean square of all entries."""
    return float(rows.detach().float().square().mean().sqrt())


def _features(
    network: AutoEncoder, strings: Sequence[bytes], width: int, method: Method, generator: torch.Generator
) -> Float[Tensor, "N D"]:
    network = network.eval()
    device = network.latent.weight.device
    blocks = [strings[start : start + BATCH] for start in range(0, len(strings), BATCH)]
    digits = torch.cat([network.digits(symbols_of(block, network.max_bytes).to(device)) for block in blocks])
    if method == "digit_sum":
        levels = network.quantizer.levels * network.groups
        table = torch.cat([smooth_table(level, width, generator) for level in levels])
        return nn.functional.embedding_bag(places(digits.flatten(1).cpu(), levels), table, mode="sum")
    values = network.quantizer.dequantize(digits).flatten(1)
    found = torch.cat([network.decoder.features(block) for block in values.split(BATCH)])
    return _projected(found.float().cpu(), width, generator)


def places(digits: Int[Tensor, "*b d"], levels: Sequence[int]) -> Int[Tensor, "*b d"]:
    """Where every digit's vector stands in a table of all levels of all digits, one after the other."""
    begins = list(accumulate(levels, initial=0))[:-1]
    return digits + torch.tensor(begins, device=digits.device)


def _projected(features: Float[Tensor, "N H"], width: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
    """Centred features through a random matrix of orthonormal rows or columns: angles stay, or nearly so."""
    size = features.shape[1]
    basis, _ = torch.linalg.qr(torch.randn(max(size, width), min(size, width), generator=generator))
    return (features - features.mean(0)) @ (basis if size >= width else basis.T)


def _scaled(rows: Float[Tensor, "N D"], std: float) -> Float[Tensor, "N D"]:
    """Rows about their mean, each of root mean square `std`."""
    rows = rows - rows.mean(0) if len(rows) > 1 else rows
    return rows * (std / rows.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12))


def _one_byte_apart(pieces: Sequence[bytes]) -> list[tuple[int, int]]:
    """Pairs of pieces of which one is the other with a byte replaced, or with a byte more."""
    index, pairs = {piece: number for number, piece in enumerate(pieces)}, set()
    gaps: dict[tuple[int, bytes], int] = {}
    for number, piece in enumerate(pieces):
        for place in range(len(piece)):
            rest = piece[:place] + piece[place + 1 :]
            if rest in index:
                pairs.add((index[rest], number))
            other = gaps.setdefault((place, rest), number)
            if other != number:
                pairs.add((other, number))
    return sorted(pairs)
