"""A tokenizer in the words of a GGUF file: `gpt2` for byte-level BPE, `llama` for sentencepiece BPE, `t5` for Unigram.

llama.cpp knows no regular expressions of files, only families of them (`pre`). A family is believed to be the
tokenizer's when it cuts the probes below as the tokenizer does; and the file when our own reader, which is given
nothing but the file, gives the same ids.
"""

import base64
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from tokenkit.config import UserError
from tokenkit.export.huggingface import TEXTS
from tokenkit.export.verify import ExportError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.formats import read_format
from tokenkit.tokenizers.formats.definition import whole
from tokenkit.tokenizers.formats.llama_cpp import NO_MERGE
from tokenkit.tokenizers.formats.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from tokenkit.tokenizers.formats.splits import SPLITS, byte_level_steps
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import (
    BYTE_FALLBACK,
    Definition,
    is_byte_level,
    model_type,
    model_vocabulary,
    parts,
    unknown_id,
)
from tokenkit.tokenizers.surgery.bpe import merge_pairs

# (name of a split, whether words that are tokens need no merge) -> tokenizer.ggml.pre. By `pre` llama.cpp decides both.
PRE = {
    ("gpt2", False): "gpt-2",
    ("digits-gpt2", False): "smollm",
    ("cl100k", True): "llama-bpe",
    ("cl100k", False): "dbrx",
    ("qwen2", False): "qwen2",
    ("o200k", False): "gpt-4o",
    ("tekken", True): "tekken",
    ("deepseek-v3", False): "deepseek-v3",
    ("kimi-k2", False): "kimi-k2",
}
LOOSE = ("tekken", "o200k")  # splits that llama.cpp only comes near to where words have combining marks
PROBES = [
    *TEXTS,
    "I'll say it's 1234567 or 12 3.14, DON'T: they'Ve gone...  \n\n\n\t\t x\r\ny",
    "camelCase HTMLParser JSONText snake_case path/to//file /\n/ a+b=c;\n  }\n\n",
    "naïve ελληνικά עברית العربية हिन्दी ไทย 한국어 ひらがなカタカナ漢字123漢 🙂🙃 №5 ½ ²",
    " leading, trailing  and   many    spaces     \n",
    "#include <stdio.h>\nint main() { return x[0] != 'y' ? 1 : -2; } // 100%",
    "",
]


@dataclass(frozen=True)
class Vocabulary:
    """The `tokenizer.ggml.` keys that make ids of text, and what is to be said about them."""

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None
    remove_spaces: bool | None = None
    charsmap: bytes = b""
    unknown: int | None = None
    notes: list[str] = field(default_factory=list)
    probes: list[str] = field(default_factory=lambda: PROBES)
    """Texts that must get the same ids from the file."""


def gguf_vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer, as many tokens as the model has rows; UserError where GGUF cannot say it."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch))
        definition = json.loads(Path(scratch, "tokenizer.json").read_text("utf-8"))
    names = {index: text for text, index in model_vocabulary(definition).items()}
    names |= {token["id"]: token["content"] for token in definition.get("added_tokens") or []}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(rows)]
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{tokenizer.name}: two ids have one text, which no GGUF vocabulary can hold; rename one")
    types = _types(definition, tokenizer, names, rows)
    kind = model_type(definition)
    if kind == "BPE" and is_byte_level(definition):
        return _byte_level(definition, tokenizer.name, tokens, types)
    if kind not in ("BPE", "Unigram"):
        raise UserError(
            f"{tokenizer.name}: a {kind} tokenizer; GGUF takes byte-level BPE, sentencepiece BPE and Unigram"
        )
    if is_byte_level(definition) or UNKNOWN not in types:
        raise UserError(
            f"{tokenizer.name}: a Unigram tokenizer over bytes; GGUF has Unigrams of characters, with an unknown "
            "token; export format=onnx or huggingface"
        )
    return _pieces(definition, kind, tokens, types)


