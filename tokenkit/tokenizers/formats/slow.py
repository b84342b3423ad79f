"""Files of slow tokenizers: vocab.json with merges.txt (byte-level BPE), vocab.txt (WordPiece)."""

from pathlib import Path
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.formats.definition import (
    MAX_TOKENS,
    Parsed,
    added_token,
    bpe_model,
    byte_level,
    numbered,
    read_bytes,
    read_json,
    whole,
)
from tokenkit.tokenizers.formats.splits import SPLITS, Split, named_or_regex
from tokenkit.tokenizers.pieces import Definition

MERGES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
# tokenizer_class of a tokenizer_config.json -> split; without one the folder is GPT-2's
CLASSES = dict.fromkeys(("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "PreTrainedTokenizerFast"), "gpt2")
CLASSES |= {"Qwen2Tokenizer": "qwen2", "CodeGenTokenizer": "gpt2", "WhisperTokenizer": "gpt2"}
CONFIG, END = "tokenizer_config.json", "<|endoftext|>"
WORD_PIECE_ROLES = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def is_vocabulary(value: Any) -> bool:
    """Whether the value of a JSON file is a map from tokens to ids."""
    return isinstance(value, dict) and bool(value) and all(type(index) is int for index in value.values())


def config_beside(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json of the file's folder, if there is one."""
    config = read_json(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else {}
    if not isinstance(config, dict):
        raise UserError(f"{path.parent / CONFIG}: not a map of settings; write one saved with a tokenizer")
    return config


def read_vocabulary(path: Path, ids: dict[str, int], pattern: str | None = None) -> Parsed:
    """The tokenizer.json of a parsed vocab.json (or encoder.json) and the merges beside it."""
    merges_path = path.with_name(MERGES.get(path.name, "merges.txt"))
    if not merges_path.is_file():
        raise UserError(f"{path}: a vocabulary without its merges; put {merges_path.name} beside it")
    if min(ids.values()) < 0 or max(ids.values()) > 2 * len(ids) + 1024 or len(set(ids.values())) < len(ids):
        raise UserError(
            f"{path}: ids from {min(ids.values())} to {max(ids.values())} for {len(ids)} tokens, so not one each; "
            "fetch the file again"
        )
    config = config_beside(path)
    added = _added_tokens(path, ids, config)
    model = bpe_model(numbered(ids, added), _merges(merges_path, ids))
    definition = byte_level(model, added, _split(path, config, pattern))
    if not config and END in ids:
        config = {"bos_token": END, "eos_token": END}
    return definition, config or None


def _merges(path: Path, ids: dict[str, int]) -> list[tuple[str, str]]:
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; write the merges, two tokens per line") from None
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.rstrip("\r").split(" ")
        if (number == 1 and line.startswith("#version")) or pair == [""]:
            continue
        if len(pair) != 2 or not all(part in ids for part in (*pair, "".join(pair))):
            raise UserError(f"{path}, line {number}: {line[:40]!r} is not two tokens that make a third")
        merges.append((pair[0], pair[1]))
    return merges


def _split(path: Path, config: dict[str, Any], pattern: str | None) -> Split:
    if pattern is not None:
        return named_or_regex(pattern)
    kind = config.get("tokenizer_class", "GPT2Tokenizer")
    name = str(kind).removesuffix("Fast")
    if name not in CLASSES and kind not in CLASSES:
        raise UserError(
            f"{path}: tokenizer_class {kind!r} does not say how text is split; give pattern=, a regular expression or "
            f"one of {', '.join(SPLITS)}"
        )
    return SPLITS[CLASSES[name] if name in CLASSES else CLASSES[str(kind)]]


def _added_tokens(path: Path, ids: dict[str, int], config: dict[str, Any]) -> list[Definition]:
    """What tokenizer_config.json and added_tokens.json say, the role tokens, else GPT-2's end of text."""
    found: dict[str, Definition] = {}
    beside = path.with_name("added_tokens.json")
    listed = read_json(beside) if beside.is_file() else {}
    decoder = config.get("added_tokens_decoder", {})
    if not (isinstance(listed, dict) and isinstance(decoder, dict)):
        raise UserError(f"{path.parent}: added tokens that are not a map; write those saved with the tokenizer")
    for content, index in listed.items():
        if type(index) is not int or index < 0:
            raise UserError(f"{beside}: the id of {content[:40]!r} is {index!r}; write those saved with the tokenizer")
        found[content] = added_token(index, content)
    for index, token in decoder.items():
        if not (index.isdigit() and isinstance(token, dict) and isinstance(token.get("content"), str)):
            raise UserError(f"{path.parent / CONFIG}: the added token {index!r} has no id or content")
        flags = {
            key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in token
        }
        found[token["content"]] = added_token(int(index[:9]), token["content"]) | flags
    roles = [value for key, value in config.items() if key.endswith("_token")]
    names = [value.get("content") if isinstance(value, dict) else value for value in roles]
    for content in [*names, *([] if config else [END])]:
        if isinstance(content, str) and content in ids and content not in found:
            found[content] = added_token(ids[content], content)
    return list(found.values())


def read_words(path: Path) -> Parsed:
    """The tokenizer.json of a vocab.txt: one WordPiece token per line, lower-cased unless the config says otherwise."""
    try:
        words = read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; write a vocab.txt with one token per line") from None
    words = [word.rstrip("\r") for word in (words[:-1] if words[-1] == "" else words)]
    config = config_beside(path)
    definition, found = word_piece(
        words,
        str(path),
        lowercase=_switch(config, "do_lower_case", True, path),
        strip_accents=_switch(config, "strip_accents", None, path),
        chinese=_switch(config, "tokenize_chinese_chars", True, path),
    )
    return definition, {**(found or {}), **config}


def _switch(config: dict[str, Any], key: str, default: bool | None, path: Path) -> bool | None:
    value = config.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path.parent / CONFIG}: {key} is {str(value)[:40]!r}; write true or false")
    return value


def word_piece(
    words: list[str], name: str, *, lowercase: bool | None, strip_accents: bool | None, chinese: bool | None = True
) -> Parsed:
    """The tokenizer.json of BERT for a list of its tokens, and the role tokens among them."""
    ids = {word: index for index, word in enumerate(words)}
    if len(words) > MAX_TOKENS:
        raise UserError(f"{name}: {len(words):,} tokens, where a vocabulary has at most {MAX_TOKENS:,}")
    if len(ids) < len(words):
        twice = next(word for index, word in enumerate(words) if ids[word] != index)
        raise UserError(f"{name}: the token {twice[:40]!r} stands twice; the file is broken")
    if "[UNK]" not in ids:
        raise UserError(f"{name}: no [UNK] among its {len(words)} tokens, so not a WordPiece vocabulary")
    config = {f"{role}_token": content for role, content in WORD_PIECE_ROLES.items() if content in ids}
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": bool(chinese)}
    normalizer |= {"strip_accents": strip_accents, "lowercase": bool(lowercase)}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100, "vocab": ids}
    definition = whole(
        model,
        [added_token(ids[content], content) for content in config.values()],
        normalizer=normalizer,
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )
    return definition, config
