"""One factory: a folder, a tokenizer file, a hub id or `byte`, changed as its spec says, becomes a Tokenizer."""

from pathlib import Path
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.fast import fast_config, fast_definition
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.autoencoder.package import PACKAGE_FILES, Package, is_package
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.bytelevel import ROLE_TOKENS, SPECIALS, ByteTokenizer, byte_definition, is_bytes
from tokenkit.tokenizers.formats import read_format
from tokenkit.tokenizers.formats.check import check_definition
from tokenkit.tokenizers.formats.definition import read_json
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.own import is_own, load_own
from tokenkit.tokenizers.pieces import Definition
from tokenkit.tokenizers.spec import BYTE, TokenizerSpec
from tokenkit.tokenizers.targets import convert

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
OTHER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")
WANTED = "a folder, a tokenizer file, a hub id, 'byte' or FILE.py:CLASS"
Found = tuple[Definition, dict[str, Any] | None]  # tokenizer.json and, where something is said, tokenizer_config.json


def load_tokenizer(
    spec: str | TokenizerSpec, *, revision: str | None = None
) -> HFTokenizer | ByteTokenizer | LearnedTokenizer | Tokenizer:
    """The tokenizer that a spec names: `NAME`, `NAME:target=Qwen2`, `byte`, ...; see `TokenizerSpec`.

    `revision` is that of a hub id whose spec says none. `FILE.py:CLASS` runs the file.
    """
    spec = TokenizerSpec.parse(spec) if isinstance(spec, str) else spec
    if is_own(spec.name):
        if str(spec) != spec.name:
            raise UserError(f"tokenizer {str(spec)!r}: a Python tokenizer is what its code says; leave the keys out")
        return load_own(spec.name)
    path = None if spec.name == BYTE else _path(spec, spec.revision or revision)
    definition, config = convert(*_find(spec, path), spec)
    if path is not None and is_package(path) and spec.conversion is None and not spec.tokens_to_add:
        return LearnedTokenizer(path, definition, config, str(spec))
    kind = ByteTokenizer if is_bytes(definition) else HFTokenizer
    return kind(definition, config, str(spec))


def _path(spec: TokenizerSpec, revision: str | None) -> Path:
    path = Path(spec.name).expanduser()
    if not path.exists():
        if spec.name.startswith((".", "/", "~")) or spec.name.count("/") > 1 or path.suffix in (".json", ".xz"):
            raise UserError(f"tokenizer {spec.name!r}: no such file; write {WANTED}")  # and no hub id
        path = _download(spec.name, revision)
    return path


def _find(spec: TokenizerSpec, path: Path | None) -> Found:
    if path is None:
        return (byte_definition(()), None) if spec.target else (byte_definition(SPECIALS), dict(ROLE_TOKENS))
    found = _tokenizer_json(path)
    if found is None and is_package(path):  # an open one that was exported alone
        found = fast_definition(Package.load(path, "compact").codec("compact")), _read_config(path) or fast_config()
    if found is None:
        found = _with_config(read_format(path, spec.pattern), path)
    elif spec.pattern is not None:
        raise UserError(f"tokenizer {spec.name!r}: a tokenizer.json says how it splits text; leave pattern out")
    if found is None and path.is_file():
        found = _read_definition(path), None
    if found is None:
        raise UserError(f"tokenizer {spec.name!r}: no tokenizer.json in this folder; write the folder that holds one")
    return found


def _with_config(found: Found | None, path: Path) -> Found | None:
    """What a vocabulary file says, and over it what a tokenizer_config.json or template beside it says."""
    beside = None if found is None else _read_config(path if path.is_dir() else path.parent)
    return found if found is None or beside is None else (found[0], {**(found[1] or {}), **beside})


def _tokenizer_json(path: Path) -> Found | None:
    """What a tokenizer.json, or the folder of one, holds; None for anything else."""
    if path.is_file():
        known = path.name.removesuffix(".xz") == "tokenizer.json"
        return (_read_definition(path), _read_config(path.parent)) if known else None
    files = (path / name for name in ("tokenizer.json", "tokenizer.json.xz"))
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else (_read_definition(file), _read_config(path))


def _read_definition(path: Path) -> Definition:
    definition = read_json(path)
    check_definition(definition, str(path))
    return definition


def _read_config(folder: Path) -> dict[str, Any] | None:
    """Role tokens and chat template found beside a tokenizer.json; None where nothing is said."""
    config: dict[str, Any] = {}
    found = False
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter is newer and wins
        if (folder / name).is_file():
            values = read_json(folder / name)
            if not isinstance(values, dict):
                raise UserError(f"{folder / name}: holds a {type(values).__name__}; write one JSON object")
            config |= {key: value for key, value in values.items() if value is not None}
            found = True
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return config if found else None


def _download(spec: str, revision: str | None) -> Path:
    """The tokenizer files of a hub repository, from the local cache where it holds them."""
    from huggingface_hub import snapshot_download  # only for hub ids: heavy to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=[*FILES, *OTHER_FILES, *PACKAGE_FILES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"tokenizer {spec!r}: no such folder, not loaded from the hub ({reason}); write a folder or check the id"
        ) from None
