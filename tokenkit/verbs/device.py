"""Where a run computes."""

from typing import Literal

import torch

from tokenkit.config import UserError


def pick_device(name: Literal["auto", "cpu", "cuda"], key: str = "device") -> str:
    """The device of a run, whose `key` names it; UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}: cuda, but torch sees no GPU here; write {key}=cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
