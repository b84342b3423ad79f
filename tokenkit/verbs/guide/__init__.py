"""The user guide of the older toolkit: its commands and keys, as verbs and keys here. docs/guide_keys.md shows them."""

from tokenkit.verbs.guide.commands import GUIDES
from tokenkit.verbs.guide.reading import Command, command_of

__all__ = ["GUIDES", "Command", "command_of"]
