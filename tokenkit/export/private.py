"""What does not belong into a file that is published: absolute paths, access tokens, passwords in addresses."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

PATH, SECRET = "path-removed", "token-removed"
SECRETS = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{8,}                         # Hugging Face
    | \bgithub_pat_\w{20,} | \bgh[oprsu]_\w{20,}    # GitHub
    | \bglpat-[\w-]{15,}                           # GitLab
    | \bsk-[A-Za-z0-9_-]{16,}                      # several model providers
    | \bAKIA[0-9A-Z]{12,} | \bAIza[\w-]{30,}       # Amazon, Google
    | \bxox[abpr]-[\w-]{10,}                       # Slack
    | \beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+          # JSON web tokens
    | (?<=://)[^/\s:@]+:[^/\s@]+(?=@)              # user and password of an address
    """,
    re.VERBOSE,
)
PART = r"[^\s/\\'\"`<>|,;:()\[\]{}]+"
PATHS = re.compile(
    rf"""
      (?<![\w./~:<*])~?(?:/{PART}){{2,}}/?         # two parts or more: /data/corpora/a.txt
    | (?<![\w./~:<*])/(?:home|root|Users)\b/?      # homes, whatever follows
    | \b[A-Za-z]:[\\/](?:{PART}[\\/])*(?:{PART})?   # of Windows
    """,
    re.VERBOSE,
)
FREE_TEXT = frozenset({"separator", "learn_after", "prompts"})  # keys of a run file that hold no paths


def redacted(text: str) -> str:
    """The text without secrets and absolute paths; of a path the last part stays, where it lies deep enough to be no
    user's name."""
    for private in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        if len(private.parts) > 1:
            text = re.sub(rf"{re.escape(str(private))}(?=/|\b)", PATH, text)
    return PATHS.sub(_short, SECRETS.sub(SECRET, text))


def _short(match: re.Match[str]) -> str:
    parts = [part for part in re.split(r"[\\/]", match[0]) if part]
    return f"{PATH}/{parts[-1]}" if len(parts) > 2 else PATH


def found_private(text: str) -> list[str]:
    """Kinds of what `redacted` would take out; the values themselves are not repeated."""
    found = ["an access token"] if SECRETS.search(text) else []
    return [*found, "an absolute path"] if PATHS.search(text) else found


def plain_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A run's values with a plain name in place of every absolute path, and what they stand for.

    The names are such that the run works in a folder where the files lie under them.
    """
    names: dict[str, str] = {}
    return _named(values, names), names


def _named(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: item if key in FREE_TEXT else _named(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if not isinstance(value, str) or not _is_absolute(value):
        return value
    if value not in names:
        names[value] = _free_name(Path(value).expanduser(), {*names.values()})
    return names[value]


def _is_absolute(text: str) -> bool:
    path = Path(text).expanduser() if text[:1] == "~" else PurePosixPath(text)
    return path.is_absolute() and len(path.parts) > 2 and "\n" not in text


def _free_name(path: Path, taken: set[str]) -> str:
    """The last part; of RUN/model, as every run exports one, the run's; with a number where it is taken."""
    last = path.parent.name if path.name == "model" and len(path.parts) > 3 else path.name
    plain = SECRETS.sub(SECRET, last)
    stem, dot, ending = plain.partition(".")
    name, number = plain, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}{dot}{ending}"
    return name
