"""Any Hugging Face fast tokenizer seen as bytes: ids of the Rust library, spans in the UTF-8 text."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32, Int64
from numpy import ndarray

from tokenkit.config import UserError
from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding, framed
from tokenkit.tokenizers.offsets import byte_positions, common_bytes, ends_from_offsets, uncovered_character
from tokenkit.tokenizers.pieces import (
    BYTE_FALLBACK,
    Definition,
    model_type,
    model_vocabulary,
    space_mark,
    token_table,
    unknown_id,
)

ROLES = ("bos", "eos", "pad")
# What an ordinary text may hold; a tokenizer that cannot spell one of these changes every corpus.
PROBES = ("Hello World, it's 12:30!", "two  spaces   and\ttab", "line\n\nother line\r\n", "Crème brûlée à Noël", "end ")
# Keys of a found tokenizer_config.json that name classes or repeat tokenizer.json; a saved config must not carry them.
CLASS_KEYS = ("tokenizer_class", "auto_map", "processor_class", "added_tokens_decoder", "backend", "is_local")


class HFTokenizer:
    """Any tokenizer.json whose tokens spell the text. Special-token literals inside a text are text."""

    def __init__(self, definition: Definition, config: dict[str, Any] | None = None, name: str = "tokenizer") -> None:
        """`config` is a parsed tokenizer_config.json: role tokens, chat template. `name` is for messages."""
        self.name = name
        self._json = json.dumps(definition, ensure_ascii=False)  # parsed, a large vocabulary takes ten times the memory
        self.config = dict(config or {})
        try:
            self._is_unigram = model_type(definition) == "Unigram"
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        added = definition.get("added_tokens") or []
        ids = model_vocabulary(definition) | {token["content"]: token["id"] for token in added}
        self.bos_id, self.eos_id, self.pad_id = (self._role_id(role, ids) for role in ROLES)
        if config is None and len(added) == 1 and added[0]["special"]:  # a bare tokenizer.json with one special token
            self.eos_id = added[0]["id"]
        roles = {index for index in (self.bos_id, self.eos_id, self.pad_id) if index is not None}
        self.special_ids: frozenset[int] = frozenset({token["id"] for token in added if token["special"]} | roles)
        self.special_tokens = {content: index for content, index in ids.items() if index in self.special_ids}
        self.token_bytes = token_table(definition, self.special_ids)
        self.vocab_size = len(self.token_bytes)
        self._lengths = np.fromiter(map(len, self.token_bytes), np.int64, self.vocab_size)
        self._mark, self._unknown_id = space_mark(definition), unknown_id(definition)
        self._added_ids = frozenset(token["id"] for token in added)
        self._backend = self._text_backend(definition)
        self._adds_space = False
        self._adds_space = self._spelled("a") == b" a"
        self._refuse_if_lossy()

    @property
    def definition(self) -> Definition:
        """The parsed tokenizer.json, as it was found."""
        return json.loads(self._json)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template found with the tokenizer."""
        return self.config.get("chat_template")

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the canonical tokenizer.json and the role tokens."""
        content = {"tokenizer": self.definition, "roles": [self.bos_id, self.eos_id, self.pad_id]}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def start_id(self) -> int:
        """The id that begins every document: bos, else eos."""
        for index in (self.bos_id, self.eos_id):
            if index is not None:
                return index
        raise UserError(f"{self.name}: has neither bos nor eos; name bos_token or eos_token in tokenizer_config.json")

    def encode(self, text: str, *, special: bool = False) -> Encoding:
        """Ids and byte spans; with `special`, begun by bos where the tokenizer has one."""
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: list[str], *, special: bool = False) -> list[Encoding]:
        """One encoding per text."""
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        encodings = [self._with_spans(text, one.ids) for text, one in zip(texts, found)]
        return [framed(encoding, self.bos_id) for encoding in encodings] if special else encodings

    def decode(self, ids: list[int]) -> str:
        """The text of the ids without specials and leading dummy space; incomplete characters become U+FFFD."""
        spelled = b"".join([self.token_bytes[index] for index in ids])
        return (spelled[1:] if self._adds_space and spelled[:1] == b" " else spelled).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained(folder)` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._json, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {key: value for key, value in self.config.items() if key not in CLASS_KEYS and key != "chat_template"}
        names = {index: content for content, index in self.special_tokens.items()}
        for role, index in zip(ROLES, (self.bos_id, self.eos_id, self.pad_id)):
            if index is not None:
                config[f"{role}_token"] = names[index]
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", "utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def _role_id(self, role: str, ids: dict[str, int]) -> int | None:
        token = self.config.get(f"{role}_token")
        content = token["content"] if isinstance(token, dict) else token
        if content is not None and content not in ids:
            raise UserError(
                f"{self.name}: {role}_token is {content!r}, which tokenizer.json does not hold; name another"
            )
        return None if content is None else ids[content]

    def _text_backend(self, definition: Definition) -> tokenizers.Tokenizer:
        """The library's tokenizer for text alone: no template, truncation or padding, and no special token matched."""
        added = definition.get("added_tokens") or []
        hidden = [{**token, "special": token["id"] in self.special_ids} for token in added]
        definition = {**definition, "added_tokens": hidden}
        if self._is_unigram:
            definition["model"] = self._shielded(definition["model"])
        try:
            backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises nothing more special
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.name}: the tokenizers library cannot read this tokenizer.json ({reason})") from None
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend

    def _shielded(self, model: Definition) -> Definition:
        """A Unigram model that never prefers the literal of a special token or byte to its spelling by other pieces."""
        floor = min((score for _, score in model["vocab"]), default=0.0) - 1e4
        special = self.special_ids | {i for i, (piece, _) in enumerate(model["vocab"]) if piece in BYTE_FALLBACK}
        return {**model, "vocab": [[p, floor if i in special else s] for i, (p, s) in enumerate(model["vocab"])]}

    def _spelled(self, text: str) -> bytes:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return b"".join([self.token_bytes[index] for index in ids])

    def _with_spans(self, text: str, ids: list[int]) -> Encoding:
        raw, array = text.encode(), np.array(ids, np.int32)
        spelled = b"".join(map(self.token_bytes.__getitem__, ids))
        if spelled == raw:
            ends = np.cumsum(self._lengths[array])
        elif self._adds_space and spelled[:1] == b" " and spelled[1:] == raw:
            ends = np.cumsum(self._lengths[array]) - 1
        else:
            ends = self._ends_by_offsets(text, array, spelled)
        starts = np.zeros_like(ends)
        starts[1:] = ends[:-1]
        plain = np.zeros(len(ends), np.bool_)
        return Encoding(array, starts, ends, plain, np.full(len(ends), TEXT_SEGMENT, np.int32))

    def _ends_by_offsets(self, text: str, ids: Int32[ndarray, "T"], spelled: bytes) -> Int64[ndarray, "T"]:
        """Byte ends where tokens do not spell the text as it is: normalised or unknown characters, literal marks."""
        offsets = np.array(self._backend.encode(text, add_special_tokens=False).offsets, np.int64).reshape(-1, 2)
        place = self._changed_place(text, ids, spelled, offsets)
        if place is not None:
            raise UserError(
                f"{self.name}: changes the text at character {place}, {text[place : place + 20]!r}, so its tokens have "
                "no byte spans; leave such texts out or use a tokenizer that keeps every byte"
            )
        lengths = self._lengths[ids]
        lengths[ids == self._unknown_id] = 1  # spells nothing but stands for its characters
        if self._adds_space and spelled[:1] == b" " and text[:1] != " ":
            lengths[0] -= 1
        return ends_from_offsets(offsets, lengths, byte_positions(text))

    def _changed_place(
        self, text: str, ids: Int32[ndarray, "T"], spelled: bytes, offsets: Int64[ndarray, "T 2"]
    ) -> int | None:
        """The first character that the tokens lose; None where they spell all that the normalizer made of the text."""
        normalizer = self._backend.normalizer
        normalised = text if normalizer is None else normalizer.normalize_str(text)
        wanted = (normalised.replace(self._mark, " ") if self._mark else normalised).encode()
        if len(ids) and (spelled == wanted or (self._adds_space and spelled == b" " + wanted)):
            return None
        injected = np.isin(ids, [index for index in self.special_ids if index != self._unknown_id])
        if injected.any():
            return int(offsets[injected][0, 0])
        if self._added_ids.isdisjoint(ids.tolist()) and self._unknown_id not in ids:
            return len(wanted[: common_bytes(wanted, spelled)].decode(errors="ignore"))
        return uncovered_character(offsets, len(text))

    def _refuse_if_lossy(self) -> None:
        for probe in PROBES:
            ids = self._backend.encode(probe, add_special_tokens=False).ids
            spelled = self._spelled(probe)
            if spelled not in (probe.encode(), b" " + probe.encode()) and self._unknown_id not in ids:
                raise UserError(
                    f"{self.name}: this tokenizer changes ordinary text ({probe!r} becomes "
                    f"{spelled.decode(errors='replace')!r}); use one that keeps case, accents and white space"
                )
