"""Ternary matrices in the layout of transformers' "bitnet" checkpoints: four trits a byte, block-strided rows."""

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from tokenkit.config import UserError

PER_BYTE = 4  # trits


def pack_trits(trits: Int8[Tensor, "O I"], layer: str) -> UInt8[Tensor, "R I"]:
    """Bytes of a matrix of -1, 0 and 1: byte [r, c] holds rows r, R + r, 2R + r and 3R + r, two bits each, low bits
    first, R = O / 4. A trit is stored as itself plus 1. `layer` is for messages; `trits` stays as it is."""
    rows, columns = trits.shape
    if rows % PER_BYTE:
        raise UserError(
            f"{layer}: {rows} output features, and only a multiple of 4 can be packed; take a width divisible by 4, or "
            "leave the layer out with ternary.skip"
        )
    codes = (trits + 1).to(torch.uint8).view(PER_BYTE, rows // PER_BYTE, columns)
    packed = codes[0].clone()
    for place in range(1, PER_BYTE):
        packed |= codes[place] << (2 * place)
    return packed


def unpack_trits(packed: UInt8[Tensor, "R I"]) -> Int8[Tensor, "O I"]:
    """The matrix that `pack_trits` packed."""
    codes = torch.cat([(packed >> (2 * place)) & 3 for place in range(PER_BYTE)])
    return codes.to(torch.int8) - 1
