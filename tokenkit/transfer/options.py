"""Checks of options of initialisers, in the words of a run file."""

from tokenkit.config import UserError


def check_positive(initializer: str, **options: int | float) -> None:
    """UserError where an option is not above 0."""
    for name, value in options.items():
        if value <= 0:
            least = "a whole number from 1" if isinstance(value, int) else "a number above 0"
            raise UserError(f"transfer.{initializer}.{name}: {value}, where {least} is needed")
