"""`tokenkit VERB A B ...`: words in a fixed order, beside a run file and key=value."""

from pathlib import Path
from typing import Any

from tokenkit.config import Schema, UserError, build, override, read_run_file


def load_positional(
    schema: type[Schema], names: tuple[str, ...], words: list[str], options: dict[str, Any] | None = None
) -> Schema:
    """A run from words: at most one run file (.yaml, first), plain words for the names in order, and key=value.

    A word is an assignment if its key is one of the schema's, so a text may hold `=`. Names that are assigned need no
    word, and beside them a word with `=` is a key gone wrong. `options` are the values of command-line options, which
    win; None stands for one that was not given.
    """
    assigned = [word for word in words if _key(word) in schema.model_fields]
    plain = [word for word in words if word not in assigned]
    values = read_run_file(Path(plain.pop(0))) if plain and plain[0].endswith((".yaml", ".yml")) else {}
    free = [name for name in names if name not in map(_key, assigned)]
    if len(plain) == len(free) and (free == [*names] or not any("=" in word for word in plain)):
        values |= dict(zip(free, plain))
    else:
        for word in plain:
            if "=" not in word:
                wanted = f"write {' '.join(names)}, or {' '.join(f'{name}=...' for name in names)}"
                raise UserError(f"{word!r}: {len(plain)} words for {len(free)} names ({', '.join(free)}); {wanted}")
            override(values, word)  # an unknown key: the schema says what was meant
    for word in assigned:
        override(values, word)
    return build(schema, values | {key: value for key, value in (options or {}).items() if value is not None})


def _key(word: str) -> str:
    key, equals, _ = word.lstrip("+").partition("=")
    return key.partition(".")[0] if equals else ""
