"""Weights of 4 bits, eight to an int32: the `pack-quantized` layout of compressed-tensors, which vLLM reads too.

Per matrix of `out` rows and `in` columns:

    weight_packed   int32 [out, in / 8]             bits 4 i to 4 i + 3 of word c: column 8 c + i, plus 8
    weight_scale    float [out, in / group_size]    what a code from -8 to 7 is multiplied by
    weight_shape    int64 [2]

Levels with a zero point would lose a little less, but transformers 5.23 with compressed-tensors 0.20 cannot load them.
"""

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

LOWEST, HIGHEST = -8, 7
PER_WORD = 8
SHARES = [1 - 0.02 * step for step in range(26)]  # of the largest weight of a group that its largest level stands for


def quantise_groups(
    weight: Float[Tensor, "O I"], group_size: int, dtype: torch.dtype
) -> tuple[Int8[Tensor, "O I"], Float[Tensor, "O G"]]:
    """Codes, and the scale of every group that has the least squared error of all that are tried.

    A scale may be negative: then there is one level more above zero than below. Scales are rounded to `dtype` before
    codes are taken, so a code is the nearest level of what will be computed with.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny * HIGHEST)
    best = torch.full_like(largest, torch.inf)
    codes, scales = torch.zeros_like(groups), torch.ones_like(largest)
    for share in SHARES:
        for sign in (1, -1):
            scale = (largest * (sign * share / HIGHEST)).to(dtype).float()
            tried = (groups / scale).round().clamp(LOWEST, HIGHEST)
            error = (tried * scale - groups).square().sum(-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            codes, scales = torch.where(better, tried, codes), torch.where(better, scale, scales)
    return codes.flatten(-2).to(torch.int8), scales.squeeze(-1).to(dtype)


def dequantise_groups(codes: Int8[Tensor, "O I"], scale: Float[Tensor, "O G"]) -> Float[Tensor, "O I"]:
    """The weights that the codes stand for, in the format of the scales."""
    return (codes.unflatten(-1, (scale.shape[-1], -1)).to(scale.dtype) * scale.unsqueeze(-1)).flatten(-2)


def pack_nibbles(codes: Int8[Tensor, "R C"]) -> Int32[Tensor, "R W"]:
    """Eight values of a row to a word, the first in the lowest bits; a last word is filled up with zero bits."""
    unsigned = codes.int() - LOWEST
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[-1] % PER_WORD)).unflatten(-1, (-1, PER_WORD))
    shifts = torch.arange(0, 4 * PER_WORD, 4, dtype=torch.int32, device=codes.device)
    return (unsigned << shifts).sum(-1, dtype=torch.int32)


def packed_tensors(codes: Int8[Tensor, "O I"], scale: Float[Tensor, "O G"]) -> dict[str, Tensor]:
    """The three tensors of a matrix by the last part of their names."""
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    return {"weight_packed": pack_nibbles(codes), "weight_scale": scale, "weight_shape": shape}
