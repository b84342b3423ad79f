"""What a run file says of a tokenizer: where it comes from and what becomes of it, as a mapping or as one string."""

import difflib
import json
import re
from typing import Any, Literal, get_args

from pydantic import field_validator, model_serializer, model_validator

from tokenkit.config import Config, UserError, build
from tokenkit.tokenizers.roles import KINDS

BYTE = "byte"
Conversion = Literal["byte", "byteified", "prebyteified", "manual_add_prefix_space", "longest_prefix"]
KEYS = ("source", "target", "conversion", "revision", "tokens_to_add", "pattern")
LAST_KEY = re.compile(r":([A-Za-z_]\w*)=(\[.*\]|[^:]*)$", re.DOTALL)
ANY_KEY = re.compile(rf":({'|'.join(KEYS)})=")


class TokenizerSpec(Config):
    """A tokenizer: these keys, or the string `NAME:key=value:key=value`, in which `pattern` stands last."""

    name: str
    """A folder, a tokenizer file, a hub id, `byte`, or `FILE.py:CLASS`, whose code is run. Other keys may stand behind
    it, as in `byte:target=Qwen2`."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    source: str | None = None
    """The family it comes from (Qwen2, Llama3, Gemma2, ...); its special tokens must be there."""
    target: str | None = None
    """The family whose special tokens it gets; what is missing is added behind the last id."""
    conversion: Conversion | None = None
    """`byte`, `byteified`, `prebyteified`, `manual_add_prefix_space` or `longest_prefix`."""
    tokens_to_add: tuple[str, ...] = ()
    """Plain tokens that are added behind the last id and found in running text."""
    pattern: str | None = None
    """The regular expression that splits text, for files that hold none (tiktoken ranks, GGUF)."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _split(value)
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return value
        found = _split(value["name"])
        for key in sorted(found.keys() & value.keys() - {"name"}):
            raise UserError(f"tokenizer {value['name']!r}: {key} stands here and as a key of its own; keep one")
        return {**value, **found}

    @field_validator("source", "target", "conversion", mode="before")
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        choices = get_args(Conversion) if info.field_name == "conversion" else tuple(KINDS)
        if value is None or value in choices:
            return value
        raise UserError(f"tokenizer {info.field_name} {value!r}: unknown; {_hint(str(value), choices)}")

    @field_validator("revision")
    @classmethod
    def _no_colon(cls, value: str | None) -> str | None:
        if value is not None and (":" in value or not value):
            raise UserError(f"tokenizer revision {value!r}: no name of a branch, tag or commit; write one")
        return value

    @model_serializer
    def _string(self) -> str:
        return str(self)

    @classmethod
    def parse(cls, text: str) -> "TokenizerSpec":
        """The structure of a string; UserError for unknown keys, families and conversions."""
        return build(cls, _split(text))

    def __str__(self) -> str:
        """The string that `parse` reads back as this very structure."""
        values = dict(self)
        if self.tokens_to_add:  # a colon in a token must not look like the beginning of a key
            values["tokens_to_add"] = json.dumps(self.tokens_to_add, ensure_ascii=False).replace(":", r"\u003a")
        return self.name + "".join(f":{key}={values[key]}" for key in KEYS if values[key] not in (None, ()))


def _split(text: str) -> dict[str, Any]:
    """Name and keys of a string, read from the right: a path with colons stays whole."""
    name, marked, pattern = text.partition(":pattern=")
    found: dict[str, Any] = {"pattern": pattern} if marked else {}
    if marked and not pattern:
        raise UserError(f"tokenizer {text!r}: nothing stands behind pattern=; write a value or leave it out")
    while last := LAST_KEY.search(name):
        key, value = last.groups()
        if key not in KEYS:
            raise UserError(f"tokenizer {text!r}: unknown key {key!r}; {_hint(key, KEYS)}")
        if key in found:
            raise UserError(f"tokenizer {text!r}: {key} stands twice; keep one")
        if not value:
            raise UserError(f"tokenizer {text!r}: nothing stands behind {key}=; write a value or leave it out")
        found[key] = _tokens(value) if key == "tokens_to_add" else value
        name = name[: last.start()]
    stray = ANY_KEY.search(name)
    if stray:
        raise UserError(f"tokenizer {text!r}: {name[stray.start() + 1 :]!r} is not key=value; write NAME:key=value")
    if not name:
        raise UserError(f"tokenizer {text!r}: no name; write a folder, a tokenizer file, a hub id or 'byte'")
    return {"name": name, **found}


def _tokens(text: str) -> list[str]:
    try:
        tokens = json.loads(text)
    except json.JSONDecodeError:
        tokens = None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f'tokens_to_add {text!r}: not a list of strings; write tokens_to_add=["<a>", "<b>"]')
    return tokens


def _hint(word: str, choices: tuple[str, ...]) -> str:
    """The choice that was probably meant, else all of them."""
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f"did you mean {lower[close[0]]!r}?" if close else f"write one of {', '.join(choices)}"
