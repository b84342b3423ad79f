"""`tokenkit tokenizer encode` and `decode`: text and ids of a learned tokenizer, one at a time."""

import re
import sys
from pathlib import Path

from tokenkit.config import Config, UserError
from tokenkit.tokenizers.autoencoder.package import Kind
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer


class CodeRun(Config):
    """Which tokenizer."""

    model: Path
    """The folder of a learned tokenizer, or a checkpoint of its training."""
    kind: Kind | None = None
    """compact or open; by default what the folder says."""


def encode_text(run: CodeRun, text: str, *, special: bool = False) -> list[int]:
    """The ids of a text; `@FILE` stands for the text of a file, `-` for standard input."""
    if text == "-":
        data = sys.stdin.buffer.read()
    elif text.startswith("@"):
        try:
            data = Path(text[1:]).read_bytes()
        except OSError as error:
            raise UserError(f"{text[1:]}: cannot be read ({error.strerror}); write a file behind @") from None
    else:
        data = text.encode("utf-8", "surrogatepass")
    tokenizer = AutoEncoderTokenizer.load(run.model, run.kind)
    ids = tokenizer.encode_bytes(data)
    return [tokenizer.get_bos_token(), *ids, tokenizer.get_eos_token()] if special else ids


def decode_ids(run: CodeRun, written: str) -> str:
    """The text of ids, which are written with spaces or commas between them, with or without brackets."""
    words = re.sub(r"[\[\],]", " ", written).split()
    odd = next((word for word in words if not word.isdecimal()), None)
    if odd is not None or not words:
        raise UserError(f"ids {written!r}: {odd or 'nothing'} is no id; write 71 5034, or [71, 5034]")
    return AutoEncoderTokenizer.load(run.model, run.kind).decode([int(word) for word in words])
