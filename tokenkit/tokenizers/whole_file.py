"""A file is written whole or not at all: a temporary name in the same folder, then a rename."""

import os
from pathlib import Path

from tokenkit.config import UserError


def write_whole(path: Path | str, data: bytes) -> None:
    """Writes a file, its folder too where there is none; UserError where it cannot be written, and then no file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def sync(path: Path) -> None:
    """Makes what was written to a file, or the renames in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
