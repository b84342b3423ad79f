"""`tokenkit check-loss`: what every loss is held to, on the losses of one file."""

import difflib
from pathlib import Path

from rich.table import Table

from tokenkit.config import UserError
from tokenkit.objective import losses_config
from tokenkit.plugins.checks import Check, check_loss
from tokenkit.plugins.load import load_plugin


def check_losses(path: Path, name: str | None = None) -> dict[str, list[Check]]:
    """Loss → its checks, of every loss of a file or of one."""
    losses = load_plugin(path).losses
    if name is not None and name not in losses:
        close = difflib.get_close_matches(name, losses, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(losses)}"
        raise UserError(f"{path}: no loss called {name!r}; {hint}")
    losses_config(losses)  # its options must be keys of a run file
    return {key: check_loss(entry) for key, entry in losses.items() if name in (None, key)}


def table(checks: dict[str, list[Check]]) -> Table:
    """The checks for a terminal."""
    shown = Table("loss", "check", "", "what was seen", box=None, pad_edge=False)
    for name, found in checks.items():
        for i, check in enumerate(found):
            shown.add_row("" if i else name, check.name, "ok" if check.passed else "FAILS", check.text)
    return shown


def failures(path: Path, checks: dict[str, list[Check]]) -> list[str]:
    """One line for every check that failed."""
    return [f"{path}: {name}: {c.name}: {c.text}" for name, found in checks.items() for c in found if not c.passed]
