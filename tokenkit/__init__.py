"""Give a language model a new tokenizer, a smaller body or ternary weights, and keep what it knows."""

from typing import TYPE_CHECKING, Any

# Not lazy: the function's name is its package's, and the one that is bound last stays.
from tokenkit.align.spans import Alignment, align
from tokenkit.tokenizers.base import Encoding, Tokenizer
from tokenkit.version import __version__

if TYPE_CHECKING:
    from tokenkit.tokenizers.load import load_tokenizer

__all__ = ["Alignment", "Encoding", "Tokenizer", "__version__", "align", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """`load_tokenizer`, imported when it is asked for: the command line's help does not wait for it."""
    if name != "load_tokenizer":
        raise AttributeError(f"module 'tokenkit' has no attribute {name!r}")
    from tokenkit.tokenizers.load import load_tokenizer

    return load_tokenizer
