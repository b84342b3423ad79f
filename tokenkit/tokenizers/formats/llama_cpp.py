"""The vocabulary that llama.cpp keeps in a GGUF file as a tokenizer.json that gives the original tokenizer's ids."""

from pathlib import Path
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.formats.definition import (
    MARK,
    Parsed,
    added_token,
    begin_template,
    bpe_model,
    byte_level,
    refuse_pattern,
)
from tokenkit.tokenizers.formats.gguf import read_metadata
from tokenkit.tokenizers.formats.pieces import BYTE, CONTROL, UNIGRAM, UNKNOWN, USER_DEFINED, Pieces, pieces_definition
from tokenkit.tokenizers.formats.slow import word_piece
from tokenkit.tokenizers.formats.splits import SPLITS, Split, named_or_regex

# tokenizer.ggml.pre -> the split of the family. llama.cpp rewrites some for its own engine; these are the originals.
PRE = {
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat"), "gpt2"),
    **dict.fromkeys(("a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "jina-v2-code", "olmo", "mpt"), "gpt2"),
    **dict.fromkeys(("exaone4", "trillion", "jais", "granite-docling"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "digits-gpt2"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), "cl100k"),
    **dict.fromkeys(("lfm2", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), "cl100k"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), "qwen2"),
    **dict.fromkeys(("gpt-4o", "llama4"), "o200k"),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), "deepseek-v3"),
    "tekken": "tekken",
    "kimi-k2": "kimi-k2",
}
# Those whose words need no merge where they are tokens.
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
NO_MERGE = "\u2400 \u2400"  # of characters that spell no byte: llama.cpp wants a list of merges, bytes have none
MODELS = "gpt2, llama, t5 or bert"
ROLE_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


class _Vocabulary:
    """The keys of `tokenizer.ggml.` with their types checked."""

    def __init__(self, metadata: dict[str, Any], name: str) -> None:
        self.metadata, self.name = metadata, name
        self.model = self.get("model", str, "")
        self.tokens: list[str] = self.values("tokens", str)
        if not self.tokens:
            raise UserError(f"{name}: a GGUF file without tokenizer.ggml.tokens; write one that holds a vocabulary")
        if len(set(self.tokens)) < len(self.tokens):
            raise UserError(f"{name}: a token of tokenizer.ggml.tokens stands twice; the file is broken")
        self.types: list[int] = self.per_token("token_type", int, 1)

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            raise UserError(
                f"{self.name}: tokenizer.ggml.{key} is {str(value)[:40]!r}, where a {kind.__name__} belongs"
            )
        return value

    def values(self, key: str, kind: type) -> list[Any]:
        values = self.get(key, list, None) or []
        if values and type(values[0]) is not kind:
            raise UserError(f"{self.name}: tokenizer.ggml.{key} holds {values[0]!r}, where a {kind.__name__} belongs")
        return values

    def per_token(self, key: str, kind: type, default: Any) -> list[Any]:
        values = self.values(key, kind) or [default] * len(self.tokens)
        if len(values) != len(self.tokens):
            raise UserError(
                f"{self.name}: tokenizer.ggml.{key} has {len(values)} entries for {len(self.tokens)} tokens; "
                "fetch the file again"
            )
        return values

    def roles(self) -> dict[str, int]:
        """The ids of bos, eos, unk and pad where the file names them."""
        found = {role: self.get(key, int, None) for role, key in ROLE_KEYS.items()}
        found = {role: index for role, index in found.items() if index is not None}
        for role, index in found.items():
            if not 0 <= index < len(self.tokens):
                key = ROLE_KEYS[role]
                raise UserError(f"{self.name}: tokenizer.ggml.{key} is {index} of {len(self.tokens)} tokens")
        return found


