"""tiktoken files: one base64 token and its rank per line; split and special tokens come from a table of families."""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from tokenkit.config import UserError
from tokenkit.tokenizers.formats.definition import (
    MAX_TOKEN_BYTES,
    MAX_TOKENS,
    Parsed,
    added_token,
    ranked_definition,
)
from tokenkit.tokenizers.formats.splits import SPLITS, named_or_regex

FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,8}\r?(\n|$)")
END, FIM = "<|endoftext|>", ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


@dataclass(frozen=True, slots=True)
class Family:
    """A published encoding: its split, its special tokens, and the sha256 of its file (None: never chosen unasked)."""

    split: str
    specials: dict[str, int]
    bos: str | None
    eos: str
    sha256: str | None = None


def _llama3_specials() -> dict[str, int]:
    """The 256 special tokens of Llama 3.1, whose file of ranks is that of Llama 3."""
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    named |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = iter(range(256))
    names = [named.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256)]
    return {f"<|{name}|>": 128000 + i for i, name in enumerate(names)}


R50K = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
P50K = "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"
CL100K = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
O200K = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
LLAMA3 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
QWEN = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
CL100K_SPECIALS = {END: 100257, **dict(zip(FIM, range(100258, 100261))), "<|endofprompt|>": 100276}
QWEN_SPECIALS = {END: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
FAMILIES = {
    "r50k_base": Family("gpt2", {END: 50256}, END, END, R50K),
    "p50k_base": Family("gpt2", {END: 50256}, END, END, P50K),
    "p50k_edit": Family("gpt2", {END: 50256, **dict(zip(FIM, range(50281, 50284)))}, END, END),
    "cl100k_base": Family("cl100k", CL100K_SPECIALS, END, END, CL100K),
    "o200k_base": Family("o200k", {END: 199999, "<|endofprompt|>": 200018}, END, END, O200K),
    "llama3": Family("cl100k", _llama3_specials(), "<|begin_of_text|>", "<|end_of_text|>", LLAMA3),
    "qwen": Family("qwen2", QWEN_SPECIALS | {f"<|extra_{i}|>": 151646 + i for i in range(205)}, None, END, QWEN),
}


def is_tiktoken(head: bytes) -> bool:
    """Whether a file that begins this way is one."""
    return FIRST_LINE.match(head) is not None


def read_tiktoken(raw: bytes, name: str, pattern: str | None = None) -> Parsed:
    """The tokenizer.json of a tiktoken file. `pattern`: a family, a split's name or a regular expression."""
    ranks = _ranks(raw, name)
    family = _family(ranks, name) if pattern is None else FAMILIES.get(pattern)
    if family is None:
        return ranked_definition(ranks, [], named_or_regex(pattern or ""), name), None
    taken = {ranks[token] for token in ranks} & set(family.specials.values())
    if taken:
        raise UserError(
            f"{name}: rank {min(taken)} is a special token of the family {pattern!r}; write the split's name "
            f"({family.split!r}) as pattern to have no special tokens"
        )
    added = [added_token(index, content) for content, index in family.specials.items()]
    config = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": END if END in family.specials else None}
    if "<|finetune_right_pad_id|>" in family.specials:
        config["pad_token"] = "<|finetune_right_pad_id|>"
    known = {key: token for key, token in config.items() if token is not None}
    return ranked_definition(ranks, added, SPLITS[family.split], name), known


def _ranks(raw: bytes, name: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        encoded, _, rank = line.partition(b" ")
        if not line:
            continue
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            token = b""
        if not token or len(token) > MAX_TOKEN_BYTES or not rank.isdigit() or len(rank) > 8:
            shown = line[:40].decode("utf-8", "replace")
            raise UserError(f"{name}, line {number}: {shown!r} is not a base64 token and its rank; the file is broken")
        if token in ranks:
            raise UserError(f"{name}, line {number}: the token {token[:20]!r} stands twice; the file is broken")
        ranks[token] = int(rank)
        if len(ranks) > MAX_TOKENS:
            raise UserError(f"{name}: more than {MAX_TOKENS:,} tokens; the file is broken")
    if len(set(ranks.values())) < len(ranks):
        raise UserError(f"{name}: two tokens have the same rank; the file is broken")
    if max(ranks.values()) > 2 * len(ranks) + 1024:
        raise UserError(f"{name}: {max(ranks.values())} is the largest rank of {len(ranks)} tokens; the file is broken")
    return ranks


def _family(ranks: dict[bytes, int], name: str) -> Family:
    """The family whose published file has the same content, line for line."""
    lines = [b"%s %d\n" % (base64.b64encode(token), ranks[token]) for token in sorted(ranks, key=ranks.__getitem__)]
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    for family in FAMILIES.values():
        if family.sha256 == digest:
            return family
    raise UserError(
        f"{name}: {len(ranks)} ranks of no known family, and a tiktoken file does not say how text is split; give "
        f"pattern=, a regular expression or one of {', '.join([*FAMILIES, *SPLITS])}"
    )
