"""Finite scalar quantisation: each coordinate is bounded and rounded to one of L levels. Mentzer+ 2023, 2309.15505."""

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenkit.config import UserError
from tokenkit.tokenizers.whole_file import write_whole

Mode = Literal["P", "S", "M", "C"]
DigitOrder = Literal["msf", "lsf"]
MODES: dict[Mode, str] = {
    "P": "the paper's bound; even levels are asymmetric",
    "S": "symmetric; the end cells have half width",
    "M": "midpoints of equal cells under a near-uniform activation",
    "C": "LoopOS compatibility; the top digit of an even level is never reached",
}
KAPPA = 1.6  # 2 is exactly tanh; at 1.6 a unit-normal input is close to uniform
EPSILON = 1e-3


class FSQLayer(nn.Module):
    """Vectors of `len(levels)` coordinates ⇄ digits ⇄ integers; no codebook is ever stored.

    Every method takes a list of one vector and gives a list, or takes a tensor (..., d) and gives one. Arithmetic is
    float32 (float64 for float64 input) whatever autocast says, and int64.
    """

    def __init__(
        self,
        levels: Sequence[int],
        mode: Mode = "P",
        *,
        digit_order: DigitOrder = "msf",
        kappa: float = KAPPA,
        epsilon: float = EPSILON,
    ) -> None:
        """`digit_order` says which digit of an id is most significant: the first (msf) or the last (lsf).

        ValueError for no levels, a level under 2, and 2 in mode P, whose shift would be 3.8.
        """
        super().__init__()
        if not levels or any(level != int(level) or level < 2 for level in levels):
            raise ValueError(f"levels {list(levels)}: write one or more integers of at least 2")
        levels = [int(level) for level in levels]
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: write one of {', '.join(MODES)}")
        if mode == "P" and 2 in levels:
            raise ValueError(f"levels {levels}: mode P has no level of 2; use mode S or M")
        if not (0 < kappa < math.inf and abs(epsilon) < 0.1):
            raise ValueError(f"kappa {kappa}, epsilon {epsilon}: write a slope over 0 and a margin under 0.1")
        if math.prod(levels) >= 1 << 62:
            raise ValueError(f"levels {levels}: their product does not fit into 64 bits; use groups of fewer")
        self.levels, self.mode, self.digit_order, self.kappa, self.epsilon = levels, mode, digit_order, kappa, epsilon
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(_basis(levels, digit_order)), persistent=False)

    @property
    def num_dimensions(self) -> int:
        """Coordinates of a vector."""
        return len(self.levels)

    @property
    def total_vocab_size(self) -> int:
        """Number of codes: the product of the levels."""
        return math.prod(self.levels)

    @property
    def num_usable(self) -> int:
        """Codes that some finite input reaches; mode C loses the top digit of every even level."""
        return math.prod(level - (self.mode == "C" and level % 2 == 0) for level in self.levels)

    def bounded(self, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The bounded value in the units of the grid that `dequantize` gives; the straight-through gradient is its."""
        return self._in_grid_units(self._cell(z))

    def digits(self, z: Float[Tensor, "*b d"]) -> Int[Tensor, "*b d"]:
        """The digit of every coordinate, in [0, L)."""
        return self._round(self._cell(z))

    def forward(self, z: Float[Tensor, "*b d"]) -> tuple[Float[Tensor, "*b d"], Int[Tensor, "*b d"]]:
        """Grid values, through which gradients pass as through `bounded`, and digits."""
        with _full_precision(z):
            cell = self._cell(z)
            digits = self._round(cell.detach())
            soft = self._in_grid_units(cell)
            return soft + (self._values(digits, soft.dtype) - soft).detach(), digits

    def margin(self, z: Float[Tensor, "*b d"]) -> tuple[Float[Tensor, "*b d"], Int[Tensor, "*b d"]]:
        """How far each coordinate is from the nearest other cell, in cell widths, and that cell's digit."""
        cell, top = self._cell(z), self._levels - 1
        digits = self._round(cell)
        inside = cell - digits  # cell coordinates are such that digit c holds [c - 1/2, c + 1/2]
        below = torch.where(digits > 0, 0.5 + inside, torch.inf)
        above = torch.where(digits < top, 0.5 - inside, torch.inf)
        return torch.minimum(below, above).clamp_min(0), digits + torch.where(below < above, -1, 1)

    def quantize(self, vector: Any) -> Any:
        """Digits of vectors. ValueError for a wrong length or NaN; infinities give the extreme digits."""
        z = self._tensor(vector, torch.float32)
        if torch.isnan(z).any():
            raise ValueError("quantize: a coordinate is NaN")
        return _as_given(vector, self.digits(z))

    def dequantize(self, codes: Any) -> Any:
        """Grid values of digits, in [-1, 1]; un-normalised integers in mode C. ValueError for a digit out of range."""
        return _as_given(codes, self._values(self._checked(codes), torch.float32))

    def code_to_token_id(self, codes: Any) -> Any:
        """The integer of each tuple of digits, in [0, total_vocab_size). ValueError for a digit out of range."""
        digits = self._checked(codes)
        ids = (digits * self._basis).sum(-1)
        return _as_given(codes, ids)

    def token_id_to_code(self, ids: Any) -> Any:
        """The digits of integers. ValueError out of range."""
        index = torch.as_tensor(ids, device=self._basis.device)
        if index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"token_id_to_code: ids are integers, not {index.dtype}")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.total_vocab_size):
            raise ValueError(f"token_id_to_code: an id is outside 0 .. {self.total_vocab_size - 1}")
        return _as_given(ids, index.long().unsqueeze(-1) // self._basis % self._levels)

    def state(self) -> dict[str, Any]:
        """Plain values that `FSQLayer(**state)` makes this layer of again."""
        return {
            "levels": self.levels,
            "mode": self.mode,
            "digit_order": self.digit_order,
            "kappa": self.kappa,
            "epsilon": self.epsilon,
        }

    def save(self, path: Path | str) -> None:
        """Writes the layer as JSON."""
        write_whole(path, (json.dumps(self.state()) + "\n").encode())

    @classmethod
    def load(cls, path: Path | str) -> "FSQLayer":
        """The layer that `save` wrote; UserError for another file."""
        try:
            return cls(**json.loads(Path(path).read_text("utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a saved FSQLayer ({error})") from None

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"levels={self.levels}, mode={self.mode}"

    def _cell(self, z: Tensor) -> Tensor:
        """Bounded coordinates in cells: digit c holds [c - 1/2, c + 1/2]."""
        z = z if z.dtype == torch.float64 else z.float()
        levels = self._levels.to(z.dtype)
        if self.mode == "P":
            half, offset, shift = _paper_bound(self._levels, self.epsilon, z.dtype)
            return half * torch.tanh(z + shift) - offset + self._levels // 2
        if self.mode == "S":
            return (levels - 1) * (torch.tanh(z) + 1) / 2
        if self.mode == "M":
            return levels * torch.sigmoid(self.kappa * z) - 0.5
        bound = (levels - 1) / 2
        return torch.tanh(z) * bound + bound.floor()

    def _round(self, cell: Tensor) -> Tensor:
        if self.mode == "P":
            rounded = (cell - self._levels // 2).round() + self._levels // 2
        elif self.mode == "C":  # half away from zero
            centred = cell - (self._levels - 1) // 2
            rounded = torch.sign(centred) * torch.floor(centred.abs() + 0.5) + (self._levels - 1) // 2
        else:
            rounded = torch.floor(cell + 0.5)
        return torch.minimum(rounded.long().clamp_min(0), self._levels - 1)

    def _in_grid_units(self, cell: Tensor) -> Tensor:
        levels = self._levels.to(cell.dtype)
        if self.mode == "P":
            return (cell - self._levels // 2) / (self._levels // 2)
        if self.mode == "S":
            return 2 * cell / (levels - 1) - 1
        if self.mode == "M":
            return (2 * cell + 1) / levels - 1
        return cell - (self._levels - 1) // 2

    def _values(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        return self._in_grid_units(digits.to(dtype))

    def _checked(self, codes: Any) -> Tensor:
        digits = self._tensor(codes, torch.long)
        if digits.numel() and not ((digits >= 0) & (digits < self._levels)).all():
            raise ValueError(f"a digit is outside its levels {self.levels}")
        return digits

    def _tensor(self, values: Any, dtype: torch.dtype) -> Tensor:
        tensor = torch.as_tensor(values, device=self._levels.device)
        wanted_integers = dtype == torch.long
        if wanted_integers and tensor.is_floating_point():
            raise ValueError("digits are integers")
        tensor = tensor if tensor.dtype == torch.float64 and not wanted_integers else tensor.to(dtype)
        if tensor.ndim == 0 or tensor.shape[-1] != self.num_dimensions:
            raise ValueError(f"{list(tensor.shape)} values, where the last axis is {self.num_dimensions} dimensions")
        return tensor


def _basis(levels: Sequence[int], order: DigitOrder) -> list[int]:
    if order not in ("msf", "lsf"):
        raise ValueError(f"digit_order {order!r}: write msf or lsf")
    if order == "lsf":
        return [math.prod(levels[:i]) for i in range(len(levels))]
    return [math.prod(levels[i + 1 :]) for i in range(len(levels))]


def _paper_bound(levels: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    half = (levels.double() - 1) * (1 + epsilon) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0).double()
    return half.to(dtype), offset.to(dtype), torch.atanh(offset / half).to(dtype)


def _full_precision(z: Tensor) -> AbstractContextManager:
    return torch.autocast(z.device.type, enabled=False)


def _as_given(given: Any, tensor: Tensor) -> Any:
    return tensor if isinstance(given, Tensor) else tensor.tolist()