def read_gguf(path: Path, name: str, pattern: str | None = None) -> Parsed:
    """The tokenizer.json of a GGUF file; `pattern` replaces the split that `tokenizer.ggml.pre` names."""
    metadata = read_metadata(path, name)
    vocabulary = _Vocabulary(metadata, name)
    if vocabulary.model == "gpt2":
        definition, config = _gpt2(vocabulary, pattern)
    elif vocabulary.model in ("llama", "t5", "bert"):
        refuse_pattern(pattern, name)
        definition, config = _bert(vocabulary) if vocabulary.model == "bert" else _pieces(vocabulary)
    else:
        raise UserError(f"{name}: tokenizer.ggml.model is {vocabulary.model!r}; {MODELS} can be read")
    template = metadata.get("tokenizer.chat_template")
    return definition, {**(config or {}), **({"chat_template": template} if isinstance(template, str) else {})}


def _gpt2(vocabulary: _Vocabulary, pattern: str | None) -> Parsed:
    name, tokens = vocabulary.name, vocabulary.tokens
    pre = vocabulary.get("pre", str, "")
    split = _split(pre, name) if pattern is None else named_or_regex(pattern)
    ids = {token: index for index, token in enumerate(tokens)}
    merges, lines = [], vocabulary.values("merges", str)
    for line in lines:
        if line == NO_MERGE:
            continue
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise UserError(f"{name}: the merge {line[:40]!r} needs tokens that the file does not hold")
        merges.append((left, right))
    if not lines:
        raise UserError(f"{name}: a GGUF file without tokenizer.ggml.merges; write one that holds them")
    kinds = zip(range(len(tokens)), vocabulary.types)
    added = [added_token(i, tokens[i], special=kind == CONTROL) for i, kind in kinds if kind in (CONTROL, USER_DEFINED)]
    roles = vocabulary.roles()
    steps = {}
    if vocabulary.get("add_bos_token", bool, pre in WHOLE_WORDS) and "bos" in roles:
        steps["post_processor"] = begin_template(tokens[roles["bos"]], roles["bos"])
    model = bpe_model(ids, merges, ignore_merges=pre in WHOLE_WORDS)
    config = {f"{role}_token": tokens[index] for role, index in roles.items()}
    return byte_level(model, added, split, **steps), config


def _split(pre: str, name: str) -> Split:
    if pre not in PRE:
        raise UserError(
            f"{name}: tokenizer.ggml.pre is {pre!r}, a split of text not known here; give pattern=, a regular "
            f"expression or one of {', '.join(SPLITS)}"
        )
    return SPLITS[PRE[pre]]


def _pieces(vocabulary: _Vocabulary) -> Parsed:
    unigram = vocabulary.model == "t5"
    charsmap = vocabulary.get("precompiled_charsmap", bytes, b"")
    pieces = Pieces(
        kind=UNIGRAM if unigram else "BPE",
        texts=vocabulary.tokens,
        scores=vocabulary.per_token("scores", float, 0.0),
        types=vocabulary.types,
        byte_fallback=BYTE in vocabulary.types,
        role_ids=vocabulary.roles(),
        charsmap=charsmap,
        dummy_prefix=vocabulary.get("add_space_prefix", bool, True),
        remove_extra_spaces=vocabulary.get("remove_extra_whitespaces", bool, False),
        mark_spaces=True,
        add_bos=vocabulary.get("add_bos_token", bool, not unigram),
    )
    if not vocabulary.values("scores", float):
        raise UserError(f"{vocabulary.name}: a GGUF file without tokenizer.ggml.scores; write one that holds them")
    return pieces_definition(pieces, vocabulary.name)


def _bert(vocabulary: _Vocabulary) -> Parsed:
    """WordPiece; llama.cpp writes the mark of a word's beginning where the original marks its continuation by ##."""
    special = {i for i, kind in enumerate(vocabulary.types) if kind in (CONTROL, UNKNOWN)}
    words = []
    for index, token in enumerate(vocabulary.tokens):
        if index in special or (token.startswith("[") and token.endswith("]")):
            words.append(token)
        else:
            words.append(token[1:] if token.startswith(MARK) else f"##{token}")
    if len(set(words)) < len(words):
        raise UserError(f"{vocabulary.name}: a token of tokenizer.ggml.tokens stands twice; the file is broken")
    lowercase = vocabulary.get("normalizer.lowercase", bool, True)
    strip = vocabulary.get("normalizer.strip_accents", bool, None)
    return word_piece(words, vocabulary.name, lowercase=lowercase, strip_accents=strip)
