"""Which ids mean what: special tokens, the 256 bytes, pinned strings, and codes of the auto-encoder."""

from dataclasses import dataclass, field

SPECIALS = ("<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>")
PAD, UNK, BOS, EOS, USER, ASSISTANT, SYSTEM = range(7)
FIRST_REGULAR_ID = 64


@dataclass(frozen=True)
class IdLayout:
    """Ids in order: special tokens and reserved ones, bytes, pins, and twice the codes (followed by more; last)."""

    num_pins: int
    num_codes: int = 0
    """Codes of one group; 0 in compact mode, which has no ids for them."""
    first_regular_id: int = FIRST_REGULAR_ID
    names: tuple[str, ...] = field(default=())
    """Literals of reserved ids that were given a meaning, from `<|system|>` on."""

    @property
    def byte_base(self) -> int:
        """The id of byte 0."""
        return self.first_regular_id

    @property
    def pin_base(self) -> int:
        """The id of the first pinned string."""
        return self.byte_base + 256

    @property
    def open_base(self) -> int:
        """The id of the first code; the number of ids in compact mode."""
        return self.pin_base + self.num_pins

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return self.open_base + 2 * self.num_codes

    @property
    def special_names(self) -> list[str]:
        """The literal of every id below `first_regular_id`."""
        known = [*SPECIALS, *self.names][: self.first_regular_id]
        return [*known, *(f"<|reserved_{index}|>" for index in range(len(known), self.first_regular_id))]

    def is_special(self, index: int) -> bool:
        """Whether an id is a special token or reserved for one."""
        return 0 <= index < self.first_regular_id

    def is_open(self, index: int) -> bool:
        """Whether an id is a code of the auto-encoder."""
        return self.open_base <= index < self.vocab_size

    def tier(self, index: int) -> str:
        """special, byte, pin or open."""
        if index < self.byte_base:
            return "special"
        return "byte" if index < self.pin_base else "pin" if index < self.open_base else "open"


class FixedRoles:
    """The four ids that the checklist's tokenizers have in common."""

    def get_pad_token(self) -> int:
        """The id that fills a batch."""
        return PAD

    def get_unk_token(self) -> int:
        """The id of what is unknown; a lossless tokenizer never gives it."""
        return UNK

    def get_bos_token(self) -> int:
        """The id that begins a text."""
        return BOS

    def get_eos_token(self) -> int:
        """The id that ends a text."""
        return EOS