def add_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    """Puts the vocabulary, the roles and the chat template into the writer of a GGUF file.

    A text begins with the start id, as it did in training.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    for value, add in (
        (vocabulary.pre, writer.add_tokenizer_pre),
        (vocabulary.scores, writer.add_token_scores),
        (vocabulary.merges, writer.add_token_merges),
        (vocabulary.space_prefix, writer.add_add_space_prefix),
        (vocabulary.remove_spaces, writer.add_remove_extra_whitespaces),
        (vocabulary.charsmap or None, writer.add_precompiled_charsmap),
        (vocabulary.unknown, writer.add_unk_token_id),
        (tokenizer.eos_id, writer.add_eos_token_id),
        (tokenizer.pad_id, writer.add_pad_token_id),
        (tokenizer.chat_template, writer.add_chat_template),
    ):
        if value is not None:
            add(value)
    writer.add_bos_token_id(tokenizer.start_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def verify_vocabulary(path: Path, vocabulary: Vocabulary, tokenizer: Tokenizer) -> int:
    """How many texts get the same ids from the file alone; an error where one does not."""
    parsed = read_format(path, None)
    if parsed is None:
        raise ExportError(f"{path.name}: not known as a GGUF file after writing")
    again = HFTokenizer(*parsed, path.name)
    for text in vocabulary.probes:
        expected, found = tokenizer.encode(text).ids.tolist(), again.encode(text).ids.tolist()
        if expected != found:
            raise UserError(
                f"{tokenizer.name}: cannot be said in a GGUF file: {text[:40]!r} becomes {found[:8]} there, not "
                f"{expected[:8]}; export format=huggingface"
            )
    if again.start_id() != tokenizer.start_id():
        raise ExportError(f"{path.name}: texts begin with {again.start_id()}, not {tokenizer.start_id()}")
    return len(vocabulary.probes)


def _types(definition: Definition, tokenizer: Tokenizer, names: dict[int, str], rows: int) -> list[int]:
    kinds = dict.fromkeys(names, NORMAL)
    if definition["model"].get("byte_fallback"):
        kinds |= {index: BYTE for index, text in names.items() if text in BYTE_FALLBACK}
    kinds |= {
        token["id"]: CONTROL if token["special"] else USER_DEFINED for token in definition.get("added_tokens") or []
    }
    kinds |= dict.fromkeys(tokenizer.special_ids, CONTROL)
    unknown = None if is_byte_level(definition) else unknown_id(definition)
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    return [kinds.get(index, UNUSED) for index in range(rows)]


def _byte_level(definition: Definition, name: str, tokens: list[str], types: list[int]) -> Vocabulary:
    merges = [m if isinstance(m, str) else " ".join(m) for m in definition["model"]["merges"]]
    normalizers = {part["type"] for part in parts(definition.get("normalizer"))} - {"Sequence", "NFC"}
    if normalizers:
        raise UserError(f"{name}: its {sorted(normalizers)[0]} normalizer has no place in a GGUF file; take another")
    pre, notes = _pre(definition, name) if merges else "gpt-2", []  # bytes are bytes wherever the text is cut
    if any(part["type"] == "NFC" for part in parts(definition.get("normalizer"))):
        notes.append("llama.cpp does not bring text into NFC")
    if pre in {PRE.get((split, flag)) for split in LOOSE for flag in (False, True)}:
        notes.append("llama.cpp cuts words with combining marks otherwise than this family's regular expression")
    return Vocabulary("gpt2", pre, tokens, types, merges=merges or [NO_MERGE], notes=notes)


def _pre(definition: Definition, name: str) -> str:
    """The family whose regular expression, and whose way with whole words, are the tokenizer's."""
    cuts = _cuts(definition)
    fitting = [split for split in SPLITS if _cuts({"pre_tokenizer": byte_level_steps(SPLITS[split])}) == cuts]
    if not fitting:
        raise UserError(
            f"{name}: cuts text by a rule that is none of llama.cpp's ({', '.join(SPLITS)}); retrain it with one of "
            "these, or export format=huggingface"
        )
    whole_words = bool(definition["model"].get("ignore_merges"))
    for wanted in (whole_words, not whole_words):
        found = next((PRE[split, wanted] for split in fitting if (split, wanted) in PRE), None)
        if found is not None and (wanted == whole_words or _reached_by_merges(definition)):
            return found
    raise UserError(
        f"{name}: llama.cpp merges words of this split otherwise (ignore_merges={whole_words}); "
        "export format=huggingface"
    )


def _cuts(definition: Definition) -> list[list[str]]:
    """The probes in pieces. Probes are NFC, so that a normalizer to it does not matter."""
    blank = whole({"type": "BPE", "vocab": {}, "merges": []}, [], pre_tokenizer=definition["pre_tokenizer"])
    step = tokenizers.Tokenizer.from_str(json.dumps(blank)).pre_tokenizer
    return [[piece for piece, _ in step.pre_tokenize_str(text)] for text in PROBES]


def _reached_by_merges(definition: Definition) -> bool:
    """Whether every token is what merges make of its own text, so that `ignore_merges` changes nothing."""
    model = {**definition["model"], "ignore_merges": False}
    backend = tokenizers.Tokenizer.from_str(json.dumps(whole(model, [])))
    added = {token["content"] for token in definition.get("added_tokens") or []}
    words = [word for word in model_vocabulary(definition) if word not in added]
    return all(len(found.ids) == 1 for found in backend.encode_batch_fast(words, add_special_tokens=False))


def _pieces(definition: Definition, kind: str, tokens: list[str], types: list[int]) -> Vocabulary:
    """Scored pieces. A BPE's scores are the ranks of its merges: the smallest rank that makes a piece, negated."""
    model, notes = definition["model"], []
    if kind == "Unigram":
        known = [score for _, score in model["vocab"]]
        scores = [*known, *[min(known)] * (len(tokens) - len(known))]
        if model.get("byte_fallback"):
            notes.append("llama.cpp has no byte fallback in Unigram: what the vocabulary cannot spell becomes unknown")
    else:
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merge_pairs(definition)):
            ranks.setdefault(left + right, rank)
        scores = [float(-ranks.get(token, len(ranks))) for token in tokens]
    steps = [*parts(definition.get("normalizer")), *parts(definition.get("pre_tokenizer"))]
    prepends = any(part["type"] == "Prepend" for part in steps)
    unless_there = any(part["type"] == "Metaspace" and _prepends(part) for part in steps)
    if unless_there:
        notes.append("llama.cpp puts a space before every text, this tokenizer only where none is")
    charsmap = next((part["precompiled_charsmap"] for part in steps if part["type"] == "Precompiled"), "")
    return Vocabulary(
        model="t5" if kind == "Unigram" else "llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        space_prefix=prepends or unless_there,
        remove_spaces=any(part["type"] in ("WhitespaceSplit", "Strip") for part in steps),
        charsmap=base64.b64decode(charsmap),
        unknown=next((index for index, type_ in enumerate(types) if type_ == UNKNOWN), None),
        notes=notes,
        probes=[text for text in PROBES if not (unless_there and text[:1] == " ")],
    )


def _prepends(metaspace: Definition) -> bool:
    """Whether a Metaspace step puts a space before a text; files written before 0.15 say so in another key."""
    scheme = metaspace.get("prepend_scheme")
    return scheme != "never" if scheme is not None else metaspace.get("add_prefix_space", True)
