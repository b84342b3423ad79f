"""What `torchrun` says to a process that it started. Nothing heavy is imported here: the command line asks as well."""

import os


def started() -> int:
    """Processes that `torchrun` started for this run; 0 where it was not started by it."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else 0


def rank() -> int:
    """The number of this process among those; 0 without them."""
    return int(os.environ["RANK"]) if started() else 0
