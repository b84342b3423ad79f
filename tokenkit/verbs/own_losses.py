"""The files of a run's own losses: read before its `losses:` section is, and kept in the run folder."""

from pathlib import Path
from typing import Any

from tokenkit.config import UserError
from tokenkit.plugins.load import Plugin, load_plugins
from tokenkit.train.folder import write_text

KEPT = "plugins"


def named_plugins(values: dict[str, Any]) -> tuple[Plugin, ...]:
    """What the `plugins:` of plain values hold; none where they are no list of paths, which the schema complains of."""
    paths = values.get("plugins")
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str | Path) for path in paths):
        return ()
    return load_plugins(Path(path) for path in paths)


def keep_plugins(plugins: tuple[Plugin, ...], folder: Path) -> None:
    """Copies the files into a run folder; UserError where it holds another text of one."""
    for plugin in plugins:
        kept = folder / KEPT / plugin.path.name
        if kept.is_file() and kept.read_text("utf-8") != plugin.source:
            raise UserError(
                f"{plugin.path}: has changed since this run began, which used {kept}; "
                f"write plugins=[{kept}] and output=... with a new name, or restore the file"
            )
    for plugin in plugins:
        write_text(folder / KEPT / plugin.path.name, plugin.source)
