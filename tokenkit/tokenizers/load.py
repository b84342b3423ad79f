"""One factory: a folder, a tokenizer.json, a hub id or the word `byte` becomes a Tokenizer."""

import json
import lzma
from pathlib import Path
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.hf import HFTokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SLOW_FILES = ("vocab.txt", "vocab.json", "merges.txt", "*.model", "*.tiktoken")


def load_tokenizer(spec: str, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a folder, a tokenizer.json (also .xz), a hub id (at `revision`), or the 256 bytes ("byte")."""
    if spec == "byte":
        return ByteTokenizer()
    if not spec:
        raise UserError("tokenizer '': write a folder, a tokenizer.json, a hub id or 'byte'")
    path = Path(spec).expanduser()
    if path.is_file():
        return _from_file(path, spec)
    if path.is_dir():
        return _from_folder(path, spec)
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or spec.endswith((".json", ".xz")):  # no hub id
        raise UserError(f"tokenizer {spec!r}: no such file; write a folder, a tokenizer.json, a hub id or 'byte'")
    return _from_folder(_download(spec, revision), spec)


def _from_file(path: Path, name: str) -> HFTokenizer:
    if path.name.removesuffix(".xz") == "tokenizer.json":
        return HFTokenizer(_read_definition(path), _read_config(path.parent), name)
    return HFTokenizer(_read_definition(path), None, name)


def _from_folder(folder: Path, name: str) -> HFTokenizer:
    for file in ("tokenizer.json", "tokenizer.json.xz"):
        if (folder / file).is_file():
            return HFTokenizer(_read_definition(folder / file), _read_config(folder), name)
    slow = sorted(path.name for pattern in SLOW_FILES for path in folder.glob(pattern))
    if slow:
        raise UserError(
            f"tokenizer {name!r}: only a slow (Python) tokenizer ({slow[0]}), no tokenizer.json; save it as fast with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    raise UserError(f"tokenizer {name!r}: no tokenizer.json in this folder; write the folder that holds one")


def _read_json(path: Path) -> Any:
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        return json.loads(raw)
    except (lzma.LZMAError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a JSON file ({str(error).splitlines()[0]}); write a tokenizer.json") from None


def _read_definition(path: Path) -> dict[str, Any]:
    definition = _read_json(path)
    model = definition.get("model") if isinstance(definition, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise UserError(f"{path}: not a tokenizer.json, no model with a vocab; write one saved by a fast tokenizer")
    return definition


def _read_config(folder: Path) -> dict[str, Any] | None:
    """Role tokens and chat template found beside a tokenizer.json; None where nothing is said."""
    config: dict[str, Any] = {}
    found = False
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter is newer and wins
        if (folder / name).is_file():
            config |= {key: value for key, value in _read_json(folder / name).items() if value is not None}
            found = True
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return config if found else None


def _download(spec: str, revision: str | None) -> Path:
    """The tokenizer files of a hub repository, from the local cache where it holds them."""
    from huggingface_hub import snapshot_download  # only for hub ids: heavy to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*FILES, "vocab.txt", "*.model"]
    try:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"tokenizer {spec!r}: no such folder, not loaded from the hub ({reason}); write a folder or check the id"
        ) from None
