"""`tokenkit inspect`: what a checkpoint or a configuration holds, and why two of them differ in size."""

from tokenkit.config import Config
from tokenkit.eval.size_difference import Difference, difference
from tokenkit.models.count import Inventory, inventory_of
from tokenkit.verbs.positional import load_positional


class InspectRun(Config):
    """A run file of `tokenkit inspect`."""

    a: str
    """A folder or a .safetensors file, of which only headers are read, or `TYPE:KEY=VALUE,...`: the default
    configuration of a model type with keys changed."""
    b: str | None = None
    """What it is compared with."""


def load_inspect(words: list[str]) -> InspectRun:
    """The run that the words of a command line ask for: A, or A and B, or a run file and key=value."""
    plain = [word for word in words if not word.endswith((".yaml", ".yml")) and word[:2] not in ("a=", "b=")]
    return load_positional(InspectRun, ("a", "b") if len(plain) == 2 else ("a",), words)


def inspect(run: InspectRun) -> Inventory | Difference:
    """The tensors of A, or why A and B differ."""
    a = inventory_of(run.a)
    return a if run.b is None else difference(a, inventory_of(run.b))
