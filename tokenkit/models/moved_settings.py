"""config.json and generation_config.json of a model that gets another tokenizer, changed as JSON: what is not about
the vocabulary stays as somebody wrote it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from tokenkit.config import UserError
from tokenkit.models.generate import empty_ids
from tokenkit.models.load import STALE, stock_ids
from tokenkit.tokenizers.base import Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
OTHER_IDS = ("_token_id", "_token_index")  # how keys end that name a further special token, of an image for instance


@dataclass(frozen=True)
class Settings:
    """The texts of both files."""

    config: str
    generation: str | None
    left: tuple[str, ...] = ()
    """Keys that still name an id of the old tokenizer, as the new one has no token of that name."""

    def write(self, folder: Path) -> None:
        """Writes both files."""
        (folder / CONFIG).write_text(self.config, "utf-8")
        if self.generation is not None:
            (folder / GENERATION).write_text(self.generation, "utf-8")


def read_settings(folder: Path) -> Settings:
    """Both files as they are."""
    generation = folder / GENERATION
    return Settings(_read(folder / CONFIG), _read(generation) if generation.is_file() else None)


def moved_settings(
    settings: Settings, known: PreTrainedConfig, source: Tokenizer, target: Tokenizer, *, rows: int, tied: bool
) -> Settings:
    """The settings with the ids of the target, `rows` rows, and the matrices tied or not; `known` is what they say."""
    config = _parse(settings.config, CONFIG)
    text = known.get_text_config()
    nested = [key for key in known.sub_configs if known.__dict__.get(key) is text and isinstance(config.get(key), dict)]
    parts = [config, *(config[key] for key in nested)]
    size = text.attribute_map.get("vocab_size", "vocab_size")
    for part in parts:
        if size in part or part is parts[-1]:
            part[size] = rows
        part.update(stock_ids(target))
        for key in STALE:
            part.pop(key, None)
    if {one.to_dict().get("tie_word_embeddings") for one in (known, text)} != {tied}:
        for part in parts:
            part["tie_word_embeddings"] = tied
    left = [key for part in parts for key in _name_others(part, source, target)]
    generation = {} if settings.generation is None else _parse(settings.generation, GENERATION)
    for key in STALE:
        generation.pop(key, None)
    generation.update(stock_ids(target))
    empty = empty_ids(target, rows)  # they would decode to nothing: stock generation must not choose them
    if empty:
        generation["suppress_tokens"] = empty
    return Settings(_dump(config), _dump(generation), tuple(dict.fromkeys(left)))


def _name_others(part: dict[str, Any], source: Tokenizer, target: Tokenizer) -> list[str]:
    """Gives other keys that name a special token of the source the target's id of it; those where it has none."""
    literals, left = {i: literal for literal, i in source.special_tokens.items()}, []
    for key, value in part.items():
        if key.endswith(OTHER_IDS) and isinstance(value, int) and key not in stock_ids(target):
            literal = literals.get(value)
            if literal in target.special_tokens:
                part[key] = target.special_tokens[literal]
            else:
                left.append(key)
    return left


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from None


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: is no JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{name}: holds no object; fetch it again")
    return found


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
