"""Which tokens begin something new, so that the end of the chunk before them may be trusted."""

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from tokenkit.tokenizers.base import Tokenizer


def boundary_tokens(tokenizer: Tokenizer) -> Bool[ndarray, "V"]:
    """True for tokens whose first byte is a space, tab or newline, and for special tokens."""
    boundary = _begins(tokenizer, b" \t\n")
    boundary[list(tokenizer.special_ids)] = True
    return boundary


def space_tokens(tokenizer: Tokenizer) -> Bool[ndarray, "V"]:
    """True for tokens whose first byte is a space."""
    return _begins(tokenizer, b" ")


def _begins(tokenizer: Tokenizer, first: bytes) -> Bool[ndarray, "V"]:
    return np.array([spelled != b"" and spelled[0] in first for spelled in tokenizer.token_bytes], np.bool_)
