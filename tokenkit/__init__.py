"""Give a language model a new tokenizer, a smaller body or ternary weights, and keep what it knows."""

from tokenkit.version import __version__

__all__ = ["__version__"]
