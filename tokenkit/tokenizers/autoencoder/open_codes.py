"""Codes of the auto-encoder as spellings of byte strings: proposed by the encoder, used only if the decoder agrees."""

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenkit.tokenizers.autoencoder.network import AutoEncoder, chunks_of, decoded_right, scored_positions, symbols_of

DECODER_MARGIN = 0.05  # of the right symbol's logit over the next
ENCODER_MARGIN = 1e-4  # cell widths from the border of a cell
NEAREST_DIGITS = 6  # that a repair may flip
BATCH = 2048


class OpenCodes:
    """Verified spellings of strings of at most `max_bytes` bytes as min_groups .. groups codes, and what codes say.

    Both margins make the answer the same for any batch size, number of threads and kind of processor.
    """

    def __init__(
        self,
        network: AutoEncoder,
        *,
        decoder_margin: float = DECODER_MARGIN,
        encoder_margin: float = ENCODER_MARGIN,
        repair: bool = False,
    ) -> None:
        """`repair` tries the 63 codes around the encoder's where the decoder does not agree (analysis by synthesis)."""
        self.network = network.eval().requires_grad_(False)
        self.decoder_margin, self.encoder_margin, self.repair = decoder_margin, encoder_margin, repair
        self._gate = threading.Semaphore()  # threads take turns: the library has threads of its own

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the turns that threads take."""
        return {name: value for name, value in self.__dict__.items() if name != "_gate"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._gate = threading.Semaphore()

    @property
    def num_codes(self) -> int:
        """Codes of one group."""
        return self.network.quantizer.total_vocab_size

    @property
    def max_bytes(self) -> int:
        """Longest string that can be spelled."""
        return self.network.max_bytes

    @property
    def groups(self) -> int:
        """Codes of the longest spelling."""
        return self.network.groups

    def spell(self, strings: Sequence[bytes]) -> list[tuple[int, ...] | None]:
        """The shortest run of codes that surely decodes to each string; None where there is none."""
        found: list[tuple[int, ...] | None] = []
        for start in range(0, len(strings), BATCH):
            with torch.inference_mode(), self._gate:
                found += self._spell(strings[start : start + BATCH])
        return found

    def read(self, runs: Sequence[tuple[int, ...]]) -> list[bytes]:
        """What the decoder makes of each run of at most `groups` codes; it makes something of any."""
        found: list[bytes] = []
        for start in range(0, len(runs), BATCH):
            with torch.inference_mode(), self._gate:
                found += self._read(runs[start : start + BATCH])
        return found

    def learned(self, strings: Sequence[bytes], groups: int | None = None) -> list[bytes]:
        """What becomes of strings by encoder, quantiser and decoder alone: nothing is checked."""
        found: list[bytes] = []
        kept = groups or self.groups
        for start in range(0, len(strings), BATCH):
            with torch.inference_mode(), self._gate:
                digits = self.network.digits(symbols_of(strings[start : start + BATCH], self.max_bytes))
                found += chunks_of(self._symbols(digits, torch.full((len(digits),), kept)))
        return found

    def confidence(self, strings: Sequence[bytes]) -> dict[str, Any]:
        """How sure the decoder is of what it makes of strings: probabilities of the likeliest symbols it scores."""
        with torch.inference_mode(), self._gate:
            symbols = symbols_of(strings, self.max_bytes)
            logits = self.network.logits(self.network.quantizer.dequantize(self.network.digits(symbols)))
            best = logits.softmax(-1).amax(-1)[scored_positions(symbols)].tolist()
        return {
            "average": sum(best) / max(1, len(best)),
            "minimum": min(best, default=1.0),
            "below_half": sum(value < 0.5 for value in best),
            "positions": best,
        }

    def _spell(self, strings: Sequence[bytes]) -> list[tuple[int, ...] | None]:
        symbols = symbols_of(strings, self.max_bytes)
        latents = self.network.latents(symbols)
        margins, neighbours = self.network.quantizer.margin(latents)
        digits = self.network.quantizer.digits(latents)
        firm = (margins >= self.encoder_margin).flatten(1).all(1)
        kept = torch.zeros(len(strings), dtype=torch.long)
        for groups in range(self.network.config.min_groups, self.groups + 1):
            left = (kept == 0).nonzero().squeeze(1)
            if len(left):
                right = self._agrees(digits[left], symbols[left], groups)
                kept[left[right]] = groups
        kept[~firm] = 0
        failed = (kept == 0) & firm  # what lies on a border is no spelling on another machine
        if self.repair and failed.any():
            for rows in failed.nonzero().squeeze(1).split(BATCH // 2**NEAREST_DIGITS):
                fixed, right = self._repaired(symbols[rows], digits[rows], margins[rows], neighbours[rows])
                digits[rows[right]], kept[rows[right]] = fixed[right], self.groups
        codes = self.network.quantizer.code_to_token_id(digits)
        return [tuple(row[:n]) if n else None for row, n in zip(codes.tolist(), kept.tolist())]

    def _agrees(self, digits: Int[Tensor, "B G d"], symbols: Int[Tensor, "B T"], groups: int) -> Bool[Tensor, "B"]:
        kept = torch.full((len(digits),), groups)
        logits = self.network.logits(self.network.quantizer.dequantize(digits), kept)
        return decoded_right(logits, symbols, self.decoder_margin)

    def _repaired(
        self,
        symbols: Int[Tensor, "B T"],
        digits: Int[Tensor, "B G d"],
        margins: Float[Tensor, "B G d"],
        neighbours: Int[Tensor, "B G d"],
    ) -> tuple[Int[Tensor, "B G d"], Bool[Tensor, "B"]]:
        """Digits near the encoder's, and whether they decode to the string: the fewest flips of the nearest digits."""
        flat, near = digits.flatten(1), margins.flatten(1).argsort(1)[:, :NEAREST_DIGITS]
        places = range(near.shape[1])
        subsets = [s for size in range(1, len(places) + 1) for s in itertools.combinations(places, size)]
        tried = flat.unsqueeze(1).repeat(1, len(subsets), 1)
        flipped = neighbours.flatten(1).gather(1, near)
        for number, subset in enumerate(subsets):
            tried[:, number].scatter_(1, near[:, list(subset)], flipped[:, list(subset)])
        asked = symbols.repeat_interleave(len(subsets), 0)
        right = self._agrees(tried.view(-1, *digits.shape[1:]), asked, self.groups).view(len(digits), -1)
        first = right.int().argmax(1)
        return tried[torch.arange(len(digits)), first].view_as(digits), right.any(1)

    def _read(self, runs: Sequence[tuple[int, ...]]) -> list[bytes]:
        kept = torch.tensor([len(run) for run in runs])
        codes = torch.tensor([[*run, *[0] * (self.groups - len(run))] for run in runs]).view(len(runs), self.groups)
        return chunks_of(self._symbols(self.network.quantizer.token_id_to_code(codes), kept))

    def _symbols(self, digits: Int[Tensor, "B G d"], kept: Int[Tensor, "B"]) -> Int[Tensor, "B T"]:
        return self.network.logits(self.network.quantizer.dequantize(digits), kept).argmax(-1)
