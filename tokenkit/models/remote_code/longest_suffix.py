"""At every byte the longest token that ends there, for whole batches at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_BYTES = 16
BREAK = 256  # the first id that is no byte: no token goes across it
BASE = BREAK + 1


class LongestSuffix:
    """Tokens by their bytes; of a batch of byte ids, the longest that ends at every position.

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

    def __call__(self, ids: Tensor, before: Tensor | None = None) -> Tensor:
        """The token's index at each position, -1 where none ends there: int64 [B, T] for ids of that shape.

        `before` [B, W] are the ids that came first.
        """
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
