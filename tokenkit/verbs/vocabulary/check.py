"""`tokenkit vocabulary check`: the tokens that no text becomes, and why."""

from typing import Any

from pydantic import Field

from tokenkit.config import Config
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.tokenizers.surgery.reachable import UNREACHABLE, Reach, reachability


class VocabularyCheckRun(Config):
    """A run file of `tokenkit vocabulary check`."""

    tokenizer: TokenizerSpec
    """Name, folder or file of a BPE or Unigram tokenizer."""
    examples: int = Field(5, ge=0)
    """Tokens that are shown of every kind."""


def check_vocabulary(run: VocabularyCheckRun) -> dict[str, Any]:
    """How many tokens are reached and how, and how many are not and why, with the first of each."""
    tokenizer = load_tokenizer(run.tokenizer)
    found = reachability(tokenizer)
    shown = {kind: found.ids(kind)[: run.examples] for kind in (Reach.WHOLE_WORD, *UNREACHABLE)}
    return {
        "tokenizer": tokenizer.name,
        "ids": tokenizer.vocab_size,
        "kinds": found.counts(),
        "unreachable": len(found.unreachable),
        "examples": {
            kind.name.lower(): {str(i): tokenizer.token_bytes[i].decode(errors="replace") for i in ids}
            for kind, ids in shown.items()
            if ids
        },
    }
