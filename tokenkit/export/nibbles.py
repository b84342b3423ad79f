"""Weights of 4 bits, eight to an int32: the `pack-quantized` layout of compressed-tensors, which vLLM reads too.

Per matrix of `out` rows and `in` columns, with `G = in / group_size` groups a row:

    weight_packed      int32 [out, in / 8]         nibble i of a word is column 8 c + i, plus 8
    weight_scale       float [out, G]              w = (q - z) s
    weight_zero_point  int32 [ceil(out / 8), G]    z of row 8 r + i is nibble i, plus 8
    weight_shape       int64 [2]
"""

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

LOWEST, HIGHEST = -8, 7
PER_WORD = 8


def quantise_groups(
    weight: Float[Tensor, "O I"], group_size: int, dtype: torch.dtype
) -> tuple[Int8[Tensor, "O I"], Float[Tensor, "O G"], Int8[Tensor, "O G"]]:
    """q, s and z of every group: least and largest value (and 0) are the ends of the 16 levels.

    s is rounded to `dtype` before q is taken, so q is the nearest level of what will be computed with.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    tiny = torch.finfo(dtype).tiny
    scale = ((high - low) / (HIGHEST - LOWEST)).clamp_min(tiny).to(dtype)
    zero = (LOWEST - low / scale.float()).round().clamp(LOWEST, HIGHEST)
    codes = ((groups / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(LOWEST, HIGHEST)
    return codes.flatten(-2).to(torch.int8), scale, zero.to(torch.int8)


def dequantise_groups(
    codes: Int8[Tensor, "O I"], scale: Float[Tensor, "O G"], zero: Int8[Tensor, "O G"]
) -> Float[Tensor, "O I"]:
    """The weights that the codes stand for, in the format of the scales."""
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).to(scale.dtype) - zero.unsqueeze(-1).to(scale.dtype)
    return (groups * scale.unsqueeze(-1)).flatten(-2)


def pack_nibbles(codes: Int8[Tensor, "R C"]) -> Int32[Tensor, "R W"]:
    """Eight values of a row to a word, the first in the lowest bits; a last word is filled up with zero bits."""
    unsigned = codes.int() - LOWEST
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[-1] % PER_WORD)).unflatten(-1, (-1, PER_WORD))
    shifts = torch.arange(0, 4 * PER_WORD, 4, dtype=torch.int32, device=codes.device)
    return (unsigned << shifts).sum(-1, dtype=torch.int32)


def packed_tensors(
    codes: Int8[Tensor, "O I"], scale: Float[Tensor, "O G"], zero: Int8[Tensor, "O G"]
) -> dict[str, Tensor]:
    """The four tensors of a matrix by the last part of their names."""
    return {
        "weight_packed": pack_nibbles(codes),
        "weight_scale": scale,
        "weight_zero_point": pack_nibbles(zero.T).T.contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
