"""Which tokens begin something new, so that the end of the chunk before them may be trusted."""

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from tokenkit.tokenizers.base import Tokenizer


def boundary_tokens(tokenizer: Tokenizer) -> Bool[ndarray, "V"]:
    """True for tokens whose first byte is a space, tab or newline, and for special tokens."""
    boundary = np.array([spelled[:1] in (b" ", b"\t", b"\n") for spelled in tokenizer.token_bytes], np.bool_)
    boundary[list(tokenizer.special_ids)] = True
    return boundary
