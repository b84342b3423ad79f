"""Give a language model a new tokenizer, a smaller body or ternary weights, and keep what it knows."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokenkit.version import __version__

if TYPE_CHECKING:
    from tokenkit.align.spans import Alignment, align
    from tokenkit.tokenizers.base import Encoding, Tokenizer
    from tokenkit.tokenizers.load import load_tokenizer

__all__ = ["Alignment", "Encoding", "Tokenizer", "__version__", "align", "load_tokenizer"]

HOME = {  # imported when asked for: the command line's help does not wait for numpy
    "Alignment": "tokenkit.align.spans",
    "Encoding": "tokenkit.tokenizers.base",
    "Tokenizer": "tokenkit.tokenizers.base",
    "load_tokenizer": "tokenkit.tokenizers.load",
}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'tokenkit' has no attribute {name!r}")
    return vars(import_module(HOME[name]))[name]


class _Package(ModuleType):
    """`align` is the function, though importing the package of that name would bind the package to it."""

    @property
    def align(self) -> Any:
        return import_module("tokenkit.align.spans").align

    @align.setter
    def align(self, package: ModuleType) -> None:
        """What an import of `tokenkit.align` binds is left out."""


sys.modules[__name__].__class__ = _Package
