"""Ids as strings that people can read and that can be read back: `<0x41>`, ` the`, `<c:4.2.5>`."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tokenkit.tokenizers.autoencoder.ids import IdLayout

if TYPE_CHECKING:
    from tokenkit.tokenizers.autoencoder.quantizer import FSQLayer

BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
CODE = re.compile(r"<c:([0-9.]+)(\+?)>")  # + where more codes of the same string follow


class Vocabulary(Mapping[str, int]):
    """String → id of every id. Codes are written when they are asked for, so millions of them take no room."""

    def __init__(self, layout: IdLayout, fixed_bytes: list[bytes], quantizer: "FSQLayer | None" = None) -> None:
        """`quantizer` is that of the codes, where the layout has any."""
        self._layout, self._quantizer = layout, quantizer
        specials = layout.special_names
        taken = set(specials)
        self._fixed = specials + [_surface(piece, taken) for piece in fixed_bytes[layout.byte_base :]]
        self._ids = {surface: index for index, surface in enumerate(self._fixed)}

    def __len__(self) -> int:
        return self._layout.vocab_size

    def __iter__(self) -> Iterator[str]:
        return map(self.surface, range(len(self)))

    def __getitem__(self, surface: str) -> int:
        index = self._ids.get(surface)
        return self._code(surface) if index is None else index

    def copy(self) -> "Vocabulary":
        """Itself: nothing about it changes."""
        return self

    def surface(self, index: int) -> str:
        """The string of an id; IndexError where there is no such id."""
        if 0 <= index < len(self._fixed):
            return self._fixed[index]
        if self._quantizer is None or not self._layout.is_open(index):
            raise IndexError(index)
        final, code = divmod(index - self._layout.open_base, self._layout.num_codes)
        digits = ".".join(map(str, self._quantizer.token_id_to_code(code)))
        return f"<c:{digits}{'' if final else '+'}>"

    def _code(self, surface: str) -> int:
        found = CODE.fullmatch(surface)
        if found is None or self._quantizer is None:
            raise KeyError(surface)
        try:
            code = int(self._quantizer.code_to_token_id([int(digit) for digit in found[1].split(".")]))
        except ValueError:
            raise KeyError(surface) from None
        return self._layout.open_base + (0 if found[2] else self._layout.num_codes) + code


def _surface(piece: bytes, taken: set[str]) -> str:
    """The text of a piece, but where it has none, or one that means something else, the values of its bytes."""
    values = "".join(f"<0x{byte:02X}>" for byte in piece)
    if len(piece) == 1:
        return values
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return values
    return values if text in taken or BYTES.fullmatch(text) or CODE.fullmatch(text) else text
