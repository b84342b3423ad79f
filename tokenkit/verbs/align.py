"""`tokenkit align`: two tokenisations of one text, side by side."""

from tokenkit.config import Config


class AlignRun(Config):
    """A run file of `tokenkit align`."""

    teacher: str
    """A folder, a tokenizer.json, a hub id, or `byte`."""
    student: str
    text: str
