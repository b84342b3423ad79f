"""The table of pins and bytes as a tokenizer.json that needs no code of ours and gives the same ids."""

from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.chunkers import Chunker, FixedChunker, PatternChunker
from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.ids import BOS, UNK
from tokenkit.tokenizers.autoencoder.table import scored_pieces
from tokenkit.tokenizers.pieces import Definition, byte_alphabet

FLOOR = -10_000.0  # of the entries of special tokens: dearer than any spelling of their literals, which stay text
ROLE_TOKENS = {f"{name}_token": f"<|{name}|>" for name in ("bos", "eos", "pad", "unk")}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def fast_definition(codec: Codec) -> Definition:
    """A tokenizer.json whose ids are those of the codec without its codes, for every text.

    UserError for a chunker that no regular expression describes.
    """
    layout = codec.layout
    vocabulary = [[literal, FLOOR] for literal in layout.special_names]
    vocabulary += [[piece, score] for piece, score in scored_pieces(codec.pins)]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    name = ROLE_TOKENS["bos_token"]
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    sequences = [{"Sequence": {"id": letter, "type_id": 0}} for letter in "AB"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **FLAGS} for i, text in enumerate(layout.special_names)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_splits(codec.chunker), step, *_cuts(codec)]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, sequences[0]],
            "pair": [begin, *sequences],
            "special_tokens": {name: {"id": name, "ids": [BOS], "tokens": [name]}},
        },
        "decoder": step,
        "model": {"type": "Unigram", "unk_id": UNK, "vocab": vocabulary, "byte_fallback": False},
    }


def fast_config() -> dict[str, Any]:
    """The tokenizer_config.json beside it: roles and the default chat template."""
    return {**ROLE_TOKENS, "chat_template": CHAT_TEMPLATE}


def _splits(chunker: Chunker) -> list[dict[str, Any]]:
    if isinstance(chunker, PatternChunker):
        return [_isolated(chunker.exported)]
    if isinstance(chunker, FixedChunker):
        return []  # its whole rule is the cut
    raise UserError(f"chunker {chunker.name!r}: a tokenizer.json cannot split so; use joined, word, ...")


def _cuts(codec: Codec) -> list[dict[str, Any]]:
    """Pieces of so many bytes that end where a character ends; bytes that continue one are these characters."""
    continuing = "".join(byte_alphabet()[0x80:0xC0])
    widths = [codec.chunker.width] if isinstance(codec.chunker, FixedChunker) else []
    cuts = [f"[^\\n]{{1,{width}}}(?![{continuing}])|[^\\n]{{1,{width}}}" for width in [*widths, codec.max_chunk]]
    return [_isolated(pattern) for pattern in cuts]


def _isolated(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
